"""`mpt demo`: the methods on the embedded world and models, and tables of them, offline, on two CPU cores."""

import json
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mpt_lightning import MPTSource, PromptTuning, __version__
from mpt_lightning.compare.pool import quiet
from mpt_lightning.demo.jobs import (
    CONTEXT_METHODS,
    LENGTH,
    OPTIONS,
    RATES,
    SOURCE_STEPS,
    TARGETS,
    TEACHER_STEPS,
    few_shot,
    in_context,
    stage,
)
from mpt_lightning.demo.picture import draw
from mpt_lightning.demo.tables import results_table
from mpt_lightning.errors import MPTError
from mpt_lightning.resources import T5

SHOTS = (16, 32)
CONTEXT_SHOTS = 2


def run_demo(output: Path, seeds: int = 3) -> None:
    """Run the methods on the embedded world; print tables and write results.json and a picture.

    Args:
        output: folder for results.json, demo.png and the checkpoints; made where it does not exist.
        seeds: runs per method, task and k, at least 1.

    Raises:
        MPTError: `seeds` is below 1, or `output` is a file.
    """
    if seeds < 1:
        raise MPTError(f"--seeds must be at least 1, got {seeds}.")
    if output.exists() and not output.is_dir():
        raise MPTError(f"--output {output} is a file; give a folder.")
    output.mkdir(parents=True, exist_ok=True)
    console, start, cores = Console(), time.perf_counter(), min(os.cpu_count() or 1, 8)
    # Matrices of this size gain nothing from a second thread, and lose much where another program wants the core.
    torch.set_num_threads(1)
    adapted = [
        (m, t, k, seed) for t in TARGETS for k in SHOTS for seed in range(seeds) for m in ("prompt_tuning", "mpt")
    ]
    contexts = [(m, t, CONTEXT_SHOTS, seed) for t in TARGETS for seed in range(seeds) for m in CONTEXT_METHODS]
    bar = Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console)
    with quiet(), bar:
        progress = bar.add_task("teachers", total=2 + len(adapted) + len(contexts))
        teachers, rows = stage(PromptTuning(T5, prompt_length=LENGTH, lr=0.3, **OPTIONS), TEACHER_STEPS, output)
        bar.update(progress, advance=1, description="source, distilled")
        student = MPTSource(T5, teachers=teachers, prompt_length=LENGTH, **RATES, **OPTIONS)
        source, made = stage(student, SOURCE_STEPS, output)
        rows += made
        bar.update(progress, advance=1, description="held-out tasks, all methods")
        # These runs are small and do not depend on each other: one per core is faster than each on all cores.
        with ProcessPoolExecutor(cores, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            jobs = [pool.submit(few_shot, m, source, task, k, seed, output) for m, task, k, seed in adapted]
            jobs += [pool.submit(in_context, *run, output) for run in contexts]
            for job in as_completed(jobs):
                job.result()
                bar.advance(progress)
        rows += [job.result() for job in jobs]
    seconds = time.perf_counter() - start
    plain = [asdict(row) for row in rows]
    results = {"rows": plain, "environment": _environment(cores, seconds)}
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(source, plain, output / "demo.png")
    title = "held-out tasks: test score, mean ± standard deviation over seeds"
    columns = [(method, k) for k in SHOTS for method in ("prompt_tuning", "mpt")]
    console.print(results_table(f"T5, k rows in all; {title}", rows, columns))
    columns = [(method, CONTEXT_SHOTS) for method in CONTEXT_METHODS]
    console.print(results_table(f"Decoder-only model, k rows per class in its context; {title}", rows, columns))
    console.print(f"{seconds:.0f} seconds. Results: {output / 'results.json'}, picture: {output / 'demo.png'}")


def _environment(cores: int, seconds: float) -> dict[str, str | int | float]:
    return {
        "mpt_lightning": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lightning": version("lightning"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": cores,
        "seconds": round(seconds, 1),
    }
