"""Collating rows into batches, and a DataLoader that resumes in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from mpt_lightning.data.sampling import GlobalBatchSampler
from mpt_lightning.errors import MPTError

# The token ids of each of a row's choices.
Choices = Sequence[Sequence[int]]


class PromptCollator:
    """Turns B rows into a batch, padded on the right to the longest.

    Rows have `input_ids`, `labels` and `task_ids`, and may have `row_id`, `context_examples` (training), `text`,
    `references` and `group` (evaluation), `choices` and `shares`. A batch has the tensors `input_ids [B, L]`,
    `attention_mask [B, L]` (1 is a token), `labels [B, M]` (-100 is padding), `task_ids [B]`, `context_examples [B]`,
    `choices [B, C, M']` (-100 is padding) and `shares [B, C]` (how much each choice is right), and the lists `row_ids`,
    `texts`, `references` and `groups`.

    Args:
        pad_id: Id that pads inputs.

    Attributes:
        choices: Token ids of each task's choices, by the task's id. None: the rows' own, if any.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id
        self.choices: Mapping[int, Choices] | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch of B rows; see the class."""
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch: dict[str, Any] = {
            "input_ids": pad([row["input_ids"] for row in rows], self.pad_id),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": pad([row["labels"] for row in rows], -100),
            "task_ids": torch.tensor([row["task_ids"] for row in rows]),
        }
        if "context_examples" in rows[0]:
            batch["context_examples"] = torch.tensor([row["context_examples"] for row in rows])
        lists = {"row_id": "row_ids", "text": "texts", "references": "references", "group": "groups"}
        batch |= {name: [row[column] for row in rows] for column, name in lists.items() if column in rows[0]}
        own = [row.get("choices", []) if self.choices is None else self.choices[row["task_ids"]] for row in rows]
        if any(own):
            batch["choices"] = pad_choices(own)
            if "shares" in rows[0]:
                shares = [torch.tensor(row["shares"]) for row in rows]
                batch["shares"] = pad_sequence(shares, batch_first=True)
        return batch


def pad_choices(rows: Sequence[Choices]) -> Tensor:
    """Pad the choices of B rows, `[B, C, longest]`; a row with fewer than C has choices of padding alone."""
    most = max(len(choices) for choices in rows)
    filled = [choice for choices in rows for choice in [*choices, *([[-100]] * (most - len(choices)))]]
    return pad(filled, -100).unflatten(0, (len(rows), most))


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Pad lists of ids on the right, `[B, longest]`."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


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
        """Resume where a checkpoint stopped; raise MPTError if it stopped in mid-epoch with other batches."""
        counts = [state.get(name) for name in ("epoch", "batches", "rows")] if isinstance(state, dict) else [None]
        if any(type(count) is not int or count < 0 for count in counts):
            raise MPTError(f"Got the loader's state {state!r}, expected three counts; the checkpoint is damaged.")
        if not 0 < state["batches"] < len(self):
            self.sampler.set_epoch(state["epoch"])
            self.sampler.start_batch = state["batches"]
        elif state["rows"] == self.sampler.global_size:
            self.sampler.resume(state["epoch"], state["batches"])
        else:
            raise MPTError(
                f"Got batches of {self.sampler.global_size} rows over all devices, expected {state['rows']} as in the "
                "checkpoint, which stopped in mid-epoch; change `batch_size` or `devices` back, or resume from a "
                "checkpoint of an epoch's end."
            )
