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

    A `DistributedSampler`, because Lightning does not replace those and sets their epoch. All ranks draw the same
    global batches of `batch_size * num_replicas` rows from (seed, epoch) and take every `num_replicas`-th row of each,
    so no two ranks share a row. For `DataLoader(batch_size=batch_size)`.
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
        """Yield the row numbers of each global batch of an epoch, each a multiple of `num_replicas` long."""

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

    With the rows' `lengths` in tokens [N], rows of similar length are in one batch. The last batch may be smaller. See
    `GlobalBatchSampler` for the other arguments.
    """

    # Rows are sorted by length within so many batches: enough for little padding, few enough to stay random.
    WINDOW = 50

    def __init__(self, size: int, batch_size: int, *, lengths: np.ndarray | None = None, **options: int) -> None:
        super().__init__(size, batch_size, **options)
        if size < self.num_replicas:
            raise MPTError(
                f"Got {size} training rows for {self.num_replicas} devices, expected one or more each; lower `devices`."
            )
        self.lengths = lengths

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

    A task's probability is p ~ min(rows, size_limit), its 1/temperature-th power with `temperature`, or equal. See
    `MultitaskDataModule` for these options, and `GlobalBatchSampler` for the others.

    - `stochastic`: K ~ U{2..kappa} tasks are drawn with p; each gets batch/K rows and one of them the remainder. With
      fewer rows than K, as many tasks as rows get one row each.
    - `proportional`, `uniform`, `temperature`: the task of each row is drawn with p.
    - `all`: every task gets batch/T rows, and one drawn task the remainder.

    Each task is read in a shuffled order that starts again when it ends. An epoch has as many batches as all rows
    together fill, at least one. The draw is for the batch of all ranks together.
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
        **options: int,
    ) -> None:
        super().__init__(sum(sizes), batch_size, **options)
        if sampling == "all" and self.global_size < len(sizes):
            raise MPTError(
                f"Got batches of {self.global_size} rows for {len(sizes)} tasks with sampling='all', expected one row "
                "or more of each; raise `batch_size` or change `sampling`."
            )
        self.sizes = list(sizes)
        self.num_batches = max(1, self.size // self.global_size)  # of an epoch
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


class EvalSampler(DistributedSampler[int]):
    """Yields every row exactly once over all ranks, in order.

    With `even`, ranks that are a row short repeat the last row; `filling` is the number of such rows at the end, which
    must not be counted.
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
