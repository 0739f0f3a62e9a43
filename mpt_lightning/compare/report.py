"""The report of a comparison, for the terminal and as CSV, Markdown and PNG."""

from pathlib import Path

import pandas as pd
from rich.console import Console

from mpt_lightning.compare.plan import Comparison, k_name
from mpt_lightning.compare.results import Outcome, Result, Store
from mpt_lightning.compare.summary import COSTS, k_title, rich_table, score_table, summarize

CAPTION = (
    "Mean ± standard deviation (n - 1) over seeds, times 100. `average`: of each seed's mean over tasks. (2/3): two of "
    "three seeds have a result; the others are not in the mean. Time per step and peak memory are medians over runs; a "
    "peak is what the run's process took beyond what it had before, in training and in evaluation."
)


class Report:
    """The results of a comparison, whether or not all runs are done.

    Args:
        comparison: The comparison.
        store: Its results.

    Attributes:
        results: The compared runs, each with its result or None.
        prepared: The prepared runs, likewise.
        scores: See `summarize`.
        shots: Every k, in the order of the runs.
        failures: The failed runs and their errors.
        missing: How many of the compared runs have no result for their current arguments.
    """

    def __init__(self, comparison: Comparison, store: Store) -> None:
        self.comparison = comparison
        self.results = [(run, store.read(run)) for run in comparison.runs()]
        self.prepared = [(run, store.read(run)) for run in comparison.prepared_runs()]
        self.scores = summarize(result or Result.of(run, Outcome()) for run, result in self.results)
        self.shots = list(dict.fromkeys(run.k for run, _ in self.results))
        self.failures = [(run, r.error) for run, r in [*self.prepared, *self.results] if r and r.error]
        self.missing = sum(result is None for _, result in self.results)

    @property
    def progress(self) -> str:
        """How many runs are done, failed and missing, in one line."""
        done = sum(result is not None and not result.error for _, result in self.results)
        seconds = [f"{run.name} in {r.seconds:.0f} s" for run, r in self.prepared if r and not r.error]
        parts = [f"{done} of {len(self.results)} runs done"]
        parts += [f"{len(self.failures)} failed"] if self.failures else []
        parts += [f"{self.missing} missing"] if self.missing else []
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
        from mpt_lightning.compare.picture import draw

        files = [output / f"report.{kind}" for kind in ("csv", "md", "png")]
        columns = self.scores.drop(columns="seconds")
        columns.reorder_levels(["method", "k", "task"]).to_csv(files[0])
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
