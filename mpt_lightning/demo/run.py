"""`mpt demo`: MPT, CPT and their baselines on the embedded tasks and models, offline, on two CPU cores."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from mpt_lightning.callbacks import draw_similarity
from mpt_lightning.checkpoint import read_checkpoint
from mpt_lightning.compare.formats import rich_table
from mpt_lightning.compare.picture import COLOURS, draw_curves
from mpt_lightning.compare.plan import AVERAGE
from mpt_lightning.compare.pool import WorkerPool, progress_bar
from mpt_lightning.compare.results import Result
from mpt_lightning.compare.scores import summarize, tabulate_runs
from mpt_lightning.compare.tables import score_table
from mpt_lightning.demo.methods import FEW_SHOT, IN_CONTEXT, METHODS, TARGETS, Method, run, run_stages
from mpt_lightning.errors import MPTError

SHOTS = (16, 32)
CONTEXT_SHOTS = 2
COLUMNS = ("method", "task", "k", "seed", "metric", "value", "trained_parameters", "seconds")


def run_demo(output: Path, seeds: int = 3) -> None:
    """Run the methods on the embedded tasks; print tables and write results.json, demo.png and the checkpoints."""
    if seeds < 1:
        raise MPTError(f"--seeds must be at least 1, got {seeds}.")
    output.mkdir(parents=True, exist_ok=True)
    console, start, cores = Console(), time.perf_counter(), min(os.cpu_count() or 1, 8)

    def runs(methods: Iterable[str], shots: Iterable[int]) -> list[dict[str, Any]]:
        return [
            {"method": method, "tasks": [task], "k": k, "seed": seed, "output": output}
            for method, task, k, seed in product(methods, TARGETS, shots, range(seeds))
        ]

    early = runs(["prompt_tuning"], SHOTS) + runs(IN_CONTEXT, [CONTEXT_SHOTS])
    late = runs(["mpt"], SHOTS)
    with progress_bar(console) as bar, WorkerPool(cores) as pool:
        progress = bar.add_task("runs", total=1 + len(early) + len(late))

        def submit(function: Callable[..., list[Result]], **arguments: Any) -> Future[list[Result]]:
            job = pool.submit(function, **arguments)
            job.add_done_callback(lambda _: bar.advance(progress))
            return job

        stages = submit(run_stages, output=output)
        jobs = [submit(run, **arguments) for arguments in early]
        rows = stages.result()
        jobs += [submit(run, **arguments, source=str(output / "source.ckpt")) for arguments in late]
        rows += [row for job in jobs for row in job.result()]
    environment = {
        **{name: version(name) for name in ("mpt_lightning", "torch", "transformers", "lightning")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": cores,
        "seconds": round(time.perf_counter() - start, 1),
    }
    results = {"rows": [{name: getattr(row, name) for name in COLUMNS} for row in rows], "environment": environment}
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    title = "held-out tasks: test score, mean ± standard deviation over seeds; averages with 95% intervals"
    adapted = _summary(rows, FEW_SHOT)
    _draw(output / "source.ckpt", adapted, output / "demo.png")
    _print(console, f"T5, k rows in all; {title}", adapted)
    _print(console, f"Decoder-only model, k rows per class in its context; {title}", _summary(rows, IN_CONTEXT))
    files = f"Results: {output / 'results.json'}, picture: {output / 'demo.png'}"
    console.print(f"{environment['seconds']:.0f} seconds. {files}")


def _summary(rows: Iterable[Result], methods: Mapping[str, Method]) -> pd.DataFrame:
    summary = summarize(tabulate_runs(row for row in rows if row.method in methods))
    return summary.rename(index={name: method.title for name, method in METHODS.items()}, level="method")


def _print(console: Console, title: str, summary: pd.DataFrame) -> None:
    table = score_table(summary, ["trained_parameters", "seconds"])
    table.index = pd.Index([f"{method}\nk = {k}" for k, method in table.index])
    console.print(rich_table(title, "task", table.T, sections=(TARGETS[-1], AVERAGE)))


def _draw(source: Path, summary: pd.DataFrame, path: Path) -> None:
    """Draw how similar the source tasks' prompts are, and the few-shot curves; save them as PNG."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_similarity(left, read_checkpoint(str(source)).prompt())
    left.set_title("Source tasks: cosine similarity of their prompts")
    draw_curves(right, summary, SHOTS)
    for colour, method in zip(COLOURS, summary.index.unique("method"), strict=False):
        means = summary.xs(method, level="method")["mean"].unstack("task")
        right.plot(100 * means.drop(columns=AVERAGE).to_numpy(), color=colour, alpha=0.3)
    right.set(ylabel="test score (%)", title="Held-out tasks (pale), their mean and its 95% interval")
    figure.savefig(path, dpi=150)
