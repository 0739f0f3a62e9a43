"""Short training runs in processes that can be killed, started from a process that has everything imported."""

import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mpt_lightning import CPT, MPTSource, MultitaskDataModule, PromptTuning, TaskDataModule
from mpt_lightning.callbacks import LastCheckpoint
from mpt_lightning.modules import PromptModule

T5, LLAMA = "mpt_lightning/demo/t5", "mpt_lightning/demo/llama"
TASKS = ["demo/voice", "demo/advice", "demo/topic"]

# The server only imports, so that no thread is there when it forks; see tests/ranks.py. It does not know this folder.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([
    "mpt_lightning.modules", "mpt_lightning.data", "mpt_lightning.callbacks", "transformers.models.t5.modeling_t5",
    "transformers.models.llama.modeling_llama", "transformers.models.t5.tokenization_t5",
])  # fmt: skip


def start(function: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Start `function(*arguments)`, of an importable module, in a process of its own."""
    process = processes.Process(target=function, args=arguments)
    process.start()
    return process


def finish(function: Callable[..., None], *arguments: Any, seconds: float = 60) -> None:
    """Start it and wait for its end.

    Raises:
        RuntimeError: it failed or took too long.
    """
    process = start(function, *arguments)
    process.join(seconds)
    if process.exitcode != 0:
        process.kill()
        process.join()
        raise RuntimeError(f"{function.__name__}{arguments} ended with {process.exitcode}")


def train(stage: str, folder: str, inputs: str, steps: int = 12) -> None:
    """Train with a validation and a checkpoint every third step; goes on from the last one where there is one.

    Args:
        stage: "teachers", "source" or "cpt".
        folder: for checkpoints.
        inputs: folder with the data's cache and the teachers' checkpoint.
        steps: number of optimizer steps.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
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
    finish(train, "teachers", str(inputs / "teachers"), str(inputs), 3)
