"""`mpt demo`: teachers, source training, few-shot adaptation and a table, offline, on two CPU cores."""

import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as L
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mpt_lightning import MPTSource, MPTTarget, MultitaskDataModule, PromptTuning, __version__, load_task
from mpt_lightning.demo import BACKBONE, SOURCES, TARGETS
from mpt_lightning.demo.picture import draw
from mpt_lightning.modules import PromptModule

LENGTH = 16
TEACHER_STEPS, SOURCE_STEPS, SHOT_STEPS = 300, 300, 70
SHOTS = (16, 32)
OPTIONS: dict[str, Any] = {"warmup_steps": 5}
# Factors begin at one and embeddings here are of size two: this moves both by about the same share per step.
RATES: dict[str, Any] = {"shared_lr": 0.3, "task_lr": 0.02}


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


def run_demo(output: Path, seeds: int = 3) -> None:
    """Run the whole method on the embedded world; print a table and write results.json and a picture.

    Args:
        output: folder for results.json, demo.png and the checkpoints; made where it does not exist.
        seeds: runs per method, task and k, at least 1.

    Raises:
        ValueError: `seeds` is below 1, or `output` is a file.
    """
    if seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a folder.")
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    start, cores = time.perf_counter(), min(os.cpu_count() or 1, 8)
    # Matrices of this size gain nothing from a second thread, and lose much where another program wants the core.
    torch.set_num_threads(1)
    runs = [(task, k, seed) for task in TARGETS for k in SHOTS for seed in range(seeds)]
    bar = Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console)
    with quiet(), bar:
        progress = bar.add_task("teachers", total=2 + 2 * len(runs))
        rows: list[Row] = []
        teachers, made = _stage(PromptTuning(BACKBONE, prompt_length=LENGTH, lr=0.3, **OPTIONS), TEACHER_STEPS, output)
        rows += made
        bar.update(progress, advance=1, description="source, distilled")
        student = MPTSource(BACKBONE, teachers=teachers, prompt_length=LENGTH, **RATES, **OPTIONS)
        source, made = _stage(student, SOURCE_STEPS, output)
        rows += made
        bar.advance(progress)
        bar.update(progress, description="held-out tasks, both methods")
        # These runs are small and do not depend on each other: one per core is faster than each on all cores.
        with ProcessPoolExecutor(cores, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            jobs = [
                pool.submit(_few_shot, method, source, task, k, seed, output)
                for task, k, seed in runs
                for method in ("prompt_tuning", "mpt")
            ]
            for job in as_completed(jobs):
                job.result()
                bar.advance(progress)
        rows += [job.result() for job in jobs]
    seconds = time.perf_counter() - start
    environment = {
        "mpt_lightning": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lightning": version("lightning"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": cores,
        "seconds": round(seconds, 1),
    }
    plain = [asdict(row) for row in rows]
    results = {"rows": plain, "environment": environment}
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(source, plain, output / "demo.png")
    console.print(_table(rows))
    console.print(f"{seconds:.0f} seconds. Results: {output / 'results.json'}, picture: {output / 'demo.png'}")


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


def _stage(module: PromptModule, steps: int, output: Path) -> tuple[str, list[Row]]:
    """Train on all source tasks; give the checkpoint's path and the tasks' results."""
    L.seed_everything(0, verbose=False)
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


def _few_shot(method: str, source: str, task: str, k: int, seed: int, output: Path) -> Row:
    """Adapt to one target task with k rows per class; test on the whole test split."""
    L.seed_everything(seed, verbose=False)
    data = load_task(
        task, k_shot=k, shots_per="balanced", seed=seed, batch_size=16, eval_batch_size=100,
        cache_dir=str(output / "cache"),
    )  # fmt: skip
    module: PromptModule
    if method == "mpt":
        module = MPTTarget(BACKBONE, source=source, **RATES, **OPTIONS)
    else:
        module = PromptTuning(BACKBONE, prompt_length=LENGTH, lr=0.3, **OPTIONS)
    with quiet():
        trainer, start = _trainer(SHOT_STEPS, output), time.perf_counter()
        trainer.fit(module, datamodule=data)
        seconds = time.perf_counter() - start
        trainer.test(module, datamodule=data, verbose=False)
    return _row(method, task, k, seed, trainer, module, seconds)


def _row(
    method: str, task: str, k: int | None, seed: int, trainer: L.Trainer, module: PromptModule, seconds: float
) -> Row:
    metric = module.cards[task].metrics[0]
    value = float(trainer.callback_metrics[f"test/{task}/{metric}"])
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return Row(method, task, k, seed, metric, round(value, 4), trained, round(seconds, 2))


def _table(rows: list[Row]) -> Table:
    """Make the table of the few-shot results: mean and standard deviation over seeds."""
    columns = [(method, k) for k in SHOTS for method in ("prompt_tuning", "mpt")]
    names = {"prompt_tuning": "prompt tuning", "mpt": "MPT"}
    table = Table(title="Held-out tasks: test score, mean ± standard deviation over seeds")
    table.add_column("task")
    for method, k in columns:
        table.add_column(f"{names[method]}\nk = {k}", justify="right")

    def cells(tasks: tuple[str, ...]) -> Iterator[str]:
        for method, k in columns:
            by_seed: dict[int, list[float]] = {}
            for row in rows:
                if row.method == method and row.k == k and row.task in tasks:
                    by_seed.setdefault(row.seed, []).append(row.value)
            means = [statistics.fmean(values) for values in by_seed.values()]
            yield f"{100 * statistics.fmean(means):.1f} ± {100 * statistics.pstdev(means):.1f}"

    for task in TARGETS:
        table.add_row(task, *cells((task,)))
    table.add_section()
    table.add_row("average", *cells(tuple(TARGETS)))

    def mean(method: str, k: int, field: str) -> float:
        return statistics.fmean(getattr(row, field) for row in rows if row.method == method and row.k == k)

    table.add_section()
    table.add_row("trained parameters", *(f"{mean(m, k, 'trained_parameters'):,.0f}" for m, k in columns))
    table.add_row("seconds per run", *(f"{mean(m, k, 'seconds'):.1f}" for m, k in columns))
    return table


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what dozens of short runs would print; the progress bar tells how far they are."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers.utils.logging.enable_progress_bar()
        datasets.enable_progress_bars()  # type: ignore[attr-defined]
