"""Every baseline's recipe runs from the command line, on the embedded tasks."""

import json
from pathlib import Path

import pytest
import torch

from mpt_lightning.cli.main import main
from mpt_lightning.resources import packaged_names

# All tests share one cache of the data.
QUIET = [
    *("--config", "trainer/cpu", "--data.cache_dir", "../cache", "--data.max_eval_rows", "8"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]
SHORT = [
    *("--trainer.max_steps", "3", "--trainer.val_check_interval", "3", "--data.k_shot", "8"),
    *("--data.dev_shot", "8", "--model.warmup_steps", "0"),
]
TRAINED = {
    "fine_tuning": "shared.weight", "head": "lm_head.weight", "adapters": "adapter.up.weight",
    "prompt_tuning": "prompt.prompt_embeddings", "residual": "network.0.weight", "superposition": "prompt.weights",
    "p_tuning_mlp": "encoders.0.0.weight", "p_tuning_lstm": "lstm.weight_ih_l0", "prefix_tuning": "prompt.prefix",
    "prefix_tuning_mlp": "networks.0.0.weight",
    "dept": "prompt.shift_cols", "lora": "lora_A.default.weight", "adalora": "lora_E.default", "ia3": "ia3_l.default",
}  # fmt: skip


def mpt(*words: str) -> None:
    main(list(words))


def error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        mpt(*words)
    assert leaving.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mpt: error:")]
    return line


def answers(folder: Path) -> set[str]:
    return {json.loads(line)["prediction"] for line in (folder / "answers.jsonl").read_text().splitlines()}


def test_every_recipe_is_tested_here() -> None:
    there = {name.split("/")[1] for name in packaged_names("configs") if name.startswith("baselines/")}
    assert there == {*TRAINED, "qlora", "hard_prompt"}


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_runs_from_training_to_predictions(
    name: str, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ["--config", f"baselines/{name}", *QUIET, *SHORT]
    if name == "adalora":
        recipe += ["--model.peft_config.tinit", "1", "--model.peft_config.tfinal", "1"]
    mpt("fit", *recipe)
    best = f"runs/baselines/{name}/best.ckpt"
    state = torch.load(best, weights_only=True)["state_dict"]
    assert any(key.endswith(TRAINED[name]) for key in state)
    capsys.readouterr()
    mpt("test", *recipe, "--ckpt_path", best)
    told = capsys.readouterr()
    assert "test/demo/topic/accuracy" in told.out
    assert "the checkpoint's arguments are used" not in told.err
    mpt("predict", *recipe, "--ckpt_path", best, "--output", "answers.jsonl")
    assert answers(own_folder) <= {"animals", "food", "weather", "travel"}
    assert "There is no trained prompt" in error(capsys, "test", *recipe)


def test_a_few_shot_recipe_trains_on_all_rows_but_its_dev_rows(own_folder: Path) -> None:
    recipe = ["--config", "baselines/prompt_tuning", *QUIET, *SHORT, "--data.k_shot", "null", "--data.dev_shot", "10"]
    mpt("fit", *recipe)
    best = ["--ckpt_path", "runs/baselines/prompt_tuning/best.ckpt", "--trainer.limit_predict_batches", "1"]
    rows = {}
    for split in ("train", "validation"):
        mpt("predict", *recipe, *best, "--data.predict_split", split, "--output", f"{split}.jsonl")
        rows[split] = {json.loads(line)["row"] for line in (own_folder / f"{split}.jsonl").read_text().splitlines()}
    # A batch of 100 rows; `max_eval_rows` is less than 10.
    assert [len(found) for found in rows.values()] == [100, 10]
    assert not rows["train"] & rows["validation"]


def test_a_checkpoint_of_another_config_is_refused(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["--config", "baselines/lora", *QUIET, *SHORT]
    mpt("fit", *recipe)
    path = "runs/baselines/lora/last.ckpt"
    told = error(capsys, "validate", *recipe, "--model.peft_config.r", "2", "--ckpt_path", path)
    assert "The checkpoint was trained with" in told
    assert "'r': 2" in told


def test_hard_prompts_need_no_training(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["--config", "baselines/hard_prompt", *QUIET]
    mpt("test", *recipe)
    assert "test/demo/topic/accuracy" in capsys.readouterr().out
    mpt("predict", *recipe, "--output", "answers.jsonl")
    assert answers(own_folder) <= {"creatures", "dishes", "sky", "journey"}
    assert "HardPrompt trains nothing" in error(capsys, "fit", *recipe, "--trainer.max_steps", "1")
    assert "got pattern=9, expected 0 to 1" in error(capsys, "test", *recipe, "--data.pattern", "9")


def test_qlora_without_its_library_gets_one_message(
    own_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpt_lightning.backbones.quantization.find_spec", lambda name: None)
    message = error(capsys, "fit", "--config", "baselines/qlora", *QUIET, *SHORT, "--data.cache_dir", "cache")
    assert "backbone_quantization='4bit' needs bitsandbytes and accelerate, which is not installed" in message
    assert not (own_folder / "cache").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.peft_config", "peft.PromptTuningConfig"], "use mpt_lightning.PromptTuning"),
        (["--model.peft_config", "peft.IA3Config", "--model.peft_config.rank", "3"], "rank"),
        (["--model.peft_config.r", "0"], "`r` should be a positive integer"),
    ],
)
def test_mistakes_get_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error(capsys, "fit", "--config", "baselines/lora", *QUIET, *SHORT, *words)
