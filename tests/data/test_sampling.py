from collections import Counter

import numpy as np
import pytest

from mpt_lightning.data import MultitaskDataModule
from mpt_lightning.data.sampling import EvalSampler, ShuffleSampler, TaskMixSampler

SIZES = [600, 300, 100]
OFFSETS = np.cumsum([0, *SIZES])


def task_of(rows):
    return np.searchsorted(OFFSETS, rows, side="right") - 1


def batches(sampler, size):
    rows = list(sampler)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@pytest.mark.parametrize("sampling", ["stochastic", "proportional", "uniform", "temperature", "all"])
def test_epoch_is_reproducible_and_epochs_differ(sampling):
    sampler = TaskMixSampler(SIZES, 10, sampling)
    first = list(sampler)
    assert first == list(sampler)
    assert len(first) == len(sampler) == 1000
    sampler.set_epoch(1)
    assert first != list(sampler)
    assert first != list(TaskMixSampler(SIZES, 10, sampling, seed=1))


@pytest.mark.parametrize("sampling", ["stochastic", "proportional", "all"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_one_draw_without_overlap(sampling, world):
    whole = TaskMixSampler(SIZES, 6 * world, sampling)
    ranks = [TaskMixSampler(SIZES, 6, sampling, num_replicas=world, rank=rank) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {len(list(rank)) for rank in ranks} == {1000 // (6 * world) * 6}
    together = zip(*(batches(rank, 6) for rank in ranks), strict=True)
    for batch, parts in zip(batches(whole, 6 * world), together, strict=True):
        # Every rank has each `world`-th row of the whole batch.
        assert [list(part) for part in parts] == [batch[rank::world] for rank in range(world)]
        if sampling == "proportional":
            assert len(set(batch)) == len(batch)


def test_stochastic_batch_splits_over_k_tasks():
    seen = Counter()
    for batch in batches(TaskMixSampler(SIZES, 32, kappa=3, replace=False), 32):
        shares = sorted(Counter(task_of(batch)).values())
        seen[len(shares)] += 1
        assert shares == ([16, 16] if len(shares) == 2 else [10, 10, 12])
    assert set(seen) == {2, 3}


def test_stochastic_with_replacement_may_draw_one_task():
    sampler = TaskMixSampler([500, 500], 4, kappa=2)
    assert {len({row // 500 for row in batch}) for batch in batches(sampler, 4)} == {1, 2}


def test_fewer_rows_than_tasks_gives_one_row_each():
    sampler = TaskMixSampler([50] * 8, 3, kappa=8, replace=False)
    kinds = Counter(len({row // 50 for row in batch}) for batch in batches(sampler, 3))
    # K is drawn from 2..8, so six of seven batches have K >= 3 and contain three tasks; K = 2 gives rows 1 + 2.
    assert set(kinds) == {2, 3}
    assert kinds[3] > 4 * kinds[2]


def test_stochastic_shares_follow_the_probabilities():
    sampler = TaskMixSampler([60000, 30000, 10000], 8)
    tasks = np.searchsorted([60000, 90000], list(sampler), side="right")
    np.testing.assert_allclose(np.bincount(tasks) / len(tasks), [0.6, 0.3, 0.1], atol=0.02)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sampling": "proportional"}, [0.6, 0.3, 0.1]),
        ({"sampling": "proportional", "size_limit": 100}, [1 / 3, 1 / 3, 1 / 3]),
        ({"sampling": "proportional", "size_limit": 300}, [3 / 7, 3 / 7, 1 / 7]),
        ({"sampling": "uniform"}, [1 / 3, 1 / 3, 1 / 3]),
        ({"sampling": "temperature", "temperature": 1.0}, [0.6, 0.3, 0.1]),
        ({"sampling": "temperature"}, np.sqrt(SIZES) / np.sqrt(SIZES).sum()),
    ],
)
def test_probabilities(options, expected):
    np.testing.assert_allclose(TaskMixSampler(SIZES, 10, **options).probabilities, expected)


def test_all_puts_every_task_in_every_batch():
    larger = Counter()
    for batch in batches(TaskMixSampler(SIZES, 10, "all"), 10):
        counts = np.bincount(task_of(batch))
        assert sorted(counts) == [3, 3, 4]
        larger[int(counts.argmax())] += 1
    # The remainder goes to a drawn task: a third of 100 batches each.
    assert all(15 < larger[task] < 55 for task in range(3))


def test_all_draws_the_task_of_the_remainder():
    # Batches of 11 rows of three tasks: 3 of each, and 2 more of one of them.
    drawn = batches(TaskMixSampler([800, 800, 800], 11, "all"), 11)
    counts = [np.bincount([row // 800 for row in batch], minlength=3) for batch in drawn]
    assert all(sorted(count) == [3, 3, 5] for count in counts)
    larger = np.bincount([count.argmax() for count in counts], minlength=3)
    np.testing.assert_allclose(larger / len(counts), 1 / 3, atol=0.1)


def test_small_task_wraps_around_after_all_its_rows():
    sampler = TaskMixSampler([1000, 10], 10, "all")
    small = [row - 1000 for row in sampler if row >= 1000]
    rounds = [small[i : i + 10] for i in range(0, len(small) // 10 * 10, 10)]
    assert all(sorted(order) == list(range(10)) for order in rounds)
    assert len(set(map(tuple, rounds))) == len(rounds)  # in a new order each time


def test_each_task_has_a_new_order_in_each_epoch():
    sampler, orders = TaskMixSampler([50, 50], 2, "all"), set()
    for epoch in range(2):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        orders |= {tuple(row % 50 for row in rows if row // 50 == task) for task in range(2)}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_one_task_and_tiny_data_still_give_a_batch():
    assert sorted(TaskMixSampler([4], 8)) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "random"}, "sampling: got 'random', expected one of stochastic"),
        ({"kappa": 1}, "kappa: got 1, expected a whole number at least 2 or null"),
        ({"kappa": 4, "replace": False}, "at most 3, the number of tasks"),
        ({"temperature": 0.0}, "temperature: got 0.0, expected a number above 0"),
        ({"size_limit": 0}, "size_limit: got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MultitaskDataModule(["demo/topic", "demo/voice", "demo/advice"], **options)


def test_fewer_rows_than_tasks_cannot_hold_all():
    with pytest.raises(ValueError, match="Got batches of 2 rows for 3 tasks"):
        TaskMixSampler(SIZES, 2, "all")


@pytest.mark.parametrize("make", [lambda **k: TaskMixSampler(SIZES, 8, **k), lambda **k: ShuffleSampler(1003, 8, **k)])
@pytest.mark.parametrize("world", [1, 2])
def test_start_batch_skips_exactly(make, world):
    sampler = make(num_replicas=world, rank=world - 1)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.start_batch = 5
    sampler.set_epoch(3)
    assert list(sampler) == whole[5 * 8 :]
    assert list(sampler) == whole
    sampler.start_batch = 5
    sampler.set_epoch(4)
    assert len(list(sampler)) == len(whole)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("size", "world"), [(100, 1), (101, 2), (7, 3), (2, 2), (1003, 4)])
def test_an_epoch_has_every_row_over_all_ranks(grouped, size, world):
    lengths = np.random.default_rng(0).integers(1, 50, size) if grouped else None
    ranks = [ShuffleSampler(size, 8, num_replicas=world, rank=rank, lengths=lengths) for rank in range(world)]
    parts = [list(rank) for rank in ranks]
    seen = Counter(row for part in parts for row in part)
    assert set(seen) == set(range(size))
    # To make the ranks' shares equal, some rows are drawn twice, which change with the epoch.
    assert sum(seen.values()) - size == -size % world == sum(count == 2 for count in seen.values())
    assert {len(part) for part in parts} == {len(ranks[0])}
    if -size % world and not grouped:
        twice = {row for row, count in seen.items() if count == 2}
        for rank in ranks:
            rank.set_epoch(1)
        assert {row for row, count in Counter(row for rank in ranks for row in rank).items() if count == 2} != twice


def test_grouped_batches_have_less_padding():
    lengths = np.random.default_rng(0).integers(1, 100, 2000)

    def padding(sampler):
        return sum(len(rows) * lengths[rows].max() - lengths[rows].sum() for rows in batches(sampler, 16))

    grouped = ShuffleSampler(2000, 16, lengths=lengths)
    assert padding(grouped) < 0.2 * padding(ShuffleSampler(2000, 16))
    means = [lengths[rows].mean() for rows in batches(grouped, 16)]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3


def test_fewer_rows_than_devices():
    with pytest.raises(ValueError, match="Got 1 training rows for 2 devices"):
        ShuffleSampler(1, 8, num_replicas=2)


@pytest.mark.parametrize(("size", "world"), [(10, 3), (2, 3), (0, 2)])
def test_evaluation_has_every_row_once(size, world):
    ranks = [EvalSampler(range(size), world, rank) for rank in range(world)]
    assert sorted(row for rank in ranks for row in rank) == list(range(size))
    assert [len(rank) for rank in ranks] == [len(list(rank)) for rank in ranks]
    even = [EvalSampler(range(size), world, rank, even=True) for rank in range(world)]
    assert {len(rank) for rank in even} == {-(-size // world)}
    # The shares are made equal by repeating the last row at their ends, which `filling` counts.
    assert [list(rank)[: len(rank) - rank.filling] for rank in even] == [list(rank) for rank in ranks]
    assert {row for rank in even for row in list(rank)[len(rank) - rank.filling :]} <= {size - 1}
