"""What a run records, and what is left of its trials."""

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from mpt_lightning.compare import worker
from mpt_lightning.compare.results import Outcome
from mpt_lightning.compare.worker import Recorder, work
from mpt_lightning.errors import MPTError

RATES = [{"lr": 1}, {"lr": 2}, {"lr": 3}]


@pytest.fixture
def diverging(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Replace training, and return the rates at which it diverges; the score is a tenth of the others."""
    rates: set[int] = set()

    def fit(words: Sequence[str], folder: Path, select: str) -> Outcome:
        rate = int(words[-1])
        folder.mkdir(exist_ok=True)
        (folder / "metrics.csv").write_text("")
        (folder / "best.ckpt").write_text("")
        if rate in rates:
            raise MPTError(f"The loss is not finite\nat {rate}.")
        return Outcome(trials=[{"score": rate / 10, "loss": 1.0}], checkpoint=str(folder / "best.ckpt"))

    monkeypatch.setattr(worker, "_fit", fit)
    return rates


def search(folder: Path) -> Outcome:
    return work([], folder / "run", RATES, fit=True, test=False, select="best", keep=True)


def test_logs_of_all_trials_and_the_best_checkpoint_are_left(diverging: set[int], tmp_path: Path) -> None:
    outcome = search(tmp_path)
    assert (outcome.chosen, outcome.checkpoint) == ({"lr": 3}, str(tmp_path / "run/2/best.ckpt"))
    assert [str(file.parent.name) for file in sorted(tmp_path.rglob("metrics.csv"))] == ["0", "1", "2"]
    assert list(tmp_path.rglob("*.ckpt")) == [tmp_path / "run/2/best.ckpt"]


def test_a_trial_that_diverges_is_recorded_and_not_chosen(diverging: set[int], tmp_path: Path) -> None:
    diverging.update({1, 3})
    outcome = search(tmp_path)
    assert (outcome.error, outcome.chosen) == (None, {"lr": 2})
    assert [trial.get("error") for trial in outcome.trials] == [
        "The loss is not finite at 1.", None, "The loss is not finite at 3.",
    ]  # fmt: skip
    assert [trial["values"] for trial in outcome.trials] == RATES
    assert [math.isnan(trial["score"]) for trial in outcome.trials] == [True, False, True]


def test_a_search_without_any_score_fails(diverging: set[int], tmp_path: Path) -> None:
    diverging.update({1, 2, 3})
    outcome = search(tmp_path)
    assert (outcome.error, outcome.trials, outcome.checkpoint) == ("The loss is not finite at 1.", [], None)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_check_before_training_selects_nothing() -> None:
    recorder = Recorder()
    for checking, step, score in ((True, 0, 0.9), (False, 10, 0.6), (False, 20, 0.7)):
        metrics = {"val/average": torch.tensor(score)}
        recorder.on_validation_end(Mock(sanity_checking=checking, global_step=step, callback_metrics=metrics), Mock())
    assert {step: round(found["val/average"], 6) for step, found in recorder.metrics.items()} == {10: 0.6, 20: 0.7}


@pytest.mark.slow
def test_a_worker_reads_numbers_as_the_command_line_does(tmp_path: Path) -> None:
    """Equal unions have the order of a process's first one: with rich's `float | int`, 1 batch would be 1.0, all."""
    code = """
from pathlib import Path
import mpt_lightning.compare.pool
from mpt_lightning.compare.worker import RunCLI
RunCLI(["fit", "--config", "baselines/lora", "--trainer.limit_val_batches", "1", "--print_config"], Path("."))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert "\n  limit_val_batches: 1\n" in done.stdout
