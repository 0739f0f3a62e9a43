"""Selecting each row's prompt, with a cheap gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class _Gather(torch.autograd.Function):
    """`states[rows]` whose gradient is one small matrix product.

    PyTorch's gradient adds row by row, which is slow on CPUs and has no fixed order on GPUs.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(states)
        return states.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (rows,), (gradient,) = ctx.saved_tensors, gradients
        members = functional.one_hot(rows, ctx.count).to(gradient.dtype)  # [B, U]
        return (members.T @ gradient.flatten(1)).view(ctx.count, *gradient.shape[1:]), None


def gather_rows(states: Tensor, rows: Tensor) -> Tensor:
    """Return `states[rows]` `[B, ...]` of `states` `[U, ...]` and `rows` `[B]`; a view if U is 1."""
    if len(states) == 1:
        return states.expand(len(rows), *states.shape[1:])
    return _Gather.apply(states, rows)


def gather_layers(layers: Sequence[tuple[Tensor, Tensor]], rows: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return each row's keys and values `[B, heads, P, D]` per layer, from those of the prompts `[U, heads, P, D]`."""
    return tuple((gather_rows(keys, rows), gather_rows(values, rows)) for keys, values in layers)
