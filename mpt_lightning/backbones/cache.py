"""A key/value cache that rows share as their prefix, or that has each row's prompt, with gradients through it."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, CacheLayerMixin

# Keys and values of one layer.
Pair: TypeAlias = tuple[Tensor, Tensor]


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


def gather_layers(layers: Sequence[Pair], rows: Tensor) -> tuple[Pair, ...]:
    """Return each row's keys and values `[B, heads, P, D]` per layer, from those of the prompts `[U, heads, P, D]`."""
    return tuple((gather_rows(keys, rows), gather_rows(values, rows)) for keys, values in layers)


class PrefixLayer(CacheLayerMixin):
    """One layer's prefix of the keys and values of a pass: first what all rows share, then what each row has alone.

    Nothing accumulates: `update` returns and stores `[prefix, new]`. So the same prefix can be used in many passes, and
    recomputing a layer (gradient checkpointing) has the same result.
    """

    is_sliding = False  # all keys are kept; a window is part of the attention mask

    def __init__(self, prefix: Pair | None = None, shared: Pair | None = None) -> None:
        super().__init__()
        self.prefix, self.shared = prefix, shared
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: there is no storage."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> Pair:
        """Return the prefix and the new keys `[B, heads, P + S, D]`, and the same of the values."""
        if self.prefix is not None:
            key_states = torch.cat([self.prefix[0].to(key_states.dtype), key_states], dim=2)
            value_states = torch.cat([self.prefix[1].to(value_states.dtype), value_states], dim=2)
        self.keys, self.values = key_states, value_states
        if self.shared is not None:
            # Models pass keys to the attention function unchanged, and offer no other way to pass more.
            key_states.shared_prefix = self.shared  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return the number of tokens before a pass."""
        return sum(pair[0].shape[2] for pair in (self.shared, self.prefix) if pair is not None)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that a pass attends to, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1


class PrefixCache(Cache):
    """The prefixes of all layers.

    `layers` are per layer the keys and values `[B, heads, P, D]` of each row's prefix, or the number of layers without
    one. `shared` are those `[1, heads, P, D]` that all rows share, before their own; they need a model whose attention
    is `shared_prefix_attention`.
    """

    def __init__(self, layers: Sequence[Pair] | int, shared: Sequence[Pair] | None = None) -> None:
        own = [None] * layers if isinstance(layers, int) else layers
        common = [None] * len(own) if shared is None else shared
        self.shared = shared
        self.prefix_layers = [PrefixLayer(*pair) for pair in zip(own, common, strict=True)]
        super().__init__(layers=list(self.prefix_layers))

    def contents(self) -> tuple[Pair, ...]:
        """Return per layer the keys and values of the last pass, prefix and new ones."""
        layers: list[Any] = self.prefix_layers  # whose keys are None before the first pass
        return tuple((layer.keys, layer.values) for layer in layers)
