"""The picture of a comparison: score against trained parameters, and few-shot curves."""

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from mpt_lightning.compare.report import Report

MARKS = "osD^vP*X"


def draw(report: "Report", path: Path) -> None:
    """Draw and save; scores that are not there have no point.

    Args:
        report: the report.
        path: the PNG file.
    """
    from mpt_lightning.compare.results import AVERAGE, title

    figure = Figure(figsize=(14, 6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    shots = sorted(report.shots, key=lambda k: float("inf") if k is None else k)
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    for number, method in enumerate(report.comparison.methods):
        colour = colours[number % len(colours)]
        lines = {
            line.k: line for line in report.lines if line.method == method and line.scores[AVERAGE].mean is not None
        }
        there = [k for k in shots if k in lines]
        means = [100 * float(lines[k].scores[AVERAGE].mean or 0) for k in there]
        spread = [100 * (lines[k].scores[AVERAGE].deviation or 0) for k in there]
        for k, value in zip(there, means, strict=True):
            mark = MARKS[shots.index(k) % len(MARKS)]
            left.plot(lines[k].trained_parameters or 0, value, mark, color=colour, markersize=7)
        # Beside each other, since twenty error bars at one place cannot be read.
        aside = 0.4 * (number / max(1, len(report.comparison.methods) - 1) - 0.5)
        places = [shots.index(k) + aside for k in there]
        style = "o-" if number < len(colours) else "s--"
        right.errorbar(places, means, spread, fmt=style, color=colour, capsize=2, lw=1.2, ms=4, label=method)
    for place, k in enumerate(shots):
        left.plot([], [], MARKS[place % len(MARKS)], color="gray", label=title(k))
    left.set_xscale("symlog", linthresh=100)
    left.set_xlim(-10, 3 * max([line.trained_parameters or 0 for line in report.lines] + [100]))
    left.set_xlabel("trained parameters")
    left.set_ylabel(f"test/{report.comparison.metric}, times 100, mean over tasks and seeds")
    left.legend(loc="lower right")
    left.grid(alpha=0.3)
    right.set_xticks(range(len(shots)), [title(k) for k in shots])
    right.set_xlabel("training rows")
    right.grid(alpha=0.3)
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=130)
