"""Names beside the points of a picture, spread so that they do not overlap."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression  # type: ignore[attr-defined]  # not in its list of names

Colour = tuple[float, float, float]
SIZE = 8  # points
# Of a line of text, as a multiple of its size.
SPACING = 1.25


def spread(places: Sequence[float], distance: float, low: float, high: float) -> NDArray[np.float64]:
    """Return the places nearest to the given ones, by squares, that are at least `distance` apart.

    They are between `low` and `high` if there is room, and else begin at `low`.
    """
    order = np.argsort(places, kind="stable")
    steps = distance * np.arange(len(order))
    # Places that are `distance` apart are increasing after these steps are subtracted.
    increasing = isotonic_regression(np.asarray(places, dtype=float)[order] - steps).x
    found = np.empty(len(order))
    found[order] = np.clip(increasing, low, max(low, high - steps[-1])) + steps
    return found


def label_points(
    axes: Axes,
    names: Sequence[str],
    points: Sequence[tuple[float, float]],
    colours: Sequence[Colour],
) -> None:
    """Write a name for each point in a column at the right of the axes, with a thin line between them.

    Call it after the limits of the axes are set.
    """
    if not names:
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    low, high = axes.get_ylim()
    pixels = axes.get_window_extent().height
    distance = (high - low) * SIZE * SPACING / 72 * figure.dpi / pixels
    places = spread([y for _, y in points], distance, low + distance / 2, high - distance / 2)
    for name, point, place, colour in zip(names, points, places, colours, strict=True):
        axes.annotate(
            name, point, xytext=(1.06, place), textcoords=axes.get_yaxis_transform(), va="center", fontsize=SIZE,
            color=colour, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.5, "relpos": (0, 0.5), "shrinkB": 3},
        )  # fmt: skip
