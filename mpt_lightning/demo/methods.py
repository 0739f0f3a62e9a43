"""The methods of the demo, and a run of one: a stage on all source tasks, or a target task from few rows."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L

from mpt_lightning import CPT, MPTSource, MPTTarget, MultitaskDataModule, PromptTuning, load_task
from mpt_lightning.compare.results import Result
from mpt_lightning.modules import PromptModule
from mpt_lightning.resources import LLAMA, T5

# The source tasks with choices, which the loss is over: after few steps that is far better than the vocabulary.
SOURCES = tuple(f"demo/{name}" for name in ("sentiment", "acceptability", "paraphrase", "entailment", "question"))
TARGETS = tuple(f"demo/{name}" for name in ("topic", "voice", "conflict", "advice"))
LENGTH = 16


@dataclass(frozen=True)
class Method:
    """A method by its title in tables, module, data, optimizer steps (0: only tested) and the data's argument for k."""

    title: str
    module: Callable[..., PromptModule]
    data: dict[str, Any]
    steps: int
    shots: str = "k_shot"


# The rates of prompt tuning and of MPT's target tasks were chosen on source tasks alone: benchmarks/demo.py.
COMMON: dict[str, Any] = {"over": "choices", "warmup_steps": 5}
SCRATCH = partial(PromptTuning, T5, prompt_length=LENGTH, lr=0.3, **COMMON)
# Factors start at 1 and embeddings have a scale of 2: with these rates both change by about the same share per step.
SOURCE: dict[str, Any] = {"shared_lr": 0.3, "task_lr": 0.02, **COMMON}
TARGET: dict[str, Any] = {"shared_lr": 0.3, "task_lr": 0.003, **COMMON}
CONTEXT = partial(CPT, LLAMA, normalize="weights", warmup_steps=5)
FREE: dict[str, Any] = {"epsilon": None, "template_epsilon": None}
BALLS: dict[str, Any] = {"epsilon": 0.4, "template_epsilon": 0.2, "epsilon_scale": "embedding"}

STAGE_DATA: dict[str, Any] = {"sampling": "all", "batch_size": 24}
SHOT_DATA: dict[str, Any] = {"shots_per": "balanced", "batch_size": 16}
CONTEXT_DATA: dict[str, Any] = {"answer_prefix": "label :", "separator": "", "max_input_length": 64, "batch_size": 8}

STAGES = {
    "teacher": Method("teachers", SCRATCH, STAGE_DATA, 100),
    "mpt_source": Method("MPT, source", partial(MPTSource, T5, prompt_length=LENGTH, **SOURCE), STAGE_DATA, 100),
}
FEW_SHOT = {
    "prompt_tuning": Method("prompt tuning", SCRATCH, SHOT_DATA, 40),
    "mpt": Method("MPT", partial(MPTTarget, T5, **TARGET), SHOT_DATA, 40),
}
IN_CONTEXT = {
    name: Method(title, partial(CONTEXT, **options), CONTEXT_DATA, steps, "context_shots")
    for name, title, options, steps in (
        ("icl", "in-context learning", {"method": "icl"}, 0),
        ("context_prompt_tuning", "prompt tuning", {"method": "prompt_tuning", "lr": 0.01, **FREE}, 30),
        ("instruction_prompt_tuning", "instruction prompt tuning", {"method": "instruction", "lr": 0.05, **FREE}, 30),
        ("cpt", "CPT", {"method": "cpt", "lr": 0.05, **BALLS}, 30),
    )
}
METHODS = STAGES | FEW_SHOT | IN_CONTEXT


def run(
    method: str,
    tasks: Sequence[str],
    *,
    k: int | None,
    seed: int,
    output: Path,
    checkpoint: Path | None = None,
    steps: int | None = None,
    split: Literal["validation", "test"] = "test",
    **options: Any,
) -> list[Result]:
    """Train a method of `METHODS`, and return the result of each task on a whole split.

    Without k, it is trained on all `tasks`; with k, on the first one with k training rows, or with k examples per class
    in its context. `output` is the folder of the cache, `checkpoint` the file where the module is saved, `steps`
    replaces the method's, and `options` are further arguments of the module.
    """
    spec = METHODS[method]
    steps = spec.steps if steps is None else steps
    data_options = {**spec.data, "eval_batch_size": 100, "cache_dir": str(output / "cache")}
    data: L.LightningDataModule
    if k is None:
        data = MultitaskDataModule(list(tasks), **data_options)
    else:
        data = load_task(tasks[0], seed=seed, **{spec.shots: k}, **data_options)
    module = spec.module(**options)
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, gradient_clip_val=1.0, limit_val_batches=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=output,
    )  # fmt: skip
    start = time.perf_counter()
    if steps:
        trainer.fit(module, datamodule=data)
    seconds = round(time.perf_counter() - start, 2)
    if checkpoint is not None:
        trainer.save_checkpoint(checkpoint)
    trainer.limit_val_batches = 1.0
    evaluate, prefix = (trainer.test, "test") if split == "test" else (trainer.validate, "val")
    evaluate(module, datamodule=data, verbose=False)
    metrics = {task: module.cards[task].metrics[0] for task in tasks}
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return [
        Result(
            method=method, task=task, k=k, seed=seed, metric=metric, trained_parameters=trained, seconds=seconds,
            value=round(float(trainer.callback_metrics[f"{prefix}/{task}/{metric}"]), 4),
        )
        for task, metric in metrics.items()
    ]  # fmt: skip


def run_stages(output: Path, seed: int) -> list[Result]:
    """Train teachers and a source prompt with a seed, and save them as teachers-<seed>.ckpt and source-<seed>.ckpt."""
    teachers, source = output / f"teachers-{seed}.ckpt", output / f"source-{seed}.ckpt"
    options: dict[str, Any] = {"tasks": SOURCES, "k": None, "seed": seed, "output": output}
    results = run("teacher", checkpoint=teachers, **options)
    return results + run("mpt_source", checkpoint=source, teachers=str(teachers), **options)
