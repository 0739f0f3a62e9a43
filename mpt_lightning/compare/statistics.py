"""Statistics of runs: means with bootstrap intervals, and paired differences to a control with a test.

Every function takes a table with a row for each run: `method`, `task`, `k`, `seed` and `value`, NaN if it is missing.
"""

from collections.abc import Collection, Iterator
from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 10_000
# Of tests; intervals cover 1 - LEVEL.
LEVEL = 0.05
# Differences are compared to this many decimals, because metrics have single precision.
DECIMALS = 6
Floats = NDArray[np.float64]


def summarize_scores(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the mean and the interquartile mean of each method at each k, with 95% intervals.

    The mean is that over tasks of the means over seeds. The interquartile mean is that of the runs without the lowest
    and the highest quarter (Agarwal et al., 2021).

    Returns:
        By `k` and `method`: `mean`, `low`, `high`, `iqm`, `iqm_low`, `iqm_high`; NaN if a task has no value, and
        intervals also if there is a single run.
    """
    rows = {}
    for cell, grid in _grids(runs):
        values = grid.to_numpy()
        row = dict.fromkeys(("mean", "low", "high", "iqm", "iqm_low", "iqm_high"), np.nan)
        if not grid.isna().all(axis=1).any():
            row["mean"] = float(np.nanmean(values, axis=1).mean())
            row["iqm"] = float(stats.trim_mean(values[~np.isnan(values)], 0.25))
            if np.count_nonzero(~np.isnan(values)) > 1:
                row["low"], row["high"] = interval(resampled_means(values))
                row["iqm_low"], row["iqm_high"] = interval(resampled_trimmed_means(values))
        rows[cell] = row
    return _table(rows)


def compare_with_control(runs: pd.DataFrame, control: str, fixed: Collection[str] = ()) -> pd.DataFrame:
    """Return the differences of each method to the control, on the same task and seed, with intervals and tests.

    A difference is the mean over tasks of the means over seeds. The test is Wilcoxon's signed-rank test of the tasks'
    differences, exact up to 50 tasks, or 13 if some are equal; Holm's correction is over the methods at one k.

    Args:
        runs: A row for each run.
        control: The method that others are compared with.
        fixed: Methods in which nothing is random, such as hard prompts: one seed is compared with all of the control.

    Returns:
        By `k` and `method`, without the control: `difference`, `low` and `high`, the `median` over tasks, the number of
        `tasks` and of those that are `differing`, `wins`, `ties` and `losses` over tasks and seeds, `p`, `p_holm`, the
        smallest p-values that so many differing tasks can have before and after the correction, `least_p` and
        `least_p_holm`, and the `verdict`. A k at which the control has no value is left out; NaN without pairs.
    """
    grids = dict(_grids(runs))
    rows = {}
    for (k, method), grid in grids.items():
        controls = grids.get((k, control))
        if method != control and controls is not None and controls.notna().any(axis=None):
            rows[k, method] = _compare(pair(grid, controls, fixed=method in fixed or control in fixed))
    table = _table(rows)
    if len(table):
        family = table.groupby("k", sort=False)["p"]
        table["p_holm"] = family.transform(lambda p: holm(p.to_numpy()))
        table["least_p_holm"] = (table["least_p"] * family.transform("count")).clip(upper=1)
        table["verdict"] = table.apply(_verdict, axis=1)
    return table


def pair(grid: pd.DataFrame, control: pd.DataFrame, *, fixed: bool) -> pd.DataFrame:
    """Return the differences on the same task and seed.

    Args:
        grid: Values by task (rows) and seed (columns).
        control: Those of the control.
        fixed: Whether a grid with one seed is compared with each seed of the other.
    """
    if fixed and len(control.columns) == 1:
        differences = grid.sub(control.iloc[:, 0], axis=0)
    elif fixed and len(grid.columns) == 1:
        differences = -control.sub(grid.iloc[:, 0], axis=0)
    else:
        differences = grid - control
    return differences.dropna(how="all").dropna(how="all", axis=1)


def holm(p: Floats) -> Floats:
    """Return p-values corrected for their number (Holm, 1979); NaN is not counted."""
    corrected = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected


def resampled_means(values: Floats) -> Floats:
    """Return the mean over tasks of the means over seeds `[T, S]` in each resample."""
    runs = np.count_nonzero(~np.isnan(values), axis=1, keepdims=True)
    weights = np.nan_to_num(values / runs / len(values))
    return _counts(_known(values)).reshape(RESAMPLES, -1) @ weights.ravel()


def resampled_trimmed_means(values: Floats) -> Floats:
    """Return the mean of values `[T, S]` without the lowest and the highest quarter in each resample."""
    order = np.argsort(values, axis=None)[: np.count_nonzero(~np.isnan(values))]
    counts = _counts(_known(values)).reshape(RESAMPLES, -1)[:, order]
    # A value that was drawn n times has n ranks, of which those from `cut` to `total - cut` are kept.
    last = counts.cumsum(axis=1)
    total = last[:, -1:]
    cut = total // 4
    kept = np.diff(np.clip(last, cut, total - cut), axis=1, prepend=cut)
    return kept @ values.ravel()[order] / (total - 2 * cut).ravel()


def interval(resampled: Floats) -> tuple[float, float]:
    """Return the bounds of the 95% percentile interval."""
    tail = 50 * LEVEL
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return float(low), float(high)


@lru_cache(maxsize=8)
def _counts(known: tuple[tuple[bool, ...], ...]) -> NDArray[np.float32]:
    """Return how often each resample contains each run `[RESAMPLES, T, S]`, by whether it has a value `[T, S]`.

    A resample draws as many tasks as there are, and in each draw of a task as many runs as it has, with replacement.
    The draws depend on the shape alone: methods with the same tasks and seeds have the same resamples.
    """
    available = np.array(known)
    tasks, seeds = available.shape
    runs = available.sum(axis=1)
    generator = np.random.default_rng(0)
    task = generator.integers(tasks, size=(RESAMPLES, tasks, 1))
    place = (generator.random((RESAMPLES, tasks, seeds)) * runs[task]).astype(int)
    seed = np.argsort(~available, axis=1, kind="stable")[task, place]  # the runs with a value come first
    cell = (np.arange(RESAMPLES)[:, None, None] * tasks + task) * seeds + seed
    drawn = np.arange(seeds) < runs[task]
    counts = np.bincount(cell[drawn], minlength=RESAMPLES * tasks * seeds)
    return counts.reshape(RESAMPLES, tasks, seeds).astype(np.float32)


def _known(values: Floats) -> tuple[tuple[bool, ...], ...]:
    return tuple(map(tuple, ~np.isnan(values)))


def _grids(runs: pd.DataFrame) -> Iterator[tuple[tuple[str, str], pd.DataFrame]]:
    """Yield each k and method with its values by task (rows) and seed (columns)."""
    for cell, group in runs.groupby(["k", "method"], sort=False):
        yield cell, group.pivot(index="task", columns="seed", values="value")  # type: ignore[misc]


def _table(rows: dict[tuple[str, str], dict[str, float]]) -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples(rows, names=["k", "method"])
    return pd.DataFrame(list(rows.values()), index=index)


def _compare(differences: pd.DataFrame) -> dict[str, float]:
    """Return a row of `compare_with_control` from the differences by task and seed, without the correction."""
    values = differences.to_numpy()
    signs = np.sign(values.round(DECIMALS))
    row = {
        "difference": np.nan, "low": np.nan, "high": np.nan, "median": np.nan,
        "tasks": len(differences), "differing": 0,
        "wins": np.sum(signs > 0), "ties": np.sum(signs == 0), "losses": np.sum(signs < 0),
        "p": np.nan, "least_p": np.nan,
    }  # fmt: skip
    if len(differences):
        means = differences.mean(axis=1).to_numpy()
        row["difference"] = float(means.mean())
        if np.count_nonzero(~np.isnan(values)) > 1:
            row["low"], row["high"] = interval(resampled_means(values))
        means = means.round(DECIMALS)
        row["median"] = float(np.median(means))
        # Wilcoxon's test drops zeros; here, scipy would turn to the approximation because of them.
        differing = means[means != 0]
        row["differing"] = len(differing)
        row["p"] = float(stats.wilcoxon(differing).pvalue) if len(differing) else 1.0
        row["least_p"] = min(1.0, 2 * 0.5 ** len(differing))
    return row


def _verdict(row: pd.Series) -> str:
    """Return what a row of `compare_with_control` shows."""
    if not row["tasks"]:
        return "no pairs"
    if not row["wins"] + row["losses"]:
        return "equal"
    if row["p_holm"] < LEVEL:
        # The test is about ranks: one large difference can give the mean another sign.
        signs = np.sign([row["difference"], row["median"]])
        return {2: "higher", -2: "lower"}.get(int(signs.sum()), "mixed")
    if row["least_p_holm"] > LEVEL:
        return "not enough tasks to tell"
    return "no difference found"
