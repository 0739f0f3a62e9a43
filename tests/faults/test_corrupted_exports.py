"""Damaged and hostile exports, of this package and of PEFT, are refused with a clear message."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import lightning.pytorch as L
import pytest
import torch
from safetensors.torch import load_file, save_file

from mpt_lightning import MPTSource, MPTTarget, Predictor, PromptTuning, export_peft, import_peft, load_backbone
from mpt_lightning.checkpoint.export import digest
from mpt_lightning.cli.main import main
from mpt_lightning.interop import export_prompt_embeds
from tests.faults.conftest import Outcome, Payload, World
from tests.faults.damage import Change, Damage, flip, put
from tests.modules.conftest import AnyData

pytestmark = pytest.mark.usefixtures("own_folder")
ADAPTER, CONFIG, PICKLED = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
OURS, STATE, TASKS = "mpt_lightning.json", "mpt_lightning.safetensors", "tasks.json"
IDS, TYPES = [11, 12, 13, 14, 20, 30, 1, 2], [1, 2, 2, 2, 3, 4, 4, 0]
HUGE = 10**14


@pytest.fixture(scope="module")
def folders(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return an export of each layout, and the same without this package's files, as PEFT itself would write it."""
    root = tmp_path_factory.mktemp("exports")
    made = {
        "task": export_peft(world.checkpoints["PromptTuning"], root / "task", "one"),
        "folders": export_peft(world.checkpoints["PromptTuning"], root / "folders"),
        "group": export_peft(world.checkpoints["MPTSource"], root / "group"),
        "context": export_peft(world.checkpoints["CPT"], root / "context"),
    }
    for name, source in [("PEFT", "task"), ("PEFT group", "group"), ("PEFT bin", "task"), ("PEFT CPT", "context")]:
        made[name] = root / name
        shutil.copytree(made[source], made[name], ignore=shutil.ignore_patterns("mpt_lightning.*"))
    torch.save(load_file(made["PEFT bin"] / ADAPTER), made["PEFT bin"] / PICKLED)
    (made["PEFT bin"] / ADAPTER).unlink()
    change_json(
        made["PEFT CPT"] / CONFIG,
        lambda c: c.update(
            peft_type="CPT", num_virtual_tokens=len(IDS), cpt_token_ids=IDS, cpt_tokens_type_mask=TYPES,
            opt_projection_epsilon=0.2, opt_projection_format_epsilon=0.1,
        ),
    )  # fmt: skip
    table = load_backbone(world.backbones["llama"]).embeddings
    save_file({"prompt_embeddings": table[torch.tensor(IDS)].clone()}, made["PEFT CPT"] / ADAPTER)
    for folder in made.values():
        import_peft(folder)
    return made


def change_json(file: Path, change: Change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def change_tensors(file: Path, change: Change) -> None:
    content = load_file(file)
    change(content)
    save_file(content, file)


def readers(folder: Path, world: World) -> list[Callable[[], object]]:
    """Return calls of everything that reads a folder."""
    backbone = world.backbones["llama" if "context" in folder.name or "CPT" in folder.name else "t5"]

    def fit(module: L.LightningModule) -> Callable[[], object]:
        trainer = L.Trainer(
            accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, limit_val_batches=0,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        return lambda: trainer.fit(module, datamodule=AnyData(["one"]))

    start = {"prompt_length": 4, "prompt_init": "checkpoint", "init_checkpoint": str(folder)}
    return [
        lambda: import_peft(folder),
        lambda: import_peft(folder, load_backbone(backbone)),
        lambda: Predictor.from_checkpoint(str(folder)),
        lambda: main(["export", str(folder), "again", "--to", "prompt-embeds"]),
        lambda: main(["predict", "--input", "in.jsonl", "--ckpt_path", str(folder)]),
        fit(MPTSource(backbone, teachers={"one": str(folder)}, prompt_length=4)),
        fit(MPTTarget(backbone, source=str(folder))),
        fit(PromptTuning(backbone, **start)),
    ]


def assert_refused(folder: Path, number: int, world: World, outcome: Outcome) -> None:
    """Assert that `import_peft` and one other reader raise an error that names the folder."""
    for entry in (0, 1 + number % 7):
        message = outcome(readers(folder, world)[entry])
        assert message is not None
        assert str(folder) in message


def byte_damages() -> Iterator[tuple[str, Damage | None]]:
    yield "gone", None
    yield "empty", lambda c, r: b""
    yield "half", lambda c, r: c[: len(c) // 2]
    yield "last bytes gone", lambda c, r: c[:-2]
    yield "zeros after", lambda c, r: c + bytes(64)
    yield "zeros within", lambda c, r: c[:100] + bytes(16) + c[116:]
    yield "png", lambda c, r: b"\x89PNG\r\n\x1a\n" + r.randbytes(200)
    for number in range(4):
        yield f"bit {number}", flip(lambda c, r: r.randrange(len(c)))


FILES = [
    ("task", OURS), ("task", ADAPTER), ("folders", OURS), ("folders", f"two/{ADAPTER}"), ("group", OURS),
    ("group", ADAPTER), ("group", TASKS), ("context", OURS), ("context", STATE), ("PEFT bin", PICKLED),
]  # fmt: skip


BYTE_CASES = [
    pytest.param(name, file, what, damage, id=f"{what}-{name}-{file.replace('/', ' ')}")
    for name, file in FILES
    for what, damage in byte_damages()
    # A description may be edited: only the files that it describes have digests.
    if file != OURS or what in ("gone", "empty", "half", "png")
]


@pytest.mark.parametrize(("name", "file", "what", "damage"), BYTE_CASES)
def test_changed_bytes(
    name: str, file: str, what: str, damage: Damage | None, folders: dict[str, Path], world: World, tmp_path: Path,
    outcome: Outcome,
) -> None:  # fmt: skip
    shutil.copytree(folders[name], folder := tmp_path / name)
    path, random = folder / file, Random(f"{name} {file} {what}")
    whole = path.read_bytes()
    if damage is None:
        path.unlink()
        if file == OURS and name != "folders":
            return  # what is left is a folder as PEFT writes it
    else:
        path.write_bytes(damage(whole, random))
    if file == PICKLED and outcome(lambda: import_peft(folder)) is None:
        # Accepted only if the tensors are unchanged.
        left, right = import_peft(folder).state_dict, import_peft(folders[name]).state_dict
        assert all(torch.equal(value, right[key]) for key, value in left.items())
        return
    assert_refused(folder, random.randrange(7), world, outcome)


def description_damages() -> Iterator[tuple[str, Change]]:
    yield "a later format", put("format", value=2)
    yield "an unknown prompt", put("prompt_class", value="Nothing")
    yield "another prompt", put("prompt_config", value={"num_tasks": 1, "length": 5, "dim": 32, "tasks": ["one"]})
    yield "a missing file", put("files", "more.safetensors", value="0")
    yield "another digest", put("files", ADAPTER, value="0")


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in description_damages()])
def test_a_wrong_description(
    change: Change, folders: dict[str, Path], world: World, tmp_path: Path, outcome: Outcome
) -> None:
    shutil.copytree(folders["task"], folder := tmp_path / "task")
    change_json(folder / OURS, change)
    assert_refused(folder, 1, world, outcome)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ["task", "group", "context", "PEFT", "PEFT group", "PEFT bin", "PEFT CPT"])
def test_values_that_are_not_finite(
    name: str, value: float, folders: dict[str, Path], world: World, tmp_path: Path, outcome: Outcome
) -> None:
    shutil.copytree(folders[name], folder := tmp_path / name)
    file = folder / (STATE if name == "context" else PICKLED if name == "PEFT bin" else ADAPTER)
    tensors = torch.load(file, weights_only=True) if name == "PEFT bin" else load_file(file)
    key = sorted(tensors)[-1]
    tensors[key].view(-1)[3] = value
    (torch.save if name == "PEFT bin" else save_file)(tensors, file)
    if (folder / OURS).is_file():
        content = json.loads((folder / OURS).read_text())
        content["files"][file.name] = digest(file)
        (folder / OURS).write_text(json.dumps(content))
    message = outcome(lambda: import_peft(folder))
    assert message is not None
    assert key in message
    assert "not finite" in message


def peft_damages() -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    for folder, fields in {
        "PEFT": {
            "peft_type": [None, "LORA"], "task_type": ["SEQ_CLS"], "num_virtual_tokens": [None, "4", 0, 5],
            "token_dim": [31], "num_transformer_submodules": [3],
        },
        "PEFT group": {"num_tasks": [3], "num_ranks": [3]},
        "PEFT CPT": {
            "cpt_token_ids": [None, IDS[1:], [9999] * 8], "cpt_tokens_type_mask": [None, TYPES[1:], [-7] * 8],
            "opt_projection_epsilon": [-1], "base_model_name_or_path": [None, "/gone"],
        },
    }.items():  # fmt: skip
        for name, values in fields.items():
            for value in values:
                change = put(name, value=value)
                yield f"{name} {value}", folder, lambda f, c=change: change_json(f / CONFIG, c)
    for name, content in {
        "list": b"[]", "text": b"peft", "empty": b"", "cut": b'{"peft_type": "PROM', "UTF-16": "{}".encode("utf-16"),
        "latin-1": b'{"peft_type": "\xff"}', "deep": b'{"a":' * 3000, "NaN": b'{"num_virtual_tokens": NaN}',
    }.items():  # fmt: skip
        yield f"config {name}", "PEFT", lambda f, c=content: (f / CONFIG).write_bytes(c)
    for name, content in {
        "list": b"[]", "text": b"one", "too few": b'{"one": 0}', "twice": b'{"one": 0, "two": 0}',
    }.items():  # fmt: skip
        yield f"tasks {name}", "PEFT group", lambda f, c=content: (f / TASKS).write_bytes(c)
    for name, change in {
        "header's length": lambda c: b"\xff" * 8 + c[8:], "header": lambda c: c[:20] + b"~" + c[21:],
        "half": lambda c: c[: len(c) // 2], "empty": lambda c: b"", "more": lambda c: c + b"\0", "text": lambda c: b"a",
        "type": lambda c: c.replace(b'"F32"', b'"F99"'), "offsets": lambda c: c.replace(b"[0,", b"[4,"),
    }.items():  # fmt: skip
        yield f"tensors' {name}", "PEFT", lambda f, h=change: (f / ADAPTER).write_bytes(h((f / ADAPTER).read_bytes()))
    for name, change in {
        "another shape": lambda t: t.update(prompt_embeddings=t["prompt_embeddings"][:3]),
        "flat": lambda t: t.update(prompt_embeddings=t["prompt_embeddings"].flatten()),
        "another name": lambda t: t.update(prompts=t.pop("prompt_embeddings")),
        "one more": lambda t: t.update(more=torch.zeros(1)),
    }.items():
        yield f"tensors {name}", "PEFT", lambda f, h=change: change_tensors(f / ADAPTER, h)


PEFT_CASES = [
    pytest.param(number, folder, change, id=f"{name}-{folder}")
    for number, (name, folder, change) in enumerate(peft_damages())
]


@pytest.mark.parametrize(("number", "name", "change"), PEFT_CASES)
def test_a_wrong_peft_folder(
    number: int, name: str, change: Callable, folders: dict[str, Path], world: World, tmp_path: Path, outcome: Outcome
) -> None:
    shutil.copytree(folders[name], folder := tmp_path / name)
    change(folder)
    assert_refused(folder, number, world, outcome)


def test_code_in_a_folder_is_not_run(folders: dict[str, Path], world: World, tmp_path: Path, outcome: Outcome) -> None:
    shutil.copytree(folders["PEFT bin"], folder := tmp_path / "PEFT bin")
    torch.save({"prompt_embeddings": Payload(tmp_path / "sprung")}, folder / PICKLED)
    for entry in readers(folder, world):
        assert outcome(entry) is not None
    assert not (tmp_path / "sprung").exists()


def test_exported_embeddings_are_refused_as_a_checkpoint(world: World, tmp_path: Path, outcome: Outcome) -> None:
    folder = export_prompt_embeds(world.checkpoints["PromptTuning"], tmp_path / "embeds")
    tasks = json.loads((folder / "prompt_embeds.json").read_text())["tasks"]
    assert [task["sha256"] for task in tasks.values()] == [digest(folder / task["file"]) for task in tasks.values()]
    assert_refused(folder, 2, world, outcome)
