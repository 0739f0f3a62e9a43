"""Rows become a batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class PromptCollator:
    """Pads rows on the right to the longest in the batch.

    Args:
        pad_id: Id that pads inputs.
        choices: Token ids of the task's C choices, for evaluation. Unset: the rows' own, if any.

    A call takes B rows with `input_ids`, `labels` and `task_ids`, and returns `input_ids [B, L]`,
    `attention_mask [B, L]` (1 is a token), `labels [B, M]` (-100 is padding) and `task_ids [B]`. Optional columns add:
    `context_examples`: `context_examples [B]`, the index of the row's copy in the context (-1: none), in training.
    `row_id`: `row_ids`, the rows' numbers in the Hub's split.
    `text`, `references` and `group` (evaluation): `texts`, `references` and `groups`, lists of B, and for a task with
    choices `choices [B, C, M']` (-100 is padding).
    """

    def __init__(self, pad_id: int, choices: Sequence[Sequence[int]] | None = None) -> None:
        self.pad_id = pad_id
        self.choices = None if choices is None else pad(choices, -100)

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
        if "row_id" in rows[0]:
            batch["row_ids"] = [row["row_id"] for row in rows]
        if "text" in rows[0]:
            names = {"references": "references", "texts": "text", "groups": "group"}
            batch |= {name: [row[column] for row in rows] for name, column in names.items()}
            if self.choices is not None:
                batch["choices"] = self.choices.expand(len(rows), -1, -1).clone()
            elif own := [choice for row in rows for choice in row.get("choices", [])]:
                batch["choices"] = pad(own, -100).unflatten(0, (len(rows), -1))
        return batch


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Pad lists of ids on the right, `[B, longest]`."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
