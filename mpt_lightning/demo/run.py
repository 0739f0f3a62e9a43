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

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from mpt_lightning.callbacks import draw_similarity
from mpt_lightning.checkpoint import read_checkpoint
from mpt_lightning.compare.formats import rich_table
from mpt_lightning.compare.picture import COLOURS
from mpt_lightning.compare.plan import AVERAGE
from mpt_lightning.compare.pool import WorkerPool, progress_bar
from mpt_lightning.compare.results import Result
from mpt_lightning.compare.scores import summarize, tabulate_runs
from mpt_lightning.compare.statistics import compare_with_control
from mpt_lightning.compare.tables import IQM, interval_text, score_table
from mpt_lightning.demo.methods import FEW_SHOT, IN_CONTEXT, METHODS, TARGETS, Method, run, run_stages
from mpt_lightning.errors import MPTError

SHOTS = (4, 16, 32)
CONTEXT_SHOTS = 2
CONTROL = "prompt_tuning"
COLUMNS = ("method", "task", "k", "seed", "metric", "value", "trained_parameters", "seconds")


def run_demo(output: Path, seeds: int = 3) -> None:
    """Run the methods on the embedded tasks; print tables and write results.json, demo.png and the checkpoints."""
    if seeds < 1:
        raise MPTError(f"--seeds must be at least 1, got {seeds}.")
    output.mkdir(parents=True, exist_ok=True)
    console, start, cores = Console(), time.perf_counter(), min(os.cpu_count() or 1, 8)

    def runs(methods: Iterable[str], shots: Iterable[int], seeds: Iterable[int]) -> list[dict[str, Any]]:
        return [
            {"method": method, "tasks": [task], "k": k, "seed": seed, "output": output}
            for method, task, k, seed in product(methods, TARGETS, shots, seeds)
        ]

    early = runs([CONTROL], SHOTS, range(seeds)) + runs(IN_CONTEXT, [CONTEXT_SHOTS], range(seeds))
    late = {seed: runs(["mpt"], SHOTS, [seed]) for seed in range(seeds)}
    with progress_bar(console) as bar, WorkerPool(cores) as pool:
        progress = bar.add_task("runs", total=len(early) + seeds + sum(map(len, late.values())))

        def submit(function: Callable[..., list[Result]], **arguments: Any) -> Future[list[Result]]:
            job = pool.submit(function, **arguments)
            job.add_done_callback(lambda _: bar.advance(progress))
            return job

        stages = [submit(run_stages, output=output, seed=seed) for seed in range(seeds)]
        jobs = [submit(run, **arguments) for arguments in early]
        rows = []
        for seed, stage in enumerate(stages):
            rows += stage.result()
            source = str(output / f"source-{seed}.ckpt")
            jobs += [submit(run, **arguments, source=source) for arguments in late[seed]]
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
    adapted = _tabulate(rows, FEW_SHOT)
    _draw(output / "source-0.ckpt", summarize(adapted), output / "demo.png")
    _print(console, f"T5, k rows in all; {title}", adapted)
    _print_differences(console, adapted)
    _print(console, f"Decoder-only model, k rows per class in its context; {title}", _tabulate(rows, IN_CONTEXT))
    files = f"Results: {output / 'results.json'}, picture: {output / 'demo.png'}"
    console.print(f"{environment['seconds']:.0f} seconds. {files}")


def _tabulate(rows: Iterable[Result], methods: Mapping[str, Method]) -> pd.DataFrame:
    """Return the runs of some methods, with the names for tables."""
    runs = tabulate_runs(row for row in rows if row.method in methods)
    runs["method"] = [methods[name].title for name in runs["method"]]
    runs["task"] = [task.removeprefix("demo/") for task in runs["task"]]
    return runs


def _print(console: Console, title: str, runs: pd.DataFrame) -> None:
    table = score_table(summarize(runs), ["trained_parameters", "seconds"]).drop(columns=IQM)
    table.index = pd.Index([f"k = {k}, {method}" for k, method in table.index])
    last = [name for name in table.index if name.endswith(runs["method"].iloc[-1])]
    console.print(rich_table(title, "method", table, sections=last[:-1]))


def _print_differences(console: Console, runs: pd.DataFrame) -> None:
    """Print the differences to prompt tuning on the same task and seed."""
    control = METHODS[CONTROL].title
    for row in compare_with_control(runs, control).reset_index().to_dict("records"):
        difference = interval_text(row["difference"], row["low"], row["high"], "+")
        counts = f"{row['wins']} wins, {row['ties']} ties, {row['losses']} losses"
        line = f"k = {row['k']}, {row['method']} minus {control}: {difference}; {counts} over tasks and seeds"
        console.print(line, markup=False, highlight=False)


def _draw(source: Path, summary: pd.DataFrame, path: Path) -> None:
    """Draw how similar the source tasks' prompts are, and the few-shot scores by task; save them as PNG."""
    figure = Figure(figsize=(14, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.8))
    draw_similarity(left, read_checkpoint(str(source)).prompt())
    left.set_title("Source tasks: cosine similarity of their prompts")
    _draw_bars(right, summary)
    figure.savefig(path, dpi=100)


def _draw_bars(axes: Axes, summary: pd.DataFrame) -> None:
    """Draw a group of bars for each task and their average: a colour for each method, darker with more rows."""
    tasks, shots = list(summary.index.unique("task")), list(summary.index.unique("k"))
    methods = list(summary.index.unique("method"))
    places, width = np.arange(len(tasks)), 0.85 / (len(methods) * len(shots))
    for number, (method, k) in enumerate(product(methods, shots)):
        cell = 100 * summary.xs((k, method), level=("k", "method"))[["mean", "standard_deviation", "low", "high"]]
        errors = np.tile(cell["standard_deviation"].fillna(0), (2, 1))
        average = cell.loc[AVERAGE]
        errors[:, -1] = np.nan_to_num([average["mean"] - average["low"], average["high"] - average["mean"]])
        colour = (*COLOURS[methods.index(method)], (1 + shots.index(k)) / len(shots))
        aside = (number - (len(methods) * len(shots) - 1) / 2) * width
        label = f"{method}, k = {k}"
        axes.bar(places + aside, cell["mean"], width, yerr=errors, color=colour, label=label, ecolor="0.25", capsize=2)
    axes.set_xticks(places, tasks)
    axes.set_ylim(0, 105)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(ncols=len(methods), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06))
    axes.set(ylabel="test score (%)", title="Held-out tasks: mean and s.d. over seeds; average with its 95% interval")
