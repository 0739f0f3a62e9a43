"""Keys and values before each layer's own, in bidirectional models (P-tuning v2; Liu et al., 2022).

Decoder-only models take a prefix as a cache of earlier tokens. Encoders have no cache, so their attention function adds
the prefix: every token attends to it in every layer, windows of local attention notwithstanding.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from mpt_lightning.backbones.cache import Pair
from mpt_lightning.backbones.kernels import bidirectional_attention
from mpt_lightning.errors import MPTError

# The name for transformers' `set_attn_implementation`.
NAME = "mpt_layer_prefix"


@dataclass
class _Pass:
    """A running pass: the prefix `[B, heads, P, D]` by attention module, or the keys and values that are recorded."""

    prefix: dict[nn.Module, Pair] = field(default_factory=dict)
    recorded: list[tuple[nn.Module, Pair]] | None = None


_PASS: ContextVar[_Pass | None] = ContextVar("pass", default=None)


def layer_prefix_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return attention to the module's prefix, if a pass has one, and to the own tokens; see `kernels`.

    The mask `[B, 1, S, S]` is True where attended, or 0 where attended; None attends to everything.
    """
    running = _PASS.get()
    if running is not None and running.recorded is not None:
        running.recorded.append((module, (key, value)))
    if running is not None and module in running.prefix:
        keys, values = (states.to(key.dtype) for states in running.prefix[module])
        key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        if attention_mask is not None:
            shape = (*attention_mask.shape[:3], keys.shape[2])
            seen = attention_mask.new_full(shape, 1 if attention_mask.dtype == torch.bool else 0)
            attention_mask = torch.cat([seen, attention_mask], dim=3)
    return bidirectional_attention(module, query, key, value, attention_mask, **options)


AttentionInterface.register(NAME, layer_prefix_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def prefixed(modules: Sequence[nn.Module], layers: Sequence[Pair]) -> Iterator[None]:
    """Put keys and values, per layer `[B, heads, P, D]`, before those of the attention modules of a pass."""
    token = _PASS.set(_Pass(dict(zip(modules, layers, strict=True))))
    try:
        yield
    finally:
        _PASS.reset(token)


def keys_and_values(model: PreTrainedModel, embeddings: Tensor) -> tuple[list[nn.Module], tuple[Pair, ...]]:
    """Return the attention modules of a model's layers, in order, and their keys and values for embeddings `[1, P, H]`.

    Raises:
        MPTError: If the layers do not use `layer_prefix_attention`, or share their modules (ALBERT).
    """
    running = _Pass(recorded=[])
    token = _PASS.set(running)
    try:
        model(inputs_embeds=embeddings, return_dict=True)
    finally:
        _PASS.reset(token)
    recorded = running.recorded or []
    modules = [module for module, _ in recorded]
    if not modules or len(set(modules)) < len(modules):
        reason = "its layers share one set of weights" if modules else "its attention takes no keys and values"
        raise MPTError(
            f"{type(model).__name__} cannot have a prefix in each layer: {reason}. Use PromptTuning, or a backbone "
            "such as BERT, RoBERTa or ModernBERT."
        )
    return modules, tuple(pair for _, pair in recorded)
