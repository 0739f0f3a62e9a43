"""What the runs came to: means and deviations over seeds, as tables, CSV, Markdown."""

import csv
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mpt_lightning.compare.plan import Comparison, Run
from mpt_lightning.compare.results import AVERAGE, Result, Store, title

COSTS = ["trained parameters", "checkpoint KiB", "ms per step", "peak MiB"]
CAPTION = (
    "Mean ± standard deviation (n - 1) over seeds, times 100. `average`: of each seed's mean over tasks. (2/3): two of "
    "three seeds have a result; the others are not in the mean. Time per step and peak memory are medians over runs; a "
    "peak is what the run's process took beyond what it had before, in training and in evaluation."
)


@dataclass
class Score:
    """A score over seeds.

    Attributes:
        mean: over the seeds that have a result; None where none has.
        deviation: the standard deviation (n - 1); None below two.
        done: seeds that have a result.
        expected: seeds.
        failed: seeds whose run failed, in one of the tasks for an average.
    """

    mean: float | None
    deviation: float | None
    done: int
    expected: int
    failed: int

    @property
    def text(self) -> str:
        """The score times 100, or why there is none."""
        if self.mean is None:
            return "failed" if self.failed else "missing"
        deviation = "" if self.deviation is None else f" ± {100 * self.deviation:.1f}"
        return f"{100 * self.mean:.1f}{deviation}" + (
            "" if self.done == self.expected else f" ({self.done}/{self.expected})"
        )


@dataclass
class Line:
    """A method at one k.

    Attributes:
        method: its name.
        k: training rows; None for the full data.
        scores: by task, and "average".
        trained_parameters: mean over runs, as are the checkpoint's bytes.
        checkpoint_bytes: see above.
        seconds_per_step: median over runs; None where nothing is trained.
        peak_memory_bytes: median over runs; None where it is not known.
    """

    method: str
    k: int | None
    scores: dict[str, Score]
    trained_parameters: float | None
    checkpoint_bytes: float | None
    seconds_per_step: float | None
    peak_memory_bytes: float | None

    @property
    def costs(self) -> list[str]:
        """The costs as texts, in the order of `COSTS`."""

        def text(value: float | None, scale: float, digits: int) -> str:
            return "" if value is None else f"{value / scale:,.{digits}f}"

        return [
            text(self.trained_parameters, 1, 0),
            text(self.checkpoint_bytes, 1024, 0),
            text(self.seconds_per_step, 1e-3, 1),
            text(self.peak_memory_bytes, 2**20, 0),
        ]


class Report:
    """The results of a comparison, as far as there are any.

    Args:
        comparison: what is compared.
        store: where the results are.
    """

    def __init__(self, comparison: Comparison, store: Store) -> None:
        self.comparison = comparison
        self.results = [(run, store.read(run)) for run in comparison.runs()]
        self.prepared = [(run, store.read(run)) for run in comparison.prepared_runs()]
        self.tasks = list(dict.fromkeys(str(run.task) for run, _ in self.results))
        self.shots = list(dict.fromkeys(run.k for run, _ in self.results))
        self.lines = list(self._lines())

    @property
    def failures(self) -> list[tuple[Run, str]]:
        """The failed runs and their errors."""
        return [(run, result.error) for run, result in [*self.prepared, *self.results] if result and result.error]

    @property
    def missing(self) -> int:
        """How many of the compared runs have not been run, or not with the arguments that they have now."""
        return sum(result is None for _, result in self.results)

    def _lines(self) -> Iterator[Line]:
        for k in self.shots:
            for method in self.comparison.methods:
                found = [(run, result) for run, result in self.results if (run.method, run.k) == (method, k)]
                if found:
                    yield summarize(method, k, self.tasks, found)

    @property
    def summary(self) -> str:
        """How much of the comparison is there, in one line."""
        done = sum(result is not None and result.status == "done" for _, result in self.results)
        parts = [f"{done} of {len(self.results)} runs done"]
        parts += [f"{len(self.failures)} failed"] if self.failures else []
        parts += [f"{self.missing} missing"] if self.missing else []
        seconds = {run.name: result.seconds for run, result in self.prepared if result and not result.error}
        parts += [f"prepared: {', '.join(f'{n} in {s:.0f} s' for n, s in seconds.items())}"] if seconds else []
        return "; ".join(parts) + "."

    def table(self, k: int | None) -> tuple[list[str], list[list[str]]]:
        """Give the head and the rows of the table of one k, as texts."""
        rows = [
            [line.method, *(line.scores[name].text for name in [*self.tasks, AVERAGE]), *line.costs]
            for line in self.lines
            if line.k == k
        ]
        return ["method", *self.tasks, AVERAGE, *COSTS], rows

    def print(self, console: Console) -> None:
        """Print the tables."""
        for k in self.shots:
            head, rows = self.table(k)
            table = Table(title=f"{self.comparison.name}: test/{self.comparison.metric}, {title(k)}")
            for place, column in enumerate(head):
                table.add_column(column, justify="right" if place else "left", overflow="fold")
            for row in rows:
                table.add_row(*row)
            console.print(table)
        console.print(CAPTION, markup=False, highlight=False)
        for run, error in self.failures:
            console.print(f"failed: {run.place}: {error}", markup=False, highlight=False)
        console.print(self.summary, highlight=False)

    def write(self, output: Path) -> list[Path]:
        """Write report.csv, report.md and report.png; give their paths."""
        from mpt_lightning.compare.picture import draw

        files = [output / f"report.{kind}" for kind in ("csv", "md", "png")]
        self.write_csv(files[0])
        files[1].write_text(self.markdown(), encoding="utf-8")
        draw(self, files[2])
        return files

    def markdown(self) -> str:
        """Give the report as Markdown."""
        parts = [f"# {self.comparison.name}: test/{self.comparison.metric}", CAPTION]
        for k in self.shots:
            head, rows = self.table(k)
            marks = ["---", *["---:"] * (len(head) - 1)]
            parts += [f"## {title(k)}", "\n".join(f"| {' | '.join(row)} |" for row in [head, marks, *rows])]
        if self.failures:
            parts += ["## Failed runs", "\n".join(f"- {run.place}: {error}" for run, error in self.failures)]
        return "\n\n".join([*parts, self.summary]) + "\n"

    def write_csv(self, path: Path) -> None:
        """Write one line per method, k and task, and one for the average over tasks; scores as they are."""
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([
                "method", "k", "task", "mean", "standard_deviation", "seeds_done", "seeds_expected", "seeds_failed",
                "trained_parameters", "checkpoint_bytes", "seconds_per_step", "peak_memory_bytes",
            ])  # fmt: skip
            for line in self.lines:
                for task, score in line.scores.items():
                    writer.writerow([
                        line.method, folder(line.k), task, score.mean, score.deviation, score.done, score.expected,
                        score.failed, line.trained_parameters, line.checkpoint_bytes, line.seconds_per_step,
                        line.peak_memory_bytes,
                    ])  # fmt: skip


def summarize(method: str, k: int | None, tasks: Sequence[str], found: Sequence[tuple[Run, Result | None]]) -> Line:
    """Summarise the runs of one method at one k.

    Args:
        method: the method's name.
        k: training rows.
        tasks: the tasks, in order.
        found: the runs, each with its result or None.
    """
    done = [result for _, result in found if result is not None and result.status == "done"]
    values: dict[int | None, dict[str | None, float]] = {run.seed: {} for run, _ in found}
    failed: dict[str, set[int | None]] = {task: set() for task in tasks}
    for run, result in found:
        if result is not None and result.value is not None:
            values[run.seed][run.task] = result.value
        elif result is not None:
            failed[str(run.task)].add(run.seed)
    scores = {
        task: score([row[task] for row in values.values() if task in row], len(values), len(failed[task]))
        for task in tasks
    }
    # A seed without a result in one task would be averaged over easier or harder tasks than the others.
    whole = [statistics.fmean(row.values()) for row in values.values() if len(row) == len(tasks)]
    scores[AVERAGE] = score(whole, len(values), len(set().union(*failed.values())))
    return Line(
        method, k, scores,
        _over(statistics.fmean, [result.trained_parameters for result in done]),
        _over(statistics.fmean, [result.checkpoint_bytes for result in done]),
        _over(statistics.median, [result.seconds_per_step for result in done]),
        _over(statistics.median, [result.peak_memory_bytes for result in done]),
    )  # fmt: skip


def score(values: Sequence[float], expected: int, failed: int) -> Score:
    """Give mean and deviation of the values that there are."""
    mean = statistics.fmean(values) if values else None
    return Score(mean, statistics.stdev(values) if len(values) > 1 else None, len(values), expected, failed)


def _over(function: Any, values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return function(there) if there else None


def folder(k: int | None) -> str:
    """Give a k's short name."""
    return "full" if k is None else str(k)
