"""Scores over seeds and costs of methods, as tables in the terminal, CSV and Markdown."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from rich.console import Console
from rich.table import Table

from mpt_lightning.compare.picture import draw
from mpt_lightning.compare.plan import AVERAGE, Comparison, k_name, k_title
from mpt_lightning.compare.results import Result, Store

CAPTION = (
    "Mean ± standard deviation (n - 1) over seeds, times 100. `average`: of each seed's mean over tasks. (2/3): two of "
    "three seeds have a result; the others are not in the mean. Time per step and peak memory are medians over runs; a "
    "peak is what the run's process took beyond what it had before, in training and in evaluation."
)


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
    numbers = ["value", *COSTS]
    runs[numbers] = runs[numbers].astype(float)
    runs.loc[runs["value"].isna(), list(COSTS)] = math.nan
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


class Report:
    """The results of a comparison, whether or not all runs are done; see `summarize` for its `scores`."""

    def __init__(self, comparison: Comparison, store: Store) -> None:
        self.comparison = comparison
        self.results = [(run, store.read(run)) for run in comparison.runs()]
        self.prepared = [(run, store.read(run)) for run in comparison.prepared_runs()]
        self.scores = summarize(result for _, result in self.results)
        self.shots = list(dict.fromkeys(run.k for run, _ in self.results))
        self.failures = [(run, result.error) for run, result in [*self.prepared, *self.results] if result.error]

    @property
    def progress(self) -> str:
        """How many runs are done, failed and missing, in one line."""
        counts = Counter(result.status for _, result in self.results)
        seconds = [f"{run.name} in {done.seconds:.0f} s" for run, done in self.prepared if done.status == "done"]
        parts = [f"{counts['done']} of {len(self.results)} runs done"]
        parts += [f"{len(self.failures)} failed"] if self.failures else []
        parts += [f"{counts['missing']} missing"] if counts["missing"] else []
        parts += [f"prepared: {', '.join(seconds)}"] if seconds else []
        return "; ".join(parts) + "."

    def table(self, k: int | None) -> pd.DataFrame:
        """Return the table of one k as strings: methods by tasks, average and costs."""
        costs = [name for name in COSTS if name != "seconds"]
        return score_table(self.scores, costs).loc[k_name(k)]

    def print(self, console: Console) -> None:
        """Print the tables."""
        for k in self.shots:
            title = f"{self.comparison.name}: test/{self.comparison.metric}, {k_title(k)}"
            console.print(rich_table(title, "method", self.table(k)))
        console.print(CAPTION, markup=False, highlight=False)
        for run, error in self.failures:
            console.print(f"failed: {run.place}: {error}", markup=False, highlight=False)
        console.print(self.progress, highlight=False)

    def write(self, output: Path) -> list[Path]:
        """Write report.csv, report.md and report.png, and return their paths."""
        files = [output / f"report.{kind}" for kind in ("csv", "md", "png")]
        self.scores.drop(columns="seconds").reorder_levels(["method", "k", "task"]).to_csv(files[0])
        files[1].write_text(self.markdown(), encoding="utf-8")
        draw(self.scores, self.shots, f"test/{self.comparison.metric}", files[2])
        return files

    def markdown(self) -> str:
        """Return the report as Markdown."""
        parts = [f"# {self.comparison.name}: test/{self.comparison.metric}", CAPTION]
        for k in self.shots:
            table = self.table(k).reset_index(names="method")
            rows = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.to_numpy()]
            parts += [f"## {k_title(k)}", "\n".join(f"| {' | '.join(row)} |" for row in rows)]
        if self.failures:
            parts += ["## Failed runs", "\n".join(f"- {run.place}: {error}" for run, error in self.failures)]
        return "\n\n".join([*parts, self.progress]) + "\n"
