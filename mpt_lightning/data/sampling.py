"""Which rows make a batch: shuffled, grouped by length, or mixed from several tasks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence, Sized
from typing import Any, Literal, cast

import numpy as np
from torch.utils.data import DistributedSampler

from mpt_lightning.errors import MPTError

Sampling = Literal["stochastic", "proportional", "uniform", "temperature", "all"]


class GlobalBatchSampler(DistributedSampler[int]):
    """Yields row numbers in the order of global batches; each rank takes its share of every global batch.

    A `DistributedSampler`, because Lightning leaves those alone and tells them the epoch. All ranks make the same
    global batches of `batch_size * num_replicas` rows from (seed, epoch) and take every `num_replicas`-th row of each,
    so no two ranks share a row. Used with `DataLoader(batch_size=batch_size)`.

    Args:
        size: Rows of the data set.
        batch_size: Rows per rank and batch.
        num_replicas: Number of ranks.
        rank: This rank.
        seed: Seed of the order.
    """

    def __init__(self, size: int, batch_size: int, num_replicas: int = 1, rank: int = 0, seed: int = 42) -> None:
        super().__init__(cast(Any, range(size)), num_replicas, rank, seed=seed)
        self.size = size
        self.global_size = batch_size * num_replicas
        self.start_batch = 0
        self._resumed_epoch: int | None = None
        self._epoch_offset = 0

    @abstractmethod
    def global_batches(self, rng: np.random.Generator) -> Iterator[Sequence[int]]:
        """Row numbers of each global batch of an epoch, each a multiple of `num_replicas` long.

        Args:
            rng: Random numbers of this epoch, the same on every rank.

        Yields:
            Row numbers.
        """

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; any but a resumed one starts at its first batch.

        Args:
            epoch: Epoch, from 0.
        """
        if self._resumed_epoch is not None:
            # A trainer that stopped in mid-epoch and saved afterwards has counted that epoch as done.
            self._epoch_offset = self._resumed_epoch - epoch
            self._resumed_epoch = None
        if epoch + self._epoch_offset != self.epoch:
            self.start_batch = 0
        super().set_epoch(epoch + self._epoch_offset)

    def resume(self, epoch: int, batches: int) -> None:
        """Go on in mid-epoch, whatever number the trainer gives that epoch.

        Args:
            epoch: The unfinished epoch.
            batches: Its batches that are done.
        """
        super().set_epoch(epoch)
        self.start_batch = batches
        self._resumed_epoch = epoch

    def __iter__(self) -> Iterator[int]:
        start, self.start_batch = self.start_batch, 0
        for number, batch in enumerate(self.global_batches(np.random.default_rng((self.seed, self.epoch)))):
            if number >= start:
                yield from batch[self.rank :: self.num_replicas]


class ShuffleSampler(GlobalBatchSampler):
    """Every row of one task once an epoch; a few twice where rows do not divide over the ranks.

    Args:
        lengths: Length of each row in tokens [N], to put rows of like length into one batch. Unset: plain shuffle.
        size: Rows of the data set.
        batch_size: Rows per rank and batch; the last batch may be smaller.
        num_replicas: Number of ranks.
        rank: This rank.
        seed: Seed of the order.

    Raises:
        MPTError: If there are fewer rows than ranks.
    """

    #: Rows are sorted by length within so many batches: enough for little padding, few enough to stay random.
    WINDOW = 50

    def __init__(
        self,
        size: int,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 42,
        lengths: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        super().__init__(size, batch_size, num_replicas, rank, seed)
        if size < num_replicas:
            raise MPTError(
                f"Got {size} training rows for {num_replicas} devices, expected one or more each; lower "
                "`devices` or use more rows."
            )
        self.lengths = None if lengths is None else np.asarray(lengths)

    def __len__(self) -> int:
        return -(-self.size // self.num_replicas)

    def global_batches(self, rng: np.random.Generator) -> Iterator[Sequence[int]]:
        """See the base class."""
        order = rng.permutation(self.size)
        order = np.append(order, order[: len(self) * self.num_replicas - self.size])
        if self.lengths is not None:
            window = self.WINDOW * self.global_size
            parts = [order[start : start + window] for start in range(0, len(order), window)]
            order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in parts])
        batches = [order[start : start + self.global_size] for start in range(0, len(order), self.global_size)]
        # Full batches change places, so that lengths do not rise through the window; a partial one stays last.
        full = len(order) // self.global_size
        turn = rng.permutation(full) if self.lengths is not None else range(full)
        for number in [*turn, *range(full, len(batches))]:
            yield batches[number].tolist()


class TaskMixSampler(GlobalBatchSampler):
    """Rows of several tasks, stored one task after the other, mixed in each batch.

    A task's probability is p ~ min(rows, size_limit), its 1/temperature-th power with `temperature`, or equal.

    - `stochastic`: K ~ U{2..kappa} tasks are drawn with p, each gets batch/K rows and one of them the remainder; with
      fewer rows than K, that many tasks get one row each.
    - `proportional`, `uniform`, `temperature`: the task of each row is drawn with p.
    - `all`: every task gets batch/T rows, and one drawn task the remainder.

    Each task is read in a shuffled order that starts again when it ends. An epoch has as many batches as all rows
    together fill, at least one.

    Args:
        sizes: Rows of each task [T].
        batch_size: Rows per rank and batch. The draw is for the batch of all ranks together.
        sampling: How tasks are drawn.
        kappa: Most tasks in a batch, for `stochastic`. Unset: all.
        temperature: Exponent's inverse, for `temperature`; 1 is proportional, large is uniform.
        size_limit: A task counts as at most so many rows.
        replace: Whether `stochastic` may draw a task twice into one batch.
        num_replicas: Number of ranks.
        rank: This rank.
        seed: Seed of the order.

    Raises:
        MPTError: If an option has an impossible value.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        sampling: Sampling = "stochastic",
        kappa: int | None = None,
        temperature: float = 2.0,
        size_limit: int = 2**18,
        replace: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 42,
    ) -> None:
        super().__init__(sum(sizes), batch_size, num_replicas, rank, seed)
        check_sampling(len(sizes), sampling, kappa, temperature, size_limit, replace)
        if sampling == "all" and self.global_size < len(sizes):
            raise MPTError(
                f"Got batches of {self.global_size} rows for {len(sizes)} tasks with sampling='all', expected one row "
                "or more of each; raise `batch_size` or change `sampling`."
            )
        self.sizes = list(sizes)
        self.offsets = np.cumsum([0, *sizes[:-1]])
        self.sampling = sampling
        self.kappa = kappa or len(sizes)
        self.replace = replace
        weights = np.minimum(np.asarray(sizes, dtype=float), size_limit)
        if sampling == "uniform":
            weights = np.ones(len(sizes))
        elif sampling == "temperature":
            weights = weights ** (1 / temperature)
        self.probabilities = weights / weights.sum()

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return max(1, self.size // self.global_size)

    def __len__(self) -> int:
        return self.num_batches * self.global_size // self.num_replicas

    def global_batches(self, rng: np.random.Generator) -> Iterator[Sequence[int]]:
        """See the base class."""
        readers = [_endless(size, seed) for size, seed in zip(self.sizes, rng.spawn(len(self.sizes)), strict=True)]
        for _ in range(self.num_batches):
            counts = self._task_counts(rng)
            yield [
                int(self.offsets[task]) + next(readers[task]) for task, count in enumerate(counts) for _ in range(count)
            ]

    def _task_counts(self, rng: np.random.Generator) -> np.ndarray:
        rows, tasks = self.global_size, len(self.sizes)
        if self.sampling in ("proportional", "uniform", "temperature"):
            return rng.multinomial(rows, self.probabilities)
        if self.sampling == "all":
            drawn = np.arange(tasks)
        else:
            k = min(rows, int(rng.integers(min(2, self.kappa), self.kappa + 1)))
            drawn = rng.choice(tasks, size=k, replace=self.replace, p=self.probabilities)
        counts = np.bincount(drawn, minlength=tasks) * (rows // len(drawn))
        counts[rng.choice(drawn)] += rows % len(drawn)
        return counts


def _endless(size: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(size).tolist()


def check_sampling(
    num_tasks: int, sampling: str, kappa: int | None, temperature: float, size_limit: int, replace: bool
) -> None:
    """Check the options of task sampling, which needs no data.

    Args:
        num_tasks: Number of tasks T.
        sampling: See `TaskMixSampler`.
        kappa: See `TaskMixSampler`.
        temperature: See `TaskMixSampler`.
        size_limit: See `TaskMixSampler`.
        replace: See `TaskMixSampler`.

    Raises:
        MPTError: If one has an impossible value.
    """
    names = ("stochastic", "proportional", "uniform", "temperature", "all")
    if sampling not in names:
        raise MPTError(f"Got sampling={sampling!r}, expected one of {', '.join(names)}; change `sampling`.")
    if kappa is not None and (kappa < 2 or (not replace and kappa > num_tasks)):
        most = "" if replace else f" and at most {num_tasks}, the number of tasks"
        raise MPTError(f"Got kappa={kappa}, expected at least 2{most}; change `kappa` or `replace`.")
    if not temperature > 0:
        raise MPTError(f"Got temperature={temperature}, expected a number > 0; change `temperature`.")
    if size_limit < 1:
        raise MPTError(f"Got size_limit={size_limit}, expected a number of rows >= 1; change `size_limit`.")


class EvalSampler(DistributedSampler[int]):
    """Every row exactly once over all ranks, in order, without padding.

    Args:
        dataset: The rows.
        num_replicas: Number of ranks.
        rank: This rank.
        even: Give ranks that are a row short one to fill up, the last one again; it counts nowhere.

    Attributes:
        filling: Rows at the end that only fill up.
    """

    def __init__(self, dataset: Sized, num_replicas: int = 1, rank: int = 0, even: bool = False) -> None:
        super().__init__(cast(Any, dataset), num_replicas, rank, shuffle=False)
        self.rows = list(range(rank, len(dataset), num_replicas))
        self.filling = int(even and rank >= len(dataset) % num_replicas > 0)
        self.rows += [len(dataset) - 1] * self.filling

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)
