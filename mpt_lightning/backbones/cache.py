"""A key/value cache that rows share as their prefix, with gradients through it."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mpt_lightning.backbones.attention import put_before

# Keys and values of one layer.
Pair: TypeAlias = tuple[Tensor, Tensor]


class PrefixLayer(CacheLayerMixin):
    """One layer's prefix, before the keys and values of a pass: first one that all rows share, then one per row.

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
        return (key_states if self.shared is None else put_before(key_states, self.shared)), value_states

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

    Args:
        layers: Per layer the prefix's keys and values `[B, heads, P, D]`; or the number of layers without a prefix.
        shared: Per layer the keys and values `[1, heads, P, D]` that all rows share, before their own; the model's
            attention must be `shared_prefix_attention`.
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
