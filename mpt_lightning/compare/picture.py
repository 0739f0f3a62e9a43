"""Pictures of a comparison: paired differences, scores by k, and scores against trained parameters."""

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from mpt_lightning.compare.labels import SIZE, Colour, label_points
from mpt_lightning.compare.plan import AVERAGE, k_name, k_title
from mpt_lightning.compare.statistics import LEVEL

Shots = Sequence[int | None]
MARKS = "osD^vP*X"
_TAB10: list[Colour] = [to_rgb(name) for name in matplotlib.colormaps["tab10"].colors]  # type: ignore[attr-defined]
# Ten colours, then the same ones darker.
COLOURS = (*_TAB10, *((0.5 * red, 0.5 * green, 0.5 * blue) for red, green, blue in _TAB10))
FORMATS = ("png", "svg", "pdf")
INTERVAL = "mean and 95% interval over tasks and seeds"


def save(figure: Figure, stem: Path) -> list[Path]:
    """Save a figure as PNG, SVG and PDF without the date, so that the same numbers are the same files."""
    files = [stem.with_suffix(f".{kind}") for kind in FORMATS]
    with matplotlib.rc_context({"svg.hashsalt": stem.name, "svg.fonttype": "none", "pdf.fonttype": 42}):
        for file in files:
            dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
            figure.savefig(file, dpi=150, bbox_inches="tight", metadata=dates.get(file.suffix))
    return files


def draw_differences(differences: pd.DataFrame, shots: Shots, control: str, metric: str) -> Figure:
    """Draw the differences of `compare_with_control` with intervals: a panel for each k, a line for each method.

    Methods are sorted by their mean over k. A filled mark has a p-value below .05 after Holm's correction.
    """
    shots = [k for k in _sorted(shots) if k_name(k) in differences.index.unique("k")]
    table = 100 * differences["difference"].unstack("k", sort=False)
    methods = table.mean(axis=1).sort_values().index
    figure = Figure(figsize=(1.5 + 2.8 * len(shots), 1.2 + 0.24 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(shots), sharex=True, sharey=True, squeeze=False)[0]
    for axes, k in zip(panels, shots, strict=True):
        rows = differences.xs(k_name(k), level="k").reindex(methods)
        values = 100 * rows[["difference", "low", "high"]].to_numpy()
        for place, (value, low, high) in enumerate(values):
            clear = rows["p_holm"].iloc[place] < LEVEL
            axes.plot([low, high], [place, place], color=COLOURS[0], lw=1.4)
            axes.plot(value, place, "o", ms=5, color=COLOURS[0], markerfacecolor=COLOURS[0] if clear else "white")
        axes.axvline(0, color="black", lw=0.8, zorder=0)
        axes.set_title(k_title(k), fontsize=SIZE + 1)
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(labelsize=SIZE)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(-0.6, len(methods) - 0.4)
    label = f"{metric}: difference to {control} in percentage points\n{INTERVAL}; filled: p < .05 (Wilcoxon, Holm)"
    figure.supxlabel(label, fontsize=SIZE + 1)
    return figure


def draw_shots(scores: pd.DataFrame, shots: Shots, metric: str) -> Figure:
    """Draw the averages of `summarize` by k."""
    figure = Figure(figsize=(max(4, 2.2 * len(shots)), max(4, 0.3 * len(scores.index.unique("method")))))
    axes = figure.subplots()
    draw_curves(axes, scores, _sorted(shots))
    axes.set_ylabel(f"{metric} (%)", fontsize=SIZE + 1)
    axes.set_title(INTERVAL, fontsize=SIZE + 1)
    return figure


def draw_curves(axes: Axes, scores: pd.DataFrame, shots: Shots) -> None:
    """Draw each method's average of `summarize` at each k with its interval, and its name at the end of its line."""
    averages = 100 * scores.xs(AVERAGE, level="task")[["mean", "low", "high"]]
    names, ends = [k_name(k) for k in shots], {}
    styles = _styles(scores)
    for number, (method, (colour, mark)) in enumerate(styles.items()):
        rows = averages.xs(method, level="method").reindex(names).dropna(subset="mean")
        if rows.empty:
            continue
        # Error bars in one place hide each other; all stay in the grey band of their k.
        aside = min(0.03 * len(styles), 0.5) * (number / max(1, len(styles) - 1) - 0.5)
        places = [names.index(k) + aside for k in rows.index]
        errors = np.abs(rows[["low", "high"]].sub(rows["mean"], axis=0).to_numpy().T)
        axes.errorbar(
            places, rows["mean"], np.nan_to_num(errors), fmt=f"{mark}-", color=colour, ms=4, lw=1, elinewidth=0.8,
            capsize=1.5,
        )  # fmt: skip
        ends[method] = (places[-1], rows["mean"].iloc[-1])
    for place in range(len(shots)):
        axes.axvspan(place - 0.3, place + 0.3, color="black", alpha=0.05, lw=0)
    axes.set_xticks(range(len(shots)), [k_title(k) for k in shots])
    axes.set_xlim(-0.35, len(shots) - 0.65)
    axes.set_xlabel("training rows")
    axes.grid(axis="y", alpha=0.3)
    label_points(axes, list(ends), list(ends.values()), [styles[method][0] for method in ends])


def draw_parameters(scores: pd.DataFrame, shots: Shots, metric: str) -> Figure:
    """Draw the averages of `summarize` against the number of trained parameters: a panel for each k."""
    shots, styles = _sorted(shots), _styles(scores)
    averages = scores.xs(AVERAGE, level="task").dropna(subset="mean")
    figure = Figure(figsize=(5, max(3, 0.22 * len(styles)) * len(shots)))
    panels = figure.subplots(len(shots), 1, sharex=True, squeeze=False)[:, 0]
    for axes, k in zip(panels, shots, strict=True):
        rows = averages[averages.index.get_level_values("k") == k_name(k)].droplevel("k")
        points = dict(zip(rows.index, zip(rows["trained_parameters"], 100 * rows["mean"], strict=True), strict=True))
        for method, point in points.items():
            colour, mark = styles[method]
            axes.plot(*point, mark, color=colour, ms=6)
        axes.set_xscale("symlog", linthresh=100, linscale=0.4)
        axes.set_xlim(-20, 3 * max(100, scores["trained_parameters"].max()))
        axes.set_ylabel(f"{metric} (%)", fontsize=SIZE + 1)
        axes.set_title(k_title(k), fontsize=SIZE + 1)
        axes.grid(alpha=0.3)
        axes.margins(y=0.1)
        label_points(axes, list(points), list(points.values()), [styles[method][0] for method in points])
    panels[-1].set_xlabel("trained parameters")
    return figure


def _styles(scores: pd.DataFrame) -> dict[str, tuple[Colour, str]]:
    """Return each method's colour and mark, the same in all pictures."""
    return {
        method: (colour, mark)
        for method, colour, mark in zip(scores.index.unique("method"), cycle(COLOURS), cycle(MARKS), strict=False)
    }


def _sorted(shots: Shots) -> list[int | None]:
    return sorted(shots, key=lambda k: math.inf if k is None else k)
