"""Files that are read are never executed, and files are written only where the user asked for them."""

import ast
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml

import mpt_lightning
from mpt_lightning import PEFTModule, Predictor, PromptTuning, SoftPrompt, export_peft, load_backbone
from mpt_lightning.backbones.pretrained import load_config, load_tokenizer
from mpt_lightning.checkpoint import KEY, PromptCheckpoint, read_checkpoint
from mpt_lightning.cli.main import main
from mpt_lightning.data.card import card_names, load_card
from mpt_lightning.data.source import import_preprocess
from mpt_lightning.data.tokenize import Encoder
from mpt_lightning.interop import export_prompt_embeds, import_peft, model_card
from mpt_lightning.interop.folder import check_paths
from mpt_lightning.io import can_be_path
from tests.faults.conftest import CARD, Outcome, Payload, World
from tests.modules.conftest import AnyData

pytestmark = pytest.mark.usefixtures("own_folder")
PACKAGE = Path(mpt_lightning.__file__).parent

# The package's source

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "imp", "runpy", "code", "pty"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
FORBIDDEN_CALLS = {
    "os.system", "os.popen", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "torch.hub.load",
    "torch.jit.load", "torch.package.PackageImporter", "np.load", "numpy.load",
}  # fmt: skip
NEEDED = {"load": ("weights_only", True, "torch.load"), "from_pretrained": ("trust_remote_code", False, "")}
# Files that import a module by a computed name: for lazy imports, a card's function and PEFT's config class.
IMPORTERS = {"__init__.py", "data/__init__.py", "data/source.py", "modules/peft_config.py"}


def unsafe_calls(source: str, file: str = "x.py") -> Iterator[str]:
    """Yield a source's imports and calls that could execute the content of a file."""
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (name for name in modules if name.split(".")[0] in FORBIDDEN_MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        if called in FORBIDDEN_NAMES | FORBIDDEN_CALLS:
            yield called
        if called.endswith("import_module") and file not in IMPORTERS:
            yield called
        if given.get("shell") or given.get("trust_remote_code") or given.get("allow_pickle"):
            yield f"{called} with {given}"
        option, value, only = NEEDED.get(called.rpartition(".")[2], ("", None, ""))
        if option and only in ("", called) and given.get(option) is not value:
            yield f"{called} without {option}={value}"


def test_the_package_has_no_call_that_executes_data() -> None:
    files = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert {name: found for name, text in files.items() if (found := list(unsafe_calls(text, name)))} == {}
    assert sum(text.count("torch.load(") for text in files.values()) == 1
    assert sum(text.count("yaml.safe_load(") for text in files.values()) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "AutoTokenizer.from_pretrained(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=flag)",
        "load_dataset(x, trust_remote_code=True)",
        "eval(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(line, shell=True)",
        "importlib.import_module(name)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_search_finds_each_unsafe_call(source: str) -> None:
    assert list(unsafe_calls(source))


# Backbones that come with code

CODE = """from pathlib import Path
Path({trap!r}).write_text("run")
from transformers import T5Config as EvilConfig, T5ForConditionalGeneration as EvilModel
from transformers import PreTrainedTokenizerFast as EvilTokenizer
"""


@pytest.fixture
def model_with_code(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that saves a model with custom code; a question on the terminal fails the test."""

    def ask(*_: Any) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", ask)

    def make(config: bool, tokenizer: bool, model_type: str) -> str:
        shutil.copytree(world.backbones["t5"], folder := tmp_path / "evil")
        (folder / "evil.py").write_text(CODE.format(trap=str(tmp_path / "sprung")))
        maps = {
            "config.json": {"AutoConfig": "evil.EvilConfig", "AutoModelForSeq2SeqLM": "evil.EvilModel"},
            "tokenizer_config.json": {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]},
        }
        for name, given in zip(maps, (config, tokenizer), strict=True):
            content = json.loads((folder / name).read_text())
            content |= {"auto_map": maps[name]} if given else {}
            content |= {"model_type": model_type} if name == "config.json" else {"tokenizer_class": "EvilTokenizer"}
            (folder / name).write_text(json.dumps(content))
        return str(folder)

    return make


def test_a_model_that_requires_custom_code_is_refused(
    model_with_code: Callable, tmp_path: Path, outcome: Outcome
) -> None:
    folder = model_with_code(True, True, "evil")
    trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    for attempt in (
        lambda: load_config(folder),
        lambda: load_backbone(folder),
        lambda: Encoder.from_backbone(folder, 16),
        lambda: trainer.fit(PromptTuning(folder, prompt_length=4), datamodule=AnyData()),
        lambda: main(["fit", "--config", "mpt/teachers", "--model.backbone", folder]),
    ):
        message = outcome(attempt)
        assert message is not None
        assert "never run" in message
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(("config", "tokenizer"), [(True, False), (False, True), (True, True)])
def test_a_models_custom_code_is_not_used(
    config: bool, tokenizer: bool, model_with_code: Callable, tmp_path: Path, outcome: Outcome
) -> None:
    """If transformers supports the model's type, its class is used."""
    folder = model_with_code(config, tokenizer, "t5")
    assert type(load_backbone(folder).model).__module__.startswith("transformers.models.t5")
    outcome(lambda: load_tokenizer(folder))  # either loads without the custom code or raises
    assert not (tmp_path / "sprung").exists()
    assert not [name for name in sys.modules if "evil" in name.lower()]


def test_no_argument_enables_custom_code(world: World, tmp_path: Path, outcome: Outcome) -> None:
    words = ["fit", "--config", str(world.recipes["PromptTuning"]), "--model.trust_remote_code", "true"]
    message = outcome(lambda: main(words))
    assert message is not None
    assert "trust_remote_code" in message
    content = world.plain("PromptTuning")
    content["hyper_parameters"]["trust_remote_code"] = True
    torch.save(content, tmp_path / "trusting.ckpt")
    assert outcome(lambda: PromptTuning.load_from_checkpoint(str(tmp_path / "trusting.ckpt"))) is not None


# Functions that a card names

FUNCTIONS = """
from functools import partial
from json import dumps
from pathlib import Path
def mine(row, split):
    return [row]
def other(line, part):
    return [line]
def one(row):
    return [row]
def _private(row, split):
    return [row]
alias = mine
short = lambda row, split: [row]
bound = partial(mine, split="train")
class Tool:
    def __call__(self, row, split):
        return [row]
    @staticmethod
    def run(row, split):
        return [row]
tool = Tool()
method = tool.__call__
static = Tool.run
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "of_a_card.py").write_text(FUNCTIONS)
    (tmp_path / "trap_of_a_card.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n{FUNCTIONS}")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("of_a_card", "trap_of_a_card"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "path",
    [
        *(f"of_a_card.{name}" for name in (
            "other", "one", "_private", "alias", "short", "bound", "Tool", "tool", "method", "static", "dumps", "Path",
            "Tool.run", "nothing", "__name__", "__builtins__.eval", "mine.__globals__",
        )),
        "os.system", "builtins.eval", "builtins.exec", "builtins.print", "subprocess.run", "subprocess.Popen",
        "shutil.rmtree",
        "shutil.move", "importlib.import_module", "pathlib.Path", "runpy.run_path", "pickle.loads", "ctypes.CDLL",
        "json.dump",
        "torch.load", "torch.save", "torch.serialization.save", "torch.hub.load", "yaml.dump", "numpy.save",
        "antigravity.x",
        "mpt_lightning.data.source.import_module", "mpt_lightning.data.card.TaskCard",
        "mpt_lightning.predictor.predict_file",
        "mpt_lightning.files.yaml.load", "mpt_lightning.data.preprocess.Row", "mpt_lightning.data.preprocess",
        "of_a_card",
    ],
)  # fmt: skip
def test_a_card_can_name_only_row_functions(path: str, functions: Path, outcome: Outcome) -> None:
    assert outcome(lambda: import_preprocess(load_card(CARD | {"preprocess": path}))) is not None


def test_a_card_can_name_a_row_function(functions: Path) -> None:
    function = import_preprocess(load_card(CARD | {"preprocess": "of_a_card.mine"}))
    assert function({"a": 1}, "train") == [{"a": 1}]


def test_reading_a_card_or_a_checkpoint_imports_no_function(functions: Path, world: World, tmp_path: Path) -> None:
    card = CARD | {"name": "one", "preprocess": "trap_of_a_card.mine"}
    (tmp_path / "card.yaml").write_text(yaml.safe_dump({"init_args": {"card": card}}))
    load_card(str(tmp_path / "card.yaml"))
    main(["tasks", str(tmp_path / "card.yaml")])
    content = world.plain("PromptTuning")
    content[KEY]["cards"]["one"] = card
    torch.save(content, tmp_path / "one.ckpt")
    predictor = Predictor.from_checkpoint(str(tmp_path / "one.ckpt"))
    assert predictor.predict(["a fine film"], "one")[0].prediction in CARD["choices"]
    import_peft(export_peft(tmp_path / "one.ckpt", tmp_path / "export"))
    assert not (tmp_path / "sprung").exists()


# Checkpoints


def test_lightning_reads_only_tensors_and_plain_values(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "trap.ckpt"
    torch.save(world.plain("PromptTuning") | {"trap": Payload(tmp_path / "sprung")}, path)
    module = PromptTuning(world.backbones["t5"], prompt_length=4)
    trainer = L.Trainer(accelerator="cpu", max_steps=9, logger=False, enable_checkpointing=False)
    assert outcome(lambda: trainer.fit(module, datamodule=AnyData(["one"]), ckpt_path=str(path), weights_only=False))
    assert outcome(lambda: PromptTuning.load_from_checkpoint(str(path), weights_only=False))
    with path.open("rb") as file, pytest.raises(Exception, match=r"(?i)weights.only"):
        PromptTuning.load_from_checkpoint(file)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "config",
    [
        "os.abort",
        "trap_of_a_card.mine",
        {"class_path": "trap_of_a_card.Tool", "init_args": {}},
        {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "sprung"]}},
        ["peft.LoraConfig"],
        None,
    ],
    ids=str,
)
def test_a_checkpoint_cannot_choose_a_class_to_construct(
    config: Any, functions: Path, world: World, tmp_path: Path, outcome: Outcome
) -> None:
    content = world.plain("PromptTuning")
    content["hyper_parameters"] = {"backbone": world.backbones["t5"], "peft_config": config}
    content[KEY] |= {
        "stage": "PEFTModule", "prompt_class": "EmptyPrompt",
        "prompt_config": {"num_tasks": 2, "dim": 32, "tasks": ["one", "two"]},
    }  # fmt: skip
    content["state_dict"] = {"backbone.model.lora": torch.zeros(2)}
    torch.save(content, path := tmp_path / "peft.ckpt")
    for attempt in (PEFTModule.load_from_checkpoint, Predictor.from_checkpoint):
        assert outcome(lambda attempt=attempt: attempt(str(path))) is not None
    assert not (tmp_path / "sprung").exists()
    assert "trap_of_a_card" not in sys.modules


# Names that become paths

UNSAFE_NAMES = [
    "../../evil", "/etc/x", "a\\..\\b", "..", ".", "", "a/../../b", "a//b", "a/", "con:",
    "x" * 300,
    "é" * 150, "a\0b", "a\nb", "a\u2028b", "a\u202eb", "\ud800", " a", "a ", "a/.. /b", "~", 'a"b', "a|b", "a*",
    "a?", "<a>",
    "adapter_model.safetensors", "README.md", "a/prompt_embeds.JSON", "mpt_lightning.json",
]  # fmt: skip
ALLOWED = {"~"}


@pytest.fixture
def trained(world: World) -> Callable[[list[str]], PromptCheckpoint]:
    """Return a function that builds a checkpoint of tasks with any names, as from a user's DataModule."""

    def make(tasks: list[str]) -> PromptCheckpoint:
        found = read_checkpoint(str(world.checkpoints["PromptTuning"]))
        prompt = SoftPrompt(len(tasks), 4, 32, tasks)
        state = {f"prompt.{name}": value for name, value in prompt.state_dict().items()}
        return PromptCheckpoint(
            "x.ckpt", "PromptTuning", found.backbone, found.fingerprint, "SoftPrompt", prompt.config(), state
        )

    return make


@pytest.mark.parametrize("name", UNSAFE_NAMES, ids=ascii)
def test_no_task_name_leads_out_of_the_folder(name: str, trained: Callable, tmp_path: Path, outcome: Outcome) -> None:
    if name in ALLOWED:
        check_paths([name])
    else:
        refused = outcome(lambda: load_card(CARD | {"name": name})) is not None
        assert refused or name.casefold().endswith((".safetensors", ".json", ".md"))
        checkpoint = trained(["one", name])
        for number, export in enumerate((export_peft, export_prompt_embeds)):
            assert outcome(lambda e=export, n=number: e(checkpoint, tmp_path / "in" / "side" / str(n))) is not None
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", UNSAFE_NAMES, ids=ascii)
def test_a_task_of_any_name_can_be_exported(name: str, trained: Callable, tmp_path: Path) -> None:
    if "\ud800" in name:
        return  # cannot be written in UTF-8
    checkpoint = trained(["one", name])
    folder = export_peft(checkpoint, tmp_path / "in" / "side", name)
    assert import_peft(folder).tasks == [name]
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {folder}
    front = (folder / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert f"task:{name}" in yaml.safe_load(front)["tags"]
    code = "".join(part.removeprefix("python") for part in model_card(checkpoint).split("```")[1::2])
    ast.parse(code)


@pytest.mark.parametrize(
    "names", [["a", "A"], ["é", "e\u0301"], ["glue/SST2", "GLUE/sst2"], ["straße", "STRASSE"]], ids=ascii
)
def test_two_tasks_never_share_a_file(names: list[str], trained: Callable, tmp_path: Path, outcome: Outcome) -> None:
    for number, export in enumerate((export_peft, export_prompt_embeds)):
        message = outcome(lambda e=export, n=number: e(trained(names), tmp_path / str(n)))
        assert message is not None
        assert "differ in case alone" in message


def test_nested_names_share_no_file(trained: Callable, tmp_path: Path) -> None:
    names = ["a", "a/b", "a/b/c", "b", "b.c", "one two", "ä", "-x", ".hidden"]
    folder = export_peft(trained(names), tmp_path / "peft")
    assert import_peft(folder).tasks == names
    index = json.loads((export_prompt_embeds(trained(names), tmp_path / "embeds") / "prompt_embeds.json").read_text())
    files = [task["file"] for task in index["tasks"].values()]
    assert len(set(files)) == len(names)
    assert all((tmp_path / "embeds" / file).resolve().is_relative_to(tmp_path / "embeds") for file in files)


def test_usual_names_are_paths() -> None:
    assert all(map(can_be_path, [*card_names(), "glue/sst2", "a-b_c.d", "ä", "one two", "a.", "x" * 200]))
