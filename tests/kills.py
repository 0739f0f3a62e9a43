"""Short training runs in processes that can be killed, started from a process that has everything imported."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import finish, start

from mpt_lightning import CPT, MPTSource, MultitaskDataModule, PromptTuning, TaskDataModule
from mpt_lightning.callbacks import LastCheckpoint
from mpt_lightning.modules import PromptModule

T5, LLAMA = "mpt_lightning/demo/t5", "mpt_lightning/demo/llama"
TASKS = ["demo/voice", "demo/advice", "demo/topic"]


def train(stage: str, folder: str, inputs: str, steps: int = 12) -> None:
    """Train with a validation and a checkpoint every third step; goes on from the last one where there is one.

    Args:
        stage: "teachers", "source" or "cpt".
        folder: for checkpoints.
        inputs: folder with the data's cache and the teachers' checkpoint.
        steps: number of optimizer steps.
    """
    warnings.simplefilter("ignore")
    L.seed_everything(0, verbose=False)
    options: dict[str, Any] = {"batch_size": 8, "max_eval_rows": 8, "cache_dir": f"{inputs}/cache"}
    data: TaskDataModule | MultitaskDataModule
    if stage == "cpt":
        data = TaskDataModule("demo/voice", context_shots=5, answer_prefix="label :", separator="", **options)
    else:
        data = MultitaskDataModule(TASKS, sampling="stochastic", max_train_rows=16, **options)
    best = ModelCheckpoint(folder, "best", monitor="val/average", mode="max", enable_version_counter=False)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, val_check_interval=3, check_val_every_n_epoch=None, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, gradient_clip_val=1.0,
        callbacks=[best, LastCheckpoint(folder)],
    )  # fmt: skip
    trainer.fit(module(stage, inputs), data, ckpt_path="last")


def module(stage: str, inputs: str) -> PromptModule:
    """Make the stage's module."""
    if stage == "teachers":
        return PromptTuning(T5, prompt_length=4, lr=0.3)
    if stage == "source":
        return MPTSource(T5, teachers=f"{inputs}/teachers/last.ckpt", prompt_length=4, warmup_steps=2)
    return CPT(LLAMA, lr=0.1, epsilon=2.0, template_epsilon=1.0, warmup_steps=2)


def prepare(inputs: Path) -> None:
    """Make the data's cache and the teachers' checkpoint."""
    finish(start(train, "teachers", str(inputs / "teachers"), str(inputs), 3))
