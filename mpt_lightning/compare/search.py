"""The search of hyperparameters: a method's trials, and the choice among their results."""

import math
import random
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import mean
from typing import Any

from mpt_lightning.errors import MPTError

Values = dict[str, Any]


def make_trials(name: str, search: Mapping[str, Any], count: int | None) -> tuple[Values, ...]:
    """Return the values of each trial, by the dotted names of arguments.

    Args:
        name: The method. It seeds the draw, so that other methods do not change it.
        search: By argument, a list of values or a range `{low: 1e-4, high: 1e-2}`, which is drawn from evenly on a
            logarithmic scale. A key of several names with commas sets all of them to the same value.
        count: Number of trials, drawn at random; None for every combination of the lists.

    Raises:
        MPTError: If values or ranges are impossible, or there are fewer combinations than trials.
    """
    for key, values in search.items():
        if not _is_range(values) and not (isinstance(values, list) and values):
            raise MPTError(
                f"`search` of {name}: got {key}: {values!r}, expected a list of values or {{low: ..., high: ...}}, "
                "both above 0."
            )
    ranges = [key for key, values in search.items() if _is_range(values)]
    if ranges and count is None:
        raise MPTError(
            f"`search` of {name} draws {', '.join(ranges)} from a range; set `trials` to the number of draws."
        )
    lists = [[(key, value) for value in values] for key, values in search.items() if key not in ranges]
    combinations = [dict(combination) for combination in product(*lists)]
    if count is not None:
        draw = random.Random(name)
        if not ranges and len(combinations) < count:
            raise MPTError(
                f"`search` of {name} has {len(combinations)} combinations, and `trials` is {count}; add values."
            )
        if not ranges:
            combinations = draw.sample(combinations, count)
        else:
            combinations = [
                {**draw.choice(combinations), **{key: _draw(draw, search[key]) for key in ranges}} for _ in range(count)
            ]
    return tuple(
        {argument.strip(): value for key, value in combination.items() for argument in key.split(",")}
        for combination in combinations
    )


def best_trial(results: Sequence[Sequence[Mapping[str, Any]]]) -> int:
    """Return the index of the trial with the highest mean `score`; of equal ones, that with the lowest mean `loss`.

    NaN is worse than every number.

    Args:
        results: Runs of the same trials, such as those on several tasks; each trial has `score` and `loss` on the rows
            that select.
    """

    def rank(index: int) -> tuple[float, float]:
        loss = mean(trials[index]["loss"] for trials in results)
        return comparable(mean(trials[index]["score"] for trials in results)), comparable(-loss)

    return max(range(len(results[0])), key=rank)


def comparable(score: float) -> float:
    """Return a score, with NaN as the lowest one."""
    return -math.inf if math.isnan(score) else score


def _is_range(values: Any) -> bool:
    if not isinstance(values, Mapping) or set(values) != {"low", "high"}:
        return False
    low, high = values["low"], values["high"]
    return all(isinstance(bound, int | float) for bound in (low, high)) and 0 < low < high


def _draw(draw: random.Random, values: Mapping[str, float]) -> float:
    exponent = draw.uniform(math.log(values["low"]), math.log(values["high"]))
    return float(f"{math.exp(exponent):.3g}")
