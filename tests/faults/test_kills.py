"""A run that is killed at any moment and resumed from its last checkpoint ends like an uninterrupted one."""

import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import finish, start

from mpt_lightning import CPT, MPTSource, MultitaskDataModule, PromptTuning, TaskDataModule
from mpt_lightning.callbacks import LastCheckpoint
from mpt_lightning.checkpoint import read_checkpoint
from mpt_lightning.modules import PromptModule

pytestmark = pytest.mark.slow

T5, LLAMA = "mpt_lightning/demo/t5", "mpt_lightning/demo/llama"
TASKS = ["demo/voice", "demo/advice", "demo/topic"]
STEPS, EVERY = 9, 3


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(L.Callback):
    """Kills the process in a hook of one step."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self.act)

    def act(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            die()


def die_in_write(number: int, whole: bool) -> None:
    """Kill the process at its n-th write of a file, after half of the content or after the final renaming."""
    write, replace, left = os.fsync, os.replace, [number]

    def fsync(file: int) -> None:
        write(file)
        left[0] -= 1
        if not left[0] and not whole:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            die()

    def rename(*names: Any) -> None:
        replace(*names)
        if not left[0]:
            die()

    os.fsync, os.replace = fsync, rename


def die_after(seconds: float) -> None:
    """Kill the process after some seconds."""
    signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM has no handler, so it ends the process


# Functions that are called at the start of a run to have it killed; they may return a callback for the run. Two files
# are written after each validation: the best checkpoint, if the score is higher, and the last one.
MOMENTS: dict[str, Callable[[], L.Callback | None]] = {
    "before any checkpoint": partial(DieAt, "on_train_batch_start", 1),
    "with half a first file": partial(die_in_write, 1, whole=False),
    "between best and last": partial(die_in_write, 1, whole=True),
    "with half a later file": partial(die_in_write, 3, whole=False),
    "in a validation": partial(DieAt, "on_validation_batch_start", 6),
    "in a step": partial(DieAt, "on_before_optimizer_step", 7),
}
KILLS = [("source", moment) for moment in MOMENTS] + [("cpt", moment) for moment in list(MOMENTS)[-2:]]
KILLS += [("source", "by chance 0"), ("cpt", "by chance 1")]


def train(stage: str, folder: str, inputs: str, steps: int = STEPS, moment: str = "", seconds: float = 0) -> None:
    """Train with a validation and a checkpoint every third step; resume from the last checkpoint, if any.

    Args:
        stage: "teachers", "source" or "cpt".
        folder: The folder of the checkpoints.
        inputs: The folder of the data's cache and the teachers' checkpoint.
        steps: The number of optimizer steps.
        moment: The moment of `MOMENTS` at which the run is killed, if any.
        seconds: The seconds after which the run is killed, if any.
    """
    warnings.simplefilter("ignore")
    L.seed_everything(0, verbose=False)
    options: dict[str, Any] = {"batch_size": 8, "max_eval_rows": 8, "cache_dir": f"{inputs}/cache"}
    data: TaskDataModule | MultitaskDataModule
    if stage == "cpt":
        data = TaskDataModule("demo/voice", context_shots=5, answer_prefix="label :", separator="", **options)
    else:
        data = MultitaskDataModule(TASKS, sampling="stochastic", max_train_rows=16, **options)
    callbacks = [
        ModelCheckpoint(folder, "best", monitor="val/average", mode="max", enable_version_counter=False),
        LastCheckpoint(folder),
    ]
    if moment in MOMENTS and (callback := MOMENTS[moment]()):
        callbacks.append(callback)
    if seconds:
        die_after(seconds)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, val_check_interval=EVERY, check_val_every_n_epoch=None, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, gradient_clip_val=1.0,
        callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(build(stage, inputs), data, ckpt_path="last")


def build(stage: str, inputs: str) -> PromptModule:
    if stage == "teachers":
        return PromptTuning(T5, prompt_length=4, lr=0.3)
    if stage == "source":
        return MPTSource(T5, teachers=f"{inputs}/teachers/last.ckpt", prompt_length=4, warmup_steps=2)
    return CPT(LLAMA, lr=0.1, epsilon=2.0, template_epsilon=1.0, warmup_steps=2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    finish(start(train, "teachers", str(folder / "teachers"), str(folder), EVERY))
    return folder


@pytest.fixture(scope="module", params=["source", "cpt"])
def whole(request: pytest.FixtureRequest, inputs: Path) -> tuple[dict[str, Any], float]:
    """Return the content of a stage's last checkpoint in an uninterrupted run, and the seconds of that run."""
    folder = inputs / request.param
    finish(start(train, request.param, str(folder), str(inputs)))  # fills the data's cache
    again, begin = inputs / f"{request.param}_again", time.monotonic()
    finish(start(train, request.param, str(again), str(inputs)))
    seconds = time.monotonic() - begin
    assert_equal(last(again), last(folder))
    return last(folder), seconds


def last(folder: Path) -> dict[str, Any]:
    """Return the content of the last checkpoint without paths and without the state that Lightning does not restore."""
    content = torch.load(folder / "last.ckpt", weights_only=True)
    paths = ("dirpath", "best_model_path", "last_model_path", "kth_best_model_path", "best_k_models", "current_score")
    for state in content["callbacks"].values():
        for key in paths:
            state.pop(key, None)
    del content["datamodule_hyper_parameters"], content["hyper_parameters"]
    return content


def assert_equal(found: Any, expected: Any, place: str = "") -> None:
    """Assert that nested contents are equal bit for bit; the message is the path of a difference."""
    assert type(found) is type(expected), place
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            assert_equal(found[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal(one, other, f"{place}/{index}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), place
    else:
        assert found == expected, place


@pytest.mark.parametrize(("whole", "moment"), KILLS, indirect=["whole"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    moment: str, whole: tuple[dict[str, Any], float], inputs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    stage, (expected, seconds) = request.node.callspec.params["whole"], whole
    clock = 0.0 if moment in MOMENTS else random.Random(moment).uniform(0.1, 1.0) * seconds
    process, _ = start(train, stage, str(tmp_path), str(inputs), STEPS, moment, clock)
    process.join(60)
    if moment in MOMENTS:
        assert process.exitcode == -signal.SIGKILL
    for file in tmp_path.glob("*.ckpt"):
        read_checkpoint(str(file))
    finish(start(train, stage, str(tmp_path), str(inputs)))
    assert_equal(last(tmp_path), expected)
