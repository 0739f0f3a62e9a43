"""A DataLoader that resumes in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from mpt_lightning.data.sampling import GlobalBatchSampler
from mpt_lightning.errors import MPTError


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over a `GlobalBatchSampler` that Lightning saves with the checkpoint and resumes in mid-epoch.

    It counts the batches handed out, not those that workers fetched ahead.
    """

    sampler: GlobalBatchSampler
    _batches = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that workers start with the first `next`, after Lightning has set the epoch.
        self._batches = self.sampler.start_batch
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, its finished batches, and the rows of a batch over all ranks."""
        return {"epoch": self.sampler.epoch, "batches": self._batches, "rows": self.sampler.global_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume where a checkpoint stopped.

        Args:
            state: What `state_dict` returned.

        Raises:
            MPTError: If the state is damaged, or the checkpoint stopped in mid-epoch with batches of another size.
        """
        counts = [state.get(name) for name in ("epoch", "batches", "rows")] if isinstance(state, dict) else [None]
        if any(type(count) is not int or count < 0 for count in counts):
            raise MPTError(f"Got the loader's state {state!r}, expected three counts; the checkpoint is damaged.")
        unfinished = 0 < state["batches"] < len(self)
        if unfinished and state["rows"] != self.sampler.global_size:
            raise MPTError(
                f"Got batches of {self.sampler.global_size} rows over all devices, expected {state['rows']} as in the "
                "checkpoint, which stopped in mid-epoch; change `batch_size` or `devices` back, or resume from a "
                "checkpoint of an epoch's end."
            )
        if unfinished:
            self.sampler.resume(state["epoch"], state["batches"])
        else:
            self.sampler.set_epoch(state["epoch"])
            self.sampler.start_batch = state["batches"]
