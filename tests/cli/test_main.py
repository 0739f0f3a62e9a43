"""The commands, called with a user's arguments."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import trainers

import mpt_lightning
from mpt_lightning.cli.main import main
from mpt_lightning.recipes import load_argument
from mpt_lightning.resources import packaged, packaged_names
from tests.conftest import build_model, build_tokenizer

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
SHORT = [
    *("--trainer.max_steps", "2", "--trainer.max_epochs", "-1", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]


def mpt(*words: str) -> None:
    main(list(words))


def error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the message of a command that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        mpt(*words)
    assert leaving.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mpt: error:")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("words", [["--help"], ["tasks"], ["configs"], ["--version"]])
def test_light_commands_do_not_import_torch(words: list[str]) -> None:
    code = f"import sys; from mpt_lightning.cli.main import main\ntry: main({words})\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'lightning', 'transformers', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert time.perf_counter() - start < 5  # about one second on an idle machine


def test_importing_the_package_imports_no_model_library() -> None:
    code = "import sys, mpt_lightning; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_public_names_can_be_imported() -> None:
    for name in mpt_lightning.__all__:
        assert getattr(mpt_lightning, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        mpt_lightning.Nothing  # noqa: B018


def test_tasks_and_configs_show_and_copy(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mpt("tasks", "glue/sst2")
    assert yaml.safe_load(capsys.readouterr().out)["init_args"]["card"]["name"] == "glue/sst2"
    mpt("configs", "mpt/source")
    shown = capsys.readouterr().out
    mpt("configs", "mpt/source", "mine.yaml")
    assert (own_folder / "mine.yaml").read_text() == shown
    assert "exists" in error(capsys, "configs", "mpt/source", "mine.yaml")
    assert "glue/sst2" in error(capsys, "tasks", "glue/sst3")
    assert "mpt/source" in error(capsys, "configs", "mpt/sources")


def test_every_recipe_starts_with_its_purpose_and_command() -> None:
    for name in packaged_names("configs"):
        lines = packaged("configs", name).read_text().splitlines()
        assert lines[0].startswith("# ")
        assert f"#   mpt fit --config {name}" in "\n".join(lines) or f"--config {name}" in "\n".join(lines), name


@pytest.fixture
def t5_with_all_words(own_folder: Path) -> str:
    """Save a T5 whose vocabulary contains every word of the fixtures and of the cards."""
    tokenizer, model = build_tokenizer("t5"), build_model("t5")
    trainer = trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    files = [*FIXTURES.rglob("*.jsonl"), *(Path(__file__).parents[2] / "tasks").rglob("*.yaml")]
    tokenizer.backend_tokenizer.train_from_iterator((file.read_text(encoding="utf-8") for file in files), trainer)
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(own_folder / "t5")
    return str(own_folder / "t5")


@pytest.mark.parametrize("family", ["mpt", "demo"])
def test_every_recipe_runs_from_teachers_to_predictions(
    family: str, own_folder: Path, t5_with_all_words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage reads the checkpoint file of the one before: teachers, source, target, few-shot, test, predict."""
    monkeypatch.setenv("MPT_DATA_ROOT", str(FIXTURES))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(own_folder / "cache"))
    options = [*SHORT, "--data.cache_dir", str(own_folder / "cache"), "--config", "trainer/cpu"]
    if family == "mpt":
        options += ["--model.backbone", t5_with_all_words, "--model.warmup_steps", "0"]
    else:
        options += ["--data.max_train_rows", "50", "--data.max_eval_rows", "20", "--model.warmup_steps", "0"]
    few = ["--data.k_shot", "2", "--data.dev_shot", "2", "--data.shots_per", "task"]
    stages = {"teachers": [], "source": [], "target": [], "few_shot": few}
    ran = []
    for stage, more in stages.items():
        if f"{family}/{stage}" not in packaged_names("configs"):
            continue
        length = ["--model.prompt_length", "5"] if stage in ("teachers", "source") and family == "mpt" else []
        mpt("fit", "--config", f"{family}/{stage}", *options, *length, *more, *AT_THE_END)
        assert (own_folder / f"runs/{family}/{stage}/best.ckpt").is_file(), stage
        ran.append(f"{family}/{stage}")
    assert ran == [name for name in [f"{family}/{stage}" for stage in stages] if name in packaged_names("configs")]
    assert (own_folder / f"runs/{family}/source/prompt_similarity.png").stat().st_size > 1000

    best = f"runs/{family}/target/best.ckpt"
    for command in ("validate", "test"):
        mpt(command, "--config", f"{family}/target", *options, "--ckpt_path", best)
    mpt("predict", "--config", f"{family}/target", *options, "--ckpt_path", best, "--output", "answers.jsonl")
    records = [json.loads(line) for line in (own_folder / "answers.jsonl").read_text().splitlines()]
    assert records
    for record in records:
        assert record.keys() == {"task", "row", "text", "prediction", "gold"}
        assert record["text"]
        assert record["gold"]
    assert not list(own_folder.glob("answers.jsonl.*"))


@pytest.mark.parametrize("overlay", ["", "cpt/prompt_tuning", "cpt/instruction"])
def test_cpt_runs_from_training_to_predictions(
    overlay: str, own_folder: Path, model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPT_DATA_ROOT", str(FIXTURES))
    recipe = ["--config", "cpt/sst2", *(["--config", overlay] if overlay else []), "--config", "trainer/cpu"]
    recipe += [
        *CPT_WORDS,
        "--model.instruction_length",
        "3",
        "--model.backbone",
        model_folder("llama"),
        "--data.cache_dir",
        "cache",
        *SHORT,
    ]
    mpt("fit", *recipe, *AT_THE_END)
    best = "runs/cpt/best.ckpt"
    assert Path(best).stat().st_size < 60_000
    mpt("test", *recipe, "--ckpt_path", best)
    mpt("predict", *recipe, "--ckpt_path", best, "--output", "answers.jsonl")
    records = [json.loads(line) for line in (own_folder / "answers.jsonl").read_text().splitlines()]
    assert {record["prediction"] for record in records} <= {"positive", "negative"}


# The tests' tokenizer has tokens for whole words only, and none for line breaks; all rows are in the context.
CPT_WORDS = ["--data.separator", ".", "--data.answer_prefix", "is :", "--data.max_input_length", "20"]
CPT_WORDS += ["--data.dev_shot", "null"]


def test_in_context_learning_needs_no_checkpoint(
    own_folder: Path, model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MPT_DATA_ROOT", str(FIXTURES))
    recipe = ["--config", "cpt/sst2", "--config", "cpt/icl", "--config", "trainer/cpu", *CPT_WORDS, *SHORT]
    recipe += ["--model.backbone", model_folder("llama"), "--data.cache_dir", "cache"]
    mpt("test", *recipe)
    assert "test/glue/sst2/accuracy" in capsys.readouterr().out
    assert "trains nothing" in error(capsys, "fit", *recipe)
    other = ["--model.backbone", model_folder("t5")]
    assert "expected a decoder-only one" in error(capsys, "test", *recipe, *other)
    assert "`separator`, which the tokenizer" in error(capsys, "test", *recipe, "--data.separator", "here: there")


def test_the_demos_context_recipe_runs(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(own_folder / "cache"))
    recipe = ["--config", "demo/cpt", "--data.card", "demo/topic", *SHORT, "--data.cache_dir", "cache"]
    recipe += ["--data.max_eval_rows", "20", "--model.warmup_steps", "0"]
    mpt("fit", *recipe, *AT_THE_END)
    trained = torch.load("runs/demo/cpt/best.ckpt", weights_only=True)
    moved = trained["state_dict"]["prompt.delta_embedding"]
    assert moved.shape[0] == len(trained["mpt_lightning"]["prompt_config"]["token_ids"])
    assert moved.abs().sum() > 0
    capsys.readouterr()
    mpt("test", *recipe, "--ckpt_path", "runs/demo/cpt/best.ckpt")
    of_cpt = scores(capsys.readouterr().out)
    mpt("test", *recipe, "--config", "cpt/icl")
    of_context = scores(capsys.readouterr().out)
    # Four classes: 0.25 is the accuracy of guessing.
    assert of_context["test/demo/topic/accuracy"] > 0.25
    assert of_cpt["test/demo/topic/invalid"] == of_context["test/demo/topic/invalid"] == 0
    assert of_cpt["test/demo/topic/loss"] != of_context["test/demo/topic/loss"]


def scores(printed: str) -> dict[str, float]:
    """Return the scores in the Trainer's printed table."""
    return {name: float(value) for name, value in re.findall(r"(test/\S+)\s+[│|]?\s*([-\d.e]+)", printed)}


AT_THE_END = ["--trainer.val_check_interval", "2", "--trainer.check_val_every_n_epoch", "null"]


@pytest.mark.parametrize("name", [n for n in packaged_names("configs") if n.startswith("trainer/")])
def test_every_overlay_is_accepted_on_top_of_a_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        mpt("fit", "--config", "mpt/target", "--config", name, "--print_config")
    assert leaving.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    overlay = yaml.safe_load(packaged("configs", name).read_text())
    assert within(overlay["trainer"], printed["trainer"])


def within(part: dict, whole: dict) -> bool:
    """Return whether a nested mapping contains all values of another one."""
    return all(
        within(value, whole[key]) if isinstance(value, dict) else whole[key] == value for key, value in part.items()
    )


def test_an_argument_overrides_a_cards_and_a_recipes_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mpt("fit", "--config", "mpt/target", "--data", "glue/sst2", "--data.batch_size", "7", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["init_args"]["batch_size"] == 7
    assert "sst2" in str(printed["data"]["init_args"]["card"])


def test_a_methods_help_explains_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mpt("fit", "--model.help", "MPTSource")
    text = capsys.readouterr().out
    for name in ("teachers", "rank", "shared_lr", "temperature", "backbone_dtype", "warmup_steps"):
        assert f"--model.{name}" in text or f".{name} " in text, name
    assert "PromptTuning run over the source tasks" in " ".join(text.split())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("label :", "label :"), ("here: there", "here: there"), ("a: {text}", "a: {text}"), ("{a: 1}", {"a": 1}),
        ("a: 1\n", {"a": 1}), ("[1, 2]", [1, 2]), ("1e-3", 0.001), ("null", None),
    ],
)  # fmt: skip
def test_a_value_with_a_colon_is_a_string(text: str, value: object) -> None:
    assert load_argument(text) == value


def test_a_recipe_of_one_line_is_a_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "seed.yaml").write_text("seed_everything: 7")
    with pytest.raises(SystemExit):
        mpt("fit", "--config", "mpt/target", "--config", str(tmp_path / "seed.yaml"), "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["seed_everything"] == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "--config", "mpt/sourc"], "unknown recipe 'mpt/sourc'"),
        (["fit", "--config", "mpt/target", "--data", "glue/sst3"], "unknown task 'glue/sst3'"),
        (["fit", "--config", "mpt/target", "--model.optimiser", "adamw"], "optimiser"),
        (["fit", "--config", "mpt/target", "--model.optimizer", "sgd"], "Expected a typing.Literal"),
        (["test", "--config", "mpt/target"], "There is no trained prompt to evaluate: give --ckpt_path"),
        (["test", "--config", "mpt/target", "--ckpt_path", "no.ckpt"], "no.ckpt: there is no such file"),
        (["fit", "--config", "mpt/teachers", "--data.tasks", "[glue/sst3]"], "one of: glue/sst2"),
        (["fit", "--config", "mpt/teachers", "--data.kappa", "1"], "kappa: got 1, expected a whole number at least 2"),
        (["fit", "--config", "demo/teachers", "--trainer.limit_val_batches", "2.5"], "invalid value 2.5"),
        (["demo", "--seeds", "0"], "--seeds must be at least 1, got 0"),
    ],
)
def test_mistakes_get_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error(capsys, *words)


def test_a_launcher_with_other_rank_counts_gets_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "one"}.items():
        monkeypatch.setenv(name, value)
    words = ["fit", "--config", "demo/teachers", "--config", "trainer/multinode", "--trainer.accelerator", "cpu"]
    message = error(capsys, *words)
    assert "(8 * 2) does not match the world size (4)" in message
    assert "--trainer.num_nodes and --trainer.devices must be the same" in message


@pytest.mark.parametrize("parent_left", [False, True])
@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_PROCID"])
def test_later_ranks_wait_before_they_print_an_error(
    parent_left: bool, variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parents = iter([7, 1 if parent_left else 7])
    waited: list[float] = []
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr("os.getppid", lambda: next(parents))
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(SystemExit):
        mpt("fit", "--config", "mpt/sourc")
    assert waited[0] > 1
    assert ("unknown recipe" in capsys.readouterr().err) is not parent_left
