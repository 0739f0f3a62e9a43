"""The trials of a search, and the choice among them."""

import math

import pytest

from mpt_lightning.compare.search import best_trial, make_trials


def test_a_grid_has_every_combination() -> None:
    search = {"model.lr": [1, 2], "model.shared_lr, model.task_lr": [3, 4]}
    assert make_trials("mpt", search, None) == tuple(
        {"model.lr": lr, "model.shared_lr": rate, "model.task_lr": rate} for lr in (1, 2) for rate in (3, 4)
    )
    assert make_trials("mpt", {}, None) == ({},)


def test_random_trials_are_different_members_of_the_grid() -> None:
    search = {"a.b": list(range(4)), "a.c": list(range(5))}
    drawn = make_trials("mpt", search, 12)
    assert len({tuple(values.items()) for values in drawn}) == 12
    assert all(values["a.b"] in range(4) and values["a.c"] in range(5) for values in drawn)
    assert drawn == make_trials("mpt", search, 12)
    assert drawn != make_trials("lora", search, 12)


def test_ranges_are_drawn_evenly_on_a_logarithmic_scale() -> None:
    drawn = [values["lr"] for values in make_trials("mpt", {"lr": {"low": 1e-4, "high": 1e-2}, "x": [1]}, 400)]
    assert 1e-4 <= min(drawn) < 1.1e-4
    assert 0.9e-2 < max(drawn) <= 1e-2
    assert sum(value < 1e-3 for value in drawn) / 400 == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("search", "count", "message"),
    [
        ({"lr": []}, None, "expected a list of values"),
        ({"lr": {"low": 0, "high": 1}}, 2, "both above 0"),
        ({"lr": {"low": 2, "high": 1}}, 2, "expected a list of values"),
        ({"lr": [1, 2]}, 3, "has 2 combinations, and `trials` is 3"),
        ({"lr": {"low": 1, "high": 2}}, None, "set `trials`"),
    ],
)
def test_impossible_searches_are_refused(search: dict, count: int | None, message: str) -> None:
    with pytest.raises(ValueError, match="`search` of mpt") as raised:
        make_trials("mpt", search, count)
    assert message in str(raised.value)


def test_the_best_trial_has_the_highest_score_then_lowest_loss() -> None:
    def trials(*pairs: tuple[float, float]) -> list[dict[str, float]]:
        return [{"score": score, "loss": loss} for score, loss in pairs]

    assert best_trial([trials((0.1, 0), (0.4, 9), (0.5, 0)), trials((0.9, 0), (0.7, 9), (0.4, 0))]) == 1
    assert best_trial([trials((0.5, 0.3), (0.5, 0.2), (0.5, 0.25))]) == 1
    assert best_trial([trials((0.5, math.nan), (0.5, 0.2))]) == 1


def test_a_trial_without_a_score_is_never_the_best() -> None:
    one, other = [{"score": math.nan, "loss": 0.1}, {"score": 0.3, "loss": 2}], [{"score": 0.9, "loss": 0.1}] * 2
    assert best_trial([one]) == 1
    assert best_trial([one[::-1]]) == 0
    assert best_trial([other, one]) == 1
