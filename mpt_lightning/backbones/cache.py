"""A cache that lets rows read a shared prefix's keys and values, with gradients through it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mpt_lightning.backbones.attention import put_before
from mpt_lightning.backbones.gather import gather_rows

Pair: TypeAlias = tuple[Tensor, Tensor]


@dataclass
class EncodedPrompts:
    """What a decoder-only model makes of prompts alone: everything that rows need of them.

    Attributes:
        layers: per layer the keys and values, `[U, heads, P, D]` each.
        hidden: per layer the hidden states `[U, P, H]`.
        length: P.
        logits: `[U, N, V]` at the positions that were asked for, else nothing.
        shift: `[U, S, H]`, what is added to the embeddings of the text's tokens; mostly nothing.
        prompts: what was encoded, `[U, P, H]`; nothing where keys and values are themselves the prompt.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    hidden: tuple[Tensor, ...]
    length: int
    logits: Tensor | None = None
    prompts: Tensor | None = None
    shift: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> "EncodedPrompts":
        """Give some of the prompts, in the order of `rows` `[N]` in 0..U-1."""
        prompts = None if self.prompts is None else self.prompts[rows]
        hidden = tuple(states[rows] for states in self.hidden)
        return EncodedPrompts(
            tuple(gather(self.layers, rows)),
            hidden,
            self.length,
            None,
            prompts,
            self.shift if self.shift is None else self.shift[rows],
        )


class PrefixLayer(CacheLayerMixin):
    """One layer's prefix, in front of whatever keys and values a pass computes.

    A prefix that all rows share comes first, then one per row.

    Nothing accumulates: `update` gives `[prefix, new]` and only remembers it. So the same prefix serves many passes,
    and recomputing a layer (gradient checkpointing) gives the same result again.
    """

    is_sliding = False  # all keys are kept, and a window is the attention mask's work

    def __init__(self, prefix: Pair | None = None, shared: Pair | None = None) -> None:
        super().__init__()
        self.prefix, self.shared = prefix, shared
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: there is no storage."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Give the prefix and the new keys `[B, heads, P + S, D]`, and the values alike."""
        if self.prefix is not None:
            key_states = torch.cat([self.prefix[0].to(key_states.dtype), key_states], dim=2)
            value_states = torch.cat([self.prefix[1].to(value_states.dtype), value_states], dim=2)
        self.keys, self.values = key_states, value_states
        return (key_states if self.shared is None else put_before(key_states, self.shared)), value_states

    def get_seq_length(self) -> int:
        """Give the tokens before a pass."""
        return sum(pair[0].shape[2] for pair in (self.shared, self.prefix) if pair is not None)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Give the number of keys that a pass sees, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Say that there is no limit."""
        return -1


class PrefixCache(Cache):
    """The prefixes of all layers.

    Args:
        layers: per layer the prefix's keys and values `[B, heads, P, D]`; or how many layers there are, for a pass
            without such a prefix.
        shared: per layer the keys and values `[1, heads, P, D]` that all rows share, before their own; the model's
            attention must be `shared_prefix_attention`.
    """

    def __init__(self, layers: Sequence[Pair] | int, shared: Sequence[Pair] | None = None) -> None:
        own = [None] * layers if isinstance(layers, int) else layers
        common = [None] * len(own) if shared is None else shared
        self.shared = shared
        self.prefix_layers = [PrefixLayer(*pair) for pair in zip(own, common, strict=True)]
        super().__init__(layers=list(self.prefix_layers))

    def contents(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Give what the last pass saw: per layer the rows' keys and values, prefix and new ones."""
        pairs = []
        for layer in self.prefix_layers:
            if layer.keys is None or layer.values is None:
                raise RuntimeError("no pass has run through this cache yet")
            pairs.append((layer.keys, layer.values))
        return tuple(pairs)


def gather(layers: Sequence[tuple[Tensor, Tensor]], rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Give each row its prompt's keys and values.

    Args:
        layers: per layer `[U, heads, P, D]`.
        rows: [B] in 0..U-1.

    Returns:
        Per layer `[B, heads, P, D]`; a view where there is one prompt only.
    """
    return [(gather_rows(keys, rows), gather_rows(values, rows)) for keys, values in layers]
