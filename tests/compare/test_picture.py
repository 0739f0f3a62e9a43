"""Pictures show the numbers of their tables, and their names do not overlap."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from mpt_lightning.compare.labels import SIZE, spread
from mpt_lightning.compare.picture import draw_differences, draw_parameters, draw_shots, save

SHOTS = [32, 16, None]
NAMES = ["16", "32", "full"]


def scores(methods: int) -> pd.DataFrame:
    """Return averages of `summarize`; all methods have nearly the same scores."""
    random = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([NAMES, [f"method_{n}" for n in range(methods)], ["average"]])
    table = pd.DataFrame(
        {"mean": 0.6 + random.normal(0, 0.01, len(index))}, index=index.set_names(["k", "method", "task"])
    )
    parameters = np.tile([0, 2048, 50_000, 1_000_000], len(index))[: len(index)]
    return table.assign(low=table["mean"] - 0.02, high=table["mean"] + 0.03, trained_parameters=parameters)


@pytest.mark.parametrize(("draw", "panels"), [(draw_shots, 1), (draw_parameters, 3)])
@pytest.mark.parametrize("methods", [1, 4, 20])
def test_names_do_not_overlap(draw: Callable[..., Figure], panels: int, methods: int) -> None:
    figure = draw(scores(methods), SHOTS, "test/average")
    assert len(figure.axes) == panels
    for axes in figure.axes:
        assert {text.get_text() for text in axes.texts} == {f"method_{number}" for number in range(methods)}
        places = axes.transData.transform([(1, text.xyann[1]) for text in axes.texts])[:, 1]
        assert (np.diff(sorted(places)) > SIZE / 72 * figure.dpi).all()
        assert axes.bbox.y0 < places.min() <= places.max() < axes.bbox.y1


def test_curves_show_the_means_and_intervals_at_their_k() -> None:
    table = scores(20)
    (axes,) = draw_shots(table, SHOTS, "test/average").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["k = 16", "k = 32", "full data"]
    for number, bar in enumerate(axes.containers):
        line, _, (errors,) = bar
        rows = 100 * table.xs(f"method_{number}", level="method").droplevel("task")[["mean", "low", "high"]]
        assert line.get_ydata() == pytest.approx(rows["mean"].to_numpy())
        assert [part[:, 1].tolist() for part in errors.get_segments()] == [
            pytest.approx(pair) for pair in rows[["low", "high"]].to_numpy().tolist()
        ]
        assert np.abs(line.get_xdata() - np.arange(3)).max() < 0.3


def test_a_line_ends_at_its_last_k() -> None:
    table = scores(2).drop(("full", "method_0", "average"))
    (axes,) = draw_shots(table, SHOTS, "test/average").axes
    ends = {text.get_text(): text.xy[0] for text in axes.texts}
    assert round(ends["method_0"]) == 1
    assert round(ends["method_1"]) == 2


def test_differences_have_a_panel_for_each_k() -> None:
    rows = {
        ("16", "a"): (0.1, 0.05, 0.2, 0.01), ("16", "b"): (-0.1, -0.3, 0.1, 0.5),
        ("32", "a"): (0.2, 0.1, 0.3, 0.06), ("32", "b"): (0.0, -0.1, 0.1, 1.0),
    }  # fmt: skip
    index = pd.MultiIndex.from_tuples(rows, names=["k", "method"])
    table = pd.DataFrame(list(rows.values()), index=index, columns=["difference", "low", "high", "p_holm"])
    panels = draw_differences(table, SHOTS, "lora", "test/average").axes
    assert [axes.get_title() for axes in panels] == ["k = 16", "k = 32"]  # none for the full data
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["b", "a"]
    interval, mark = panels[0].lines[2:4]
    assert [*interval.get_xdata(), *mark.get_xdata()] == pytest.approx([5, 20, 10])
    filled = [
        line.get_markerfacecolor() != "white" for axes in panels for line in axes.lines if line.get_marker() == "o"
    ]
    assert filled == [False, True, False, False]


def test_parameters_are_those_of_the_table() -> None:
    table = scores(4)
    panel = draw_parameters(table, SHOTS, "test/average").axes[1]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in panel.lines]
    rows = table.xs("32", level="k")
    assert points == [pytest.approx(row) for row in zip(rows["trained_parameters"], 100 * rows["mean"], strict=True)]


def test_the_same_numbers_are_the_same_files(tmp_path: Path) -> None:
    def content(folder: str) -> dict[str, bytes]:
        (tmp_path / folder).mkdir()
        figure = Figure(figsize=(1, 1))
        figure.text(0.5, 0.5, "lora")
        return {file.name: file.read_bytes() for file in save(figure, tmp_path / folder / "report")}

    first = content("a")
    assert set(first) == {"report.png", "report.svg", "report.pdf"}
    assert first == content("b")


def test_labels_are_spread_as_little_as_possible() -> None:
    assert spread([3.0, 1.0], 0.5, 0, 4) == pytest.approx([3, 1])
    assert spread([2.0, 2.0, 2.2], 1, 0, 10) == pytest.approx([2.0667 - 1, 2.0667, 2.0667 + 1], abs=1e-3)
    assert spread([9.9, 9.8], 1, 0, 10) == pytest.approx([10, 9])
    assert spread([0.0, 0.0, 0.0], 1, 0, 1) == pytest.approx([0, 1, 2])  # no room
