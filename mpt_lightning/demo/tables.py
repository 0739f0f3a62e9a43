"""The demo's tables: mean and standard deviation over seeds."""

import statistics
from collections.abc import Sequence

from rich.table import Table

from mpt_lightning.demo.jobs import Row

NAMES = {
    "prompt_tuning": "prompt tuning",
    "mpt": "MPT",
    "icl": "in-context learning",
    "context_prompt_tuning": "prompt tuning",
    "instruction_prompt_tuning": "instruction prompt tuning",
    "cpt": "CPT",
}


def results_table(title: str, rows: Sequence[Row], columns: Sequence[tuple[str, int]]) -> Table:
    """Make a table of test scores by task, and of what they cost.

    Args:
        title: what the table is about.
        rows: the results.
        columns: the methods and their k, in order.
    """
    table = Table(title=title)
    table.add_column("task")
    for method, k in columns:
        table.add_column(f"{NAMES[method]}\nk = {k}", justify="right")
    tasks = list(dict.fromkeys(row.task for row in rows if (row.method, row.k) in columns))
    for task in tasks:
        table.add_row(task, *(_score(rows, *column, [task]) for column in columns))
    table.add_section()
    table.add_row("average", *(_score(rows, *column, tasks) for column in columns))
    table.add_section()

    def mean(method: str, k: int, field: str) -> float:
        return statistics.fmean(getattr(row, field) for row in rows if (row.method, row.k) == (method, k))

    table.add_row("trained parameters", *(f"{mean(*column, 'trained_parameters'):,.0f}" for column in columns))
    table.add_row("seconds per run", *(f"{mean(*column, 'seconds'):.1f}" for column in columns))
    return table


def _score(rows: Sequence[Row], method: str, k: int, tasks: Sequence[str]) -> str:
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        if (row.method, row.k) == (method, k) and row.task in tasks:
            by_seed.setdefault(row.seed, []).append(row.value)
    means = [100 * statistics.fmean(values) for values in by_seed.values()]
    return f"{statistics.fmean(means):.1f} ± {statistics.pstdev(means):.1f}"
