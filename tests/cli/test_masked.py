"""Every recipe for masked language models runs from the command line, on the embedded BERT and tasks."""

import json
import re
from pathlib import Path

import pytest
import torch

from mpt_lightning import Predictor
from mpt_lightning.cli.main import main
from mpt_lightning.resources import packaged_names

STAGES = ["prompt_tuning", "mpt_source", "mpt_target"]
TRAINED = {"lora": "lora_A.default.weight", "fine_tuning": "word_embeddings.weight"}
TOPICS = {"animals", "food", "weather", "travel"}
OPTIONS = [
    *("--config", "trainer/cpu", "--data.cache_dir", "../cache", "--data.max_eval_rows", "8"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--model.backbone", "mpt_lightning/demo/bert"),
]
SHORT = [
    *("--trainer.max_steps", "3", "--trainer.max_epochs", "-1", "--trainer.val_check_interval", "3"),
    *("--trainer.check_val_every_n_epoch", "null", "--model.warmup_steps", "0"),
]


def mpt(*words: str) -> None:
    main(list(words))


def records(file: str = "answers.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def score(printed: str) -> float:
    return float(re.search(r"test/demo/topic/accuracy\s+[│|]?\s*([\d.]+)", printed)[1])


def test_every_recipe_is_tested_here() -> None:
    there = {name.split("/")[1] for name in packaged_names("configs") if name.startswith("masked/")}
    assert there == {*STAGES, *TRAINED, "hard_prompt"}


def test_mpt_runs_from_teachers_to_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    """Each stage reads the checkpoint file of the one before; the target learns a new task's words."""
    sources = ["--data.tasks", "[demo/sentiment, demo/entailment, demo/voice]", "--data.max_train_rows", "50"]
    for stage in STAGES[:2]:
        mpt("fit", "--config", f"masked/{stage}", *OPTIONS, *SHORT, *sources)
    assert Path("runs/masked/mpt_source/prompt_similarity.png").stat().st_size > 1000
    recipe = ["--config", "masked/mpt_target", *OPTIONS, *SHORT, "--data", "demo/topic"]
    mpt("fit", *recipe, "--trainer.max_steps", "20", "--trainer.val_check_interval", "10")
    best = "runs/masked/mpt_target/best.ckpt"
    assert Path(best).stat().st_size < 100_000
    for command in ("validate", "test"):
        capsys.readouterr()
        mpt(command, *recipe, "--ckpt_path", best)
        assert "demo/topic/accuracy" in capsys.readouterr().out
    mpt("predict", *recipe, "--ckpt_path", best, "--output", "answers.jsonl")
    assert len(records()) == 8
    assert {record["prediction"] for record in records()} <= TOPICS
    assert {record["gold"][0] for record in records()} <= TOPICS

    rows = [{"sentence": "the dog chased the cat in the park today ."}, {"sentence": "snow fell on the barn at noon ."}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mpt("predict", "--ckpt_path", best, "--input", "rows.jsonl", "--output", "new.jsonl")
    answers = Predictor.from_checkpoint(best).predict(rows)
    assert [record["prediction"] for record in records("new.jsonl")] == [answer.prediction for answer in answers]
    for answer in answers:
        assert answer.probabilities.keys() == TOPICS
        assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_runs_from_training_to_predictions(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["--config", f"masked/{name}", *OPTIONS, *SHORT, "--data", "demo/topic", "--data.k_shot", "8"]
    mpt("fit", *recipe)
    best = f"runs/masked/{name}/best.ckpt"
    assert any(key.endswith(TRAINED[name]) for key in torch.load(best, weights_only=True)["state_dict"])
    capsys.readouterr()
    mpt("test", *recipe, "--ckpt_path", best)
    assert 0 <= score(capsys.readouterr().out) <= 1
    mpt("predict", *recipe, "--ckpt_path", best, "--output", "answers.jsonl")
    assert {record["prediction"] for record in records()} <= TOPICS


def test_hard_prompts_need_no_training(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["--config", "masked/hard_prompt", *OPTIONS, "--data", "demo/topic", "--data.pattern", "0"]
    recipe += ["--data.max_eval_rows", "60"]
    mpt("test", *recipe)
    assert score(capsys.readouterr().out) >= 0.8
    mpt("predict", *recipe, "--output", "answers.jsonl")
    assert len(records()) == 60
