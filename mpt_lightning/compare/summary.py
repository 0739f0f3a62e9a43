"""Scores over seeds and costs of methods, as tables."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import pandas as pd
from rich.table import Table

from mpt_lightning.compare.plan import k_name
from mpt_lightning.compare.results import Result

# The name of the mean over tasks, where others have a task's.
AVERAGE = "average"


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


def summarize(results: Iterable[Result]) -> pd.DataFrame:
    """Summarise scores and costs over seeds.

    Args:
        results: One result per run; a run that is missing has neither a value nor an error.

    Returns:
        A row for each k ("16", "full"), method and task, and for the average over tasks: `mean` and
        `standard_deviation` (n - 1) of the score, `seeds_done`, `seeds_expected` and `seeds_failed`, and the method's
        `COSTS` at this k. What is unknown is NaN.
    """
    runs = pd.DataFrame([{**vars(result), "k": k_name(result.k)} for result in results])
    runs["failed"] = runs["error"].notna()
    numbers = runs[["value", *COSTS]].astype(float)
    runs[numbers.columns] = numbers.where(numbers["value"].notna(), axis="index")
    seeds = runs.groupby(["k", "method", "seed"], sort=False)
    # A seed without a result in one task has no average: the other tasks may be easier or harder.
    averages = seeds.agg(value=("value", lambda values: values.mean(skipna=False)), failed=("failed", "any"))
    scores = pd.concat([runs, averages.reset_index().assign(task=AVERAGE)]).groupby(["k", "method", "task"], sort=False)
    summary = scores.agg(
        mean=("value", "mean"), standard_deviation=("value", "std"), seeds_done=("value", "count"),
        seeds_expected=("value", "size"), seeds_failed=("failed", "sum"),
    )  # fmt: skip
    costs = runs.groupby(["k", "method"]).agg({name: cost.over_runs for name, cost in COSTS.items()})
    order = product(runs["k"].unique(), runs["method"].unique(), [*runs["task"].unique(), AVERAGE])
    return summary.join(costs).loc[[row for row in order if row in summary.index]]


def score_text(score: Any) -> str:
    """Return a row of `summarize` as "mean ± deviation", times 100, or why it is missing."""
    if math.isnan(score["mean"]):
        return "failed" if score["seeds_failed"] else "missing"
    deviation = score["standard_deviation"]
    text = f"{100 * score['mean']:.1f}" + ("" if math.isnan(deviation) else f" ± {100 * deviation:.1f}")
    done, expected = int(score["seeds_done"]), int(score["seeds_expected"])
    return text if done == expected else f"{text} ({done}/{expected})"


def score_table(summary: pd.DataFrame, costs: Sequence[str]) -> pd.DataFrame:
    """Return the strings of a table: a row for each k and method, a column for each task, the average and the costs."""
    averages = summary.xs(AVERAGE, level="task")
    table = summary.apply(score_text, axis="columns").unstack("task", sort=False)
    return table.assign(**{COSTS[name].title: averages[name].map(COSTS[name].text) for name in costs})


def rich_table(title: str, corner: str, strings: pd.DataFrame, sections: Collection[str] = ()) -> Table:
    """Return a table for the terminal, with lines below the rows named in `sections`."""
    table = Table(title=title)
    for place, column in enumerate([corner, *strings.columns]):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    for name, row in strings.iterrows():
        table.add_row(str(name), *row, end_section=name in sections)
    return table


def k_title(k: int | None) -> str:
    """Return a k as it stands in titles."""
    return "full data" if k is None else f"k = {k}"
