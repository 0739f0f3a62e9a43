"""Pictures of scores: against trained parameters, and few-shot curves."""

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpt_lightning.compare.plan import AVERAGE, k_name, k_title

MARKS = "osD^vP*X"
_TAB20 = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
COLOURS = (*_TAB20[::2], *_TAB20[1::2])  # ten full colours, then ten pale ones


def draw(scores: pd.DataFrame, shots: Sequence[int | None], metric: str, path: Path) -> None:
    """Draw the averages over tasks of `summarize`, and save them as PNG; unknown scores are left out."""
    figure = Figure(figsize=(14, 6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    shots = sorted(shots, key=lambda k: math.inf if k is None else k)
    colours = dict(zip(scores.index.unique("method"), cycle(COLOURS), strict=False))
    for k, mark in zip(shots, cycle(MARKS), strict=False):
        for method, score in scores.xs((k_name(k), AVERAGE), level=("k", "task")).iterrows():
            left.plot(score["trained_parameters"], 100 * score["mean"], mark, color=colours[method], markersize=7)
        left.plot([], [], mark, color="gray", label=k_title(k))
    left.set_xscale("symlog", linthresh=100)
    left.set_xlim(-10, 3 * max(100, scores["trained_parameters"].max()))
    left.set_xlabel("trained parameters")
    left.set_ylabel(f"{metric}, times 100, mean over tasks and seeds")
    left.legend(loc="lower right")
    left.grid(alpha=0.3)
    draw_curves(right, scores, shots)
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=130)


def draw_curves(axes: Axes, scores: pd.DataFrame, shots: Sequence[int | None]) -> None:
    """Draw each method's average score of `summarize` at each k, with standard deviations as error bars."""
    methods, names = scores.index.unique("method"), [k_name(k) for k in shots]
    for number, method in enumerate(methods):
        averages = scores.xs((method, AVERAGE), level=("method", "task"))
        averages = 100 * averages.reindex(names).dropna(subset="mean")
        # Side by side, since twenty error bars in one place cannot be read.
        aside = min(0.05, 0.4 / len(methods)) * (number - (len(methods) - 1) / 2)
        places = [names.index(k) + aside for k in averages.index]
        style = "o-" if number < len(COLOURS) else "s--"
        axes.errorbar(
            places, averages["mean"], averages["standard_deviation"], fmt=style,
            color=COLOURS[number % len(COLOURS)], capsize=2, lw=1.2, ms=4, label=method,
        )  # fmt: skip
    axes.set_xticks(range(len(shots)), [k_title(k) for k in shots])
    axes.set_xlabel("training rows")
    axes.grid(alpha=0.3)
