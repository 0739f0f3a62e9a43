"""Which rows make a batch: shuffled, grouped by length, or mixed from several tasks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence, Sized
from typing import Annotated, Any, Literal, cast

import numpy as np
from torch.utils.data import DistributedSampler

from mpt_lightning.arguments import PositiveFloat, PositiveInt, Range, check_arguments
from mpt_lightning.errors import MPTError

Sampling = Literal["stochastic", "proportional", "uniform", "temperature", "all"]
Kappa = Annotated[int, Range(2)] | None


class GlobalBatchSampler(DistributedSampler[int]):
    """Yields row numbers in the order of global batches; each rank takes its share of every global batch.

    A `DistributedSampler`, because Lightning does not replace those and sets their epoch. All ranks draw the same
    global batches of `batch_size * num_replicas` rows from (seed, epoch) and take every `num_replicas`-th row of each,
    so no two ranks share a row. For `DataLoader(batch_size=batch_size)`.

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
        """Yield the row numbers of each global batch of an epoch, each a multiple of `num_replicas` long.

        Args:
            rng: Random numbers of this epoch, the same on every rank.
        """

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0; any but a resumed one starts at its first batch."""
        if self._resumed_epoch is not None:
            # A trainer that stopped in mid-epoch and saved afterwards has counted that epoch as finished.
            self._epoch_offset = self._resumed_epoch - epoch
            self._resumed_epoch = None
        if epoch + self._epoch_offset != self.epoch:
            self.start_batch = 0
        super().set_epoch(epoch + self._epoch_offset)

    def resume(self, epoch: int, batches: int) -> None:
        """Resume an unfinished epoch after so many batches, whatever number the trainer gives that epoch."""
        super().set_epoch(epoch)
        self.start_batch = batches
        self._resumed_epoch = epoch

    def __iter__(self) -> Iterator[int]:
        start, self.start_batch = self.start_batch, 0
        for number, batch in enumerate(self.global_batches(np.random.default_rng((self.seed, self.epoch)))):
            if number >= start:
                yield from batch[self.rank :: self.num_replicas]


class ShuffleSampler(GlobalBatchSampler):
    """Yields every row of one task once an epoch; a few twice if the rows do not divide over the ranks.

    Args:
        size: Rows of the data set.
        batch_size: Rows per rank and batch; the last batch may be smaller.
        num_replicas, rank, seed: See the base class.
        lengths: Length of each row in tokens [N], to put rows of similar length into one batch. Unset: plain shuffle.

    Raises:
        MPTError: If there are fewer rows than ranks.
    """

    # Rows are sorted by length within so many batches: enough for little padding, few enough to stay random.
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
        batches = np.split(order, range(self.global_size, len(order), self.global_size))
        if self.lengths is not None:
            # Full batches change places, so that lengths do not rise through the window; a partial one stays last.
            full = len(order) // self.global_size
            batches[:full] = [batches[number] for number in rng.permutation(full)]
        for batch in batches:
            yield batch.tolist()


class TaskMixSampler(GlobalBatchSampler):
    """Yields rows of several tasks, which are stored one task after the other, mixed in each batch.

    A task's probability is p ~ min(rows, size_limit), its 1/temperature-th power with `temperature`, or equal.

    - `stochastic`: K ~ U{2..kappa} tasks are drawn with p; each gets batch/K rows and one of them the remainder. With
      fewer rows than K, as many tasks as rows get one row each.
    - `proportional`, `uniform`, `temperature`: the task of each row is drawn with p.
    - `all`: every task gets batch/T rows, and one drawn task the remainder.

    Each task is read in a shuffled order that starts again when it ends. An epoch has as many batches as all rows
    together fill, at least one.

    Args:
        sizes: Rows of each task [T].
        batch_size: Rows per rank and batch. The draw is for the batch of all ranks together.
        sampling: How tasks are drawn.
        kappa: Most tasks in a batch, for `stochastic`. Unset: all.
        temperature: Inverse of the exponent, for `temperature`; 1 is proportional, large is uniform.
        size_limit: A task counts as at most so many rows.
        replace: Whether `stochastic` may draw a task twice into one batch.
        num_replicas, rank, seed: See the base class.

    Raises:
        MPTError: If an option has an impossible value.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        sampling: Sampling = "stochastic",
        kappa: Kappa = None,
        temperature: PositiveFloat = 2.0,
        size_limit: PositiveInt = 2**18,
        replace: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 42,
    ) -> None:
        check_arguments(TaskMixSampler, locals())
        check_kappa(len(sizes), kappa, replace)
        super().__init__(sum(sizes), batch_size, num_replicas, rank, seed)
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


def check_kappa(num_tasks: int, kappa: int | None, replace: bool) -> None:
    """Raise MPTError if more tasks are to be drawn without replacement than there are."""
    if kappa is not None and not replace and kappa > num_tasks:
        raise MPTError(
            f"Got kappa={kappa}, expected at most {num_tasks}, the number of tasks; change `kappa` or `replace`."
        )


class EvalSampler(DistributedSampler[int]):
    """Yields every row exactly once over all ranks, in order.

    Args:
        dataset: The rows.
        num_replicas: Number of ranks.
        rank: This rank.
        even: Repeat the last row on ranks that are a row short.

    Attributes:
        filling: Number of repeated rows at the end, which must not be counted.
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
