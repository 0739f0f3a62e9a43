"""The runs of the demo, one function each: a stage on all sources, a target from few rows, a context."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from mpt_lightning import CPT, MPTTarget, MultitaskDataModule, PromptTuning, load_task
from mpt_lightning.compare.pool import quiet
from mpt_lightning.modules import PromptModule
from mpt_lightning.resources import LLAMA, T5

SOURCES = tuple(
    f"demo/{name}" for name in ("sentiment", "acceptability", "paraphrase", "entailment", "question", "similarity")
)
TARGETS = tuple(f"demo/{name}" for name in ("topic", "voice", "conflict", "advice"))

LENGTH = 16
TEACHER_STEPS, SOURCE_STEPS, SHOT_STEPS, CONTEXT_STEPS = 300, 300, 70, 30
OPTIONS: dict[str, Any] = {"warmup_steps": 5}
# Factors begin at one and embeddings here are of size two: this moves both by about the same share per step.
RATES: dict[str, Any] = {"shared_lr": 0.3, "task_lr": 0.02}
CONTEXT_METHODS: dict[str, dict[str, Any]] = {
    "icl": {"method": "icl"},
    "context_prompt_tuning": {"method": "prompt_tuning", "epsilon": None, "template_epsilon": None, "lr": 0.01},
    "instruction_prompt_tuning": {"method": "instruction", "epsilon": None, "template_epsilon": None, "lr": 0.05},
    "cpt": {"method": "cpt", "epsilon": 0.4, "template_epsilon": 0.2, "epsilon_scale": "embedding", "lr": 0.05},
}


@dataclass
class Row:
    """One result: what was trained on what, and how well it did on the test split."""

    method: str
    task: str
    k: int | None
    seed: int
    metric: str
    value: float
    trained_parameters: int
    seconds: float


def stage(module: PromptModule, steps: int, output: Path, seed: int = 0) -> tuple[str, list[Row]]:
    """Train on all source tasks; give the checkpoint's path and the tasks' results."""
    L.seed_everything(seed, verbose=False)
    data = MultitaskDataModule(
        list(SOURCES), sampling="all", batch_size=24, eval_batch_size=100, cache_dir=str(output / "cache")
    )
    trainer, start = _trainer(steps, output), time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - start
    path = output / f"{'teachers' if isinstance(module, PromptTuning) else 'source'}.ckpt"
    trainer.save_checkpoint(path)
    trainer.test(module, datamodule=data, verbose=False)
    method = "teacher" if isinstance(module, PromptTuning) else "mpt_source"
    return str(path), [_row(method, task, None, 0, trainer, module, seconds) for task in SOURCES]


def few_shot(method: str, source: str, task: str, k: int, seed: int, output: Path) -> Row:
    """Adapt the T5 to one target task with k rows, evenly over its classes; test on the whole test split."""
    L.seed_everything(seed, verbose=False)
    data = load_task(
        task, k_shot=k, shots_per="balanced", seed=seed, batch_size=16, eval_batch_size=100,
        cache_dir=str(output / "cache"),
    )  # fmt: skip
    module: PromptModule
    if method == "mpt":
        module = MPTTarget(T5, source=source, **RATES, **OPTIONS)
    else:
        module = PromptTuning(T5, prompt_length=LENGTH, lr=0.3, **OPTIONS)
    return _fit_and_test(method, module, data, task, k, seed, SHOT_STEPS, output)


def in_context(method: str, task: str, k: int, seed: int, output: Path) -> Row:
    """Put k rows per class before every row of the decoder-only model, and train what the method trains of them."""
    L.seed_everything(seed, verbose=False)
    data = load_task(
        task, context_shots=k, seed=seed, answer_prefix="label :", separator="", max_input_length=64, batch_size=8,
        eval_batch_size=100, cache_dir=str(output / "cache"),
    )  # fmt: skip
    module = CPT(LLAMA, normalize="weights", **CONTEXT_METHODS[method], **OPTIONS)
    return _fit_and_test(method, module, data, task, k, seed, 0 if method == "icl" else CONTEXT_STEPS, output)


def _fit_and_test(
    method: str, module: PromptModule, data: Any, task: str, k: int, seed: int, steps: int, output: Path
) -> Row:
    with quiet():
        trainer, start = _trainer(steps, output), time.perf_counter()
        if steps:
            trainer.fit(module, datamodule=data)
        seconds = time.perf_counter() - start
        trainer.test(module, datamodule=data, verbose=False)
    return _row(method, task, k, seed, trainer, module, seconds)


def _trainer(steps: int, output: Path) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=str(output),
    )


def _row(
    method: str, task: str, k: int | None, seed: int, trainer: L.Trainer, module: PromptModule, seconds: float
) -> Row:
    metric = module.cards[task].metrics[0]
    value = float(trainer.callback_metrics[f"test/{task}/{metric}"])
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return Row(method, task, k, seed, metric, round(value, 4), trained, round(seconds, 2))
