"""Means, intervals and tests equal scipy called directly, values computed by hand, and all resamples enumerated."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mpt_lightning.compare.statistics import (
    compare_with_control,
    holm,
    interval,
    pair,
    resampled_means,
    resampled_trimmed_means,
    summarize_scores,
)

NAN = float("nan")


def table(values: dict[str, Any], k: str = "16") -> pd.DataFrame:
    """Return runs from the values [task][seed] of each method."""
    rows = [
        {"method": method, "task": f"task {task}", "k": k, "seed": seed, "value": value}
        for method, tasks in values.items()
        for task, seeds in enumerate(tasks)
        for seed, value in enumerate(seeds)
    ]
    return pd.DataFrame(rows)


def shifted(differences: list[float]) -> dict[str, Any]:
    """Return a control and a method `other` of one seed, with these differences on the tasks."""
    return {"control": [[0.5]] * len(differences), "other": [[0.5 + difference] for difference in differences]}


def test_means_equal_those_of_scipy() -> None:
    values = np.random.default_rng(0).random((5, 3))
    row = summarize_scores(table({"a": values})).loc["16", "a"]
    assert row["mean"] == pytest.approx(values.mean())
    assert row["iqm"] == pytest.approx(stats.trim_mean(values, 0.25, axis=None))
    assert row["low"] < row["mean"] < row["high"]
    assert row["iqm_low"] < row["iqm"] < row["iqm_high"]


def enumerate_resamples(values: list[list[float]]) -> list[tuple[float, list[list[float]]]]:
    """Return the probability of every resample, and its draws by task."""
    found = []
    for tasks in product(values, repeat=len(values)):
        draws = [list(product(seeds, repeat=len(seeds))) for seeds in tasks]
        chance = 1 / len(values) ** len(values) / np.prod([len(draw) for draw in draws])
        found += [(chance, [list(seeds) for seeds in resample]) for resample in product(*draws)]
    return found


def trimmed(resample: list[list[float]]) -> float:
    return float(stats.trim_mean([value for seeds in resample for value in seeds], 0.25))


def mean_of_means(resample: list[list[float]]) -> float:
    return float(np.mean([np.mean(seeds) for seeds in resample]))


@pytest.mark.parametrize("values", [[[0.1, 0.2], [0.4, 0.8]], [[0.1, 0.2], [0.4]], [[0.1, 0.5, 0.3]], [[0.1], [0.7]]])
@pytest.mark.parametrize(("draw", "exact"), [(resampled_means, mean_of_means), (resampled_trimmed_means, trimmed)])
def test_resamples_are_those_of_all_possible_ones(
    values: list[list[float]], draw: Callable[..., Any], exact: Callable[..., float]
) -> None:
    seeds = max(map(len, values))
    drawn = draw(np.array([row + [NAN] * (seeds - len(row)) for row in values]))
    chances: dict[float, float] = {}
    for chance, resample in enumerate_resamples(values):
        value = round(exact(resample), 9)
        chances[value] = chances.get(value, 0) + chance
    assert set(drawn.round(9)) == set(chances)
    for value, chance in chances.items():
        assert np.mean(drawn.round(9) == value) == pytest.approx(chance, abs=0.015)


def test_intervals_are_percentiles_of_the_resamples() -> None:
    values = np.random.default_rng(1).random((4, 5))
    row = summarize_scores(table({"a": values})).loc["16", "a"]
    assert [row["low"], row["high"]] == list(np.percentile(resampled_means(values), [2.5, 97.5]))
    assert [row["iqm_low"], row["iqm_high"]] == list(np.percentile(resampled_trimmed_means(values), [2.5, 97.5]))


def test_methods_have_the_same_resamples() -> None:
    one, other = np.random.default_rng(2).random((2, 4, 3))
    assert resampled_means(one) - resampled_means(other) == pytest.approx(resampled_means(one - other))


def test_intervals_cover_the_true_difference() -> None:
    """The true difference is in 95% of intervals with many tasks, and in less of them with four."""

    def coverage(tasks: int) -> float:
        random = np.random.default_rng(tasks)
        found = []
        for _ in range(300):
            differences = 0.02 + random.normal(0, 0.05, (tasks, 1)) + random.normal(0, 0.05, (tasks, 3))
            low, high = interval(resampled_means(differences))
            found.append(low <= 0.02 <= high)
        return float(np.mean(found))

    assert coverage(20) == pytest.approx(0.95, abs=0.03)
    assert 0.75 < coverage(4) < 0.92


def test_a_missing_run_is_left_out() -> None:
    scores = summarize_scores(table({"a": [[0.2, NAN, 0.4], [0.5, 0.6, 0.7]], "b": [[NAN] * 3, [0.5] * 3]}))
    assert scores.loc[("16", "a"), "mean"] == pytest.approx((0.3 + 0.6) / 2)
    assert scores.loc[("16", "a"), "iqm"] == pytest.approx((0.4 + 0.5 + 0.6) / 3)
    assert scores.loc[("16", "b")].isna().all()


def test_differences_are_paired_by_task_and_seed() -> None:
    values = {"control": [[0.5, 0.6, NAN], [0.7, 0.7, 0.7]], "other": [[0.6, 0.6, 0.9], [0.5, NAN, 0.8]]}
    row = compare_with_control(table(values), "control").loc["16", "other"]
    assert row["difference"] == pytest.approx(((0.1 + 0) / 2 + (-0.2 + 0.1) / 2) / 2)
    assert (row["wins"], row["ties"], row["losses"], row["tasks"]) == (2, 1, 1, 2)


@pytest.mark.parametrize("single", ["control", "other"])
def test_a_fixed_method_is_compared_with_each_seed(single: str) -> None:
    values = {"control": [[0.5, 0.6], [0.7, 0.2]], "other": [[0.6, 0.6], [0.5, 0.3]]}
    values[single] = [[0.55], [0.4]]
    row = compare_with_control(table(values), "control", fixed=[single]).loc["16", "other"]
    repeated = {**values, single: [[0.55, 0.55], [0.4, 0.4]]}
    assert row.equals(compare_with_control(table(repeated), "control").loc["16", "other"])
    assert row["wins"] + row["losses"] == 4


@pytest.mark.parametrize("single", ["control", "other"])
def test_a_random_method_with_one_seed_has_pairs_of_that_seed(single: str) -> None:
    """Another seed draws other rows."""
    values = {"control": [[0.5, 0.6], [0.7, 0.2]], "other": [[0.6, 0.6], [0.5, 0.3]]}
    values[single] = [seeds[:1] for seeds in values[single]]
    row = compare_with_control(table(values), "control").loc["16", "other"]
    assert row["difference"] == pytest.approx((0.1 - 0.2) / 2)
    assert (row["wins"], row["losses"]) == (1, 1)


def test_two_methods_with_one_seed_each_are_one_pair_per_task() -> None:
    one = pd.DataFrame({7: [0.5, 0.6]}, index=["x", "y"])
    other = pd.DataFrame({0: [0.4, 0.9]}, index=["x", "y"])
    assert pair(one, other, fixed=True).to_numpy() == pytest.approx(np.array([[0.1], [-0.3]]))
    assert pair(one, other, fixed=False).empty


@pytest.mark.parametrize(
    "differences",
    [
        [0.1, 0.2, -0.05, 0.3, 0.15, 0.02, 0.4],
        [0.1, 0.1, 0.1, -0.1, 0.2, 0.3, 0.3],  # equal sizes
        [0.1, 0.0, 0.2, 0.3, -0.05, 0.0, 0.4],  # zeros
    ],
)
def test_p_is_that_of_scipy(differences: list[float]) -> None:
    row = compare_with_control(table(shifted(differences)), "control").loc["16", "other"]
    assert row["p"] == row["p_holm"] == pytest.approx(stats.wilcoxon(differences).pvalue)
    assert row["least_p"] == pytest.approx(2 / 2 ** np.count_nonzero(differences))


def test_holm_equals_values_computed_by_hand() -> None:
    assert holm(np.array([0.04, NAN, 0.01, 0.03])) == pytest.approx([0.06, NAN, 0.03, 0.06], nan_ok=True)
    assert holm(np.array([0.5, 0.9])) == pytest.approx([1, 1])
    assert holm(np.array([NAN])) == pytest.approx([NAN], nan_ok=True)


def test_the_correction_is_over_the_methods_at_one_k() -> None:
    differences = np.arange(1, 9) / 100
    values = {"control": [[0.5]] * 8, **{name: [[0.5 + d] for d in differences] for name in "abc"}}
    few, many = table({name: values[name] for name in ("control", "a")}, "16"), table(values, "32")
    found = compare_with_control(pd.concat([few, many]), "control")
    assert found.loc[("16", "a"), ["p", "p_holm"]].tolist() == pytest.approx([2 / 256, 2 / 256])
    assert found.loc["32"]["p_holm"].tolist() == pytest.approx([6 / 256] * 3)
    assert set(found["verdict"]) == {"higher"}


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.1, 0.2, 0.3, 0.4], "not enough tasks to tell"),  # the smallest p is .125
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "higher"),
        ([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6], "lower"),
        ([0.1, -0.2, 0.3, -0.4, 0.5, -0.6], "no difference found"),
        ([-0.01 * n for n in range(1, 12)] + [9.0], "mixed"),  # a higher mean, but lower on eleven tasks
        ([0.0] * 8, "equal"),
        ([0.1, 0.2, 0.3, 0.4, 0.0, 0.0, 1e-9], "not enough tasks to tell"),  # four differ
        ([NAN] * 8, "no pairs"),
    ],
)
def test_verdicts(differences: list[float], verdict: str) -> None:
    assert compare_with_control(table(shifted(differences)), "control").loc[("16", "other"), "verdict"] == verdict


def test_many_methods_need_more_tasks() -> None:
    values = {"control": [[0.5]] * 6, **{name: [[0.6]] * 6 for name in "ab"}}
    found = compare_with_control(table(values), "control")
    assert found["least_p_holm"].tolist() == pytest.approx([4 / 64] * 2)
    assert set(found["verdict"]) == {"not enough tasks to tell"}


def test_a_single_task_is_resampled_by_seeds() -> None:
    values = {"control": [[0.5, 0.6, 0.7]], "other": [[0.6, 0.8, 1.0]]}
    row = compare_with_control(table(values), "control").loc["16", "other"]
    assert (row["low"], row["high"]) == pytest.approx((0.1, 0.3))
    assert row["verdict"] == "not enough tasks to tell"
    single = summarize_scores(table({"hard": [[0.5]]})).loc["16", "hard"]
    assert single["mean"] == single["iqm"] == 0.5
    assert single[["low", "high", "iqm_low", "iqm_high"]].isna().all()


def test_a_k_without_the_control_is_left_out() -> None:
    values = shifted([0.1, 0.2])
    missing = table({"control": [[NAN]] * 2, "other": [[0.5]] * 2}, "32")
    without = table({"other": [[0.5]] * 2}, "full")
    found = compare_with_control(pd.concat([table(values), missing, without]), "control")
    assert list(found.index) == [("16", "other")]
    assert compare_with_control(without, "control").empty
