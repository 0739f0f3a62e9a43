"""Scores and costs of methods: their summary over seeds and tasks, and the zero-shot methods in it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Literal

import pandas as pd

from mpt_lightning.compare.plan import AVERAGE, k_name
from mpt_lightning.compare.results import Result
from mpt_lightning.compare.statistics import summarize_scores

ZERO = k_name(0)


@dataclass(frozen=True)
class Cost:
    """How a cost is summarised and printed: over runs, times a factor, with some decimals."""

    title: str
    over_runs: Literal["mean", "median"]
    factor: float = 1
    decimals: int = 0

    def text(self, value: float) -> str:
        """Return the value in the unit of the title; an empty string for NaN."""
        return "" if math.isnan(value) else f"{value * self.factor:,.{self.decimals}f}"


# By the attributes of `Outcome`.
COSTS = {
    "trained_parameters": Cost("trained parameters", "mean"),
    "checkpoint_bytes": Cost("checkpoint KiB", "mean", 2**-10),
    "seconds_per_step": Cost("ms per step", "median", 1000, decimals=1),
    "peak_memory_bytes": Cost("peak MiB", "median", 2**-20),
    "seconds": Cost("seconds per run", "mean", decimals=1),
}


def tabulate_runs(results: Iterable[Result]) -> pd.DataFrame:
    """Return a row for each run, as in `mpt_lightning.compare.statistics`, with its costs and whether it `failed`.

    Args:
        results: One result per run; a run that is missing has neither a value nor an error.
    """
    runs = pd.DataFrame([{**vars(result), "k": k_name(result.k)} for result in results])
    numbers = ["value", *COSTS]
    runs[numbers] = runs[numbers].astype(float)
    runs.loc[runs["value"].isna(), list(COSTS)] = math.nan
    runs["failed"] = runs["error"].notna()
    return runs[["method", "task", "k", "seed", "failed", *numbers]]


def summarize(runs: pd.DataFrame) -> pd.DataFrame:
    """Summarise scores and costs over runs.

    Args:
        runs: See `tabulate_runs`.

    Returns:
        A row for each k ("16", "full"), method and task, and for the average over tasks: `mean` and
        `standard_deviation` (n - 1) of the score over seeds, `runs_done`, `runs_expected` and `runs_failed`, and the
        method's `COSTS` at this k. The average also has the columns of `summarize_scores`, and its deviation is that of
        the seeds' means over tasks. What is unknown is NaN.
    """
    counts = {"runs_done": ("value", "count"), "runs_expected": ("value", "size"), "runs_failed": ("failed", "sum")}
    tasks = runs.groupby(["k", "method", "task"], sort=False).agg(
        mean=("value", "mean"), standard_deviation=("value", "std"), **counts
    )
    cells = runs.groupby(["k", "method"], sort=False)
    seeds = runs.groupby(["k", "method", "seed"], sort=False)["value"].agg(lambda values: values.mean(skipna=False))
    averages = cells.agg(**counts).join(summarize_scores(runs))
    averages["standard_deviation"] = seeds.groupby(["k", "method"]).std()
    averages = averages.assign(task=AVERAGE).set_index("task", append=True)
    costs = cells.agg({name: cost.over_runs for name, cost in COSTS.items()})
    summary = pd.concat([tasks, averages]).join(costs)
    order = product(runs["k"].unique(), runs["method"].unique(), [*runs["task"].unique(), AVERAGE])
    return summary.loc[[row for row in order if row in summary.index]]


def zero_shot(runs: pd.DataFrame) -> list[str]:
    """Return the methods that have runs at k = 0 alone, such as hard prompts."""
    shots = runs.groupby("method", sort=False)["k"].agg(set)
    return [str(method) for method in shots.index if shots[method] == {ZERO}]


def repeat_zero_shot(table: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """Return a table with the rows of the zero-shot methods at every k of the others, whose reference they are.

    Args:
        table: Rows with `k` and `method`, as columns or levels of the index.
        methods: See `zero_shot`.
    """
    levels = [] if table.index.names == [None] else list(table.index.names)
    rows = table.reset_index() if levels else table
    repeated = rows["method"].isin(methods)
    if not repeated.any() or repeated.all():
        return table
    parts = []
    for k in rows.loc[~repeated, "k"].unique():
        parts += [rows[repeated].assign(k=k), rows[~repeated & (rows["k"] == k)]]
    found = pd.concat(parts, ignore_index=True)
    return found.set_index(levels) if levels else found
