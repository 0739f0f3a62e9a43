"""The demo's picture: how alike the source tasks' prompts are, and the few-shot curves."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mpt_lightning.callbacks import draw_similarity
from mpt_lightning.checkpoint import read_checkpoint

COLOURS = {"prompt_tuning": "tab:gray", "mpt": "tab:blue"}
NAMES = {"prompt_tuning": "prompt tuning from scratch", "mpt": "MPT"}


def draw(source: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw and save.

    Args:
        source: checkpoint of the source run.
        rows: the demo's results.
        path: the PNG file.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_similarity(left, read_checkpoint(source).prompt())
    left.set_title("Source tasks: cosine similarity of their prompts")
    few = [row for row in rows if row["method"] in COLOURS]
    shots = sorted({row["k"] for row in few})
    for method, colour in COLOURS.items():
        for task in sorted({row["task"] for row in few}):
            right.plot(shots, [mean(few, method, k, task) for k in shots], color=colour, alpha=0.3)
        right.plot(shots, [mean(few, method, k) for k in shots], "o-", color=colour, lw=2.5, label=NAMES[method])
    right.set_xticks(shots)
    right.set_xlabel("k, training rows of the target task")
    right.set_ylabel("test score")
    right.set_title("Held-out tasks (thin) and their mean (thick)")
    right.legend()
    figure.savefig(path, dpi=150)


def mean(rows: Sequence[dict[str, Any]], method: str, k: int, task: str | None = None) -> float:
    """Give the mean score of a method over seeds, and over tasks unless one is named."""
    return statistics.fmean(
        row["value"] for row in rows if row["method"] == method and row["k"] == k and task in (None, row["task"])
    )
