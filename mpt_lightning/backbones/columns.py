"""Inserting columns into padded rows, and keeping some of a model's columns for its head."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def insert(ids: Tensor, mask: Tensor, at: Tensor, new: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Insert the first `count` `[B]` of the ids `new` `[K]` before column `at` `[B]` of right-padded rows `[B, L]`."""
    column = torch.arange(ids.shape[1] + len(new), device=ids.device).expand(len(ids), -1)
    offset = column - at[:, None]
    inserted = (offset >= 0) & (offset < count[:, None])
    source = column - offset.clamp(min=0).minimum(count[:, None])
    inside = source.clamp(max=ids.shape[1] - 1)
    wider = ids.gather(1, inside), mask.gather(1, inside) * (source < ids.shape[1])
    added = new[offset.clamp(0, len(new) - 1)]
    return torch.where(inserted, added, wider[0]), torch.where(inserted, 1, wider[1])


@contextmanager
def keep_columns(encoder: nn.Module, columns: Tensor) -> Iterator[None]:
    """Let the head read the encoder's states `[B, S, H]` at some columns `[B, M]` only: it has V outputs per state."""

    def gather(_module: nn.Module, _inputs: Any, output: Any) -> None:
        index = columns[..., None].expand(-1, -1, output.last_hidden_state.shape[2])
        output.last_hidden_state = output.last_hidden_state.gather(1, index)

    handle = encoder.register_forward_hook(gather)
    try:
        yield
    finally:
        handle.remove()
