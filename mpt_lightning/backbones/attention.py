"""Attention to a prefix that all rows share, without a copy of it per row.

For the prefix, the queries of all rows are one long sequence: one matrix product instead of B. The softmax is joint
with the rows' own tokens, so the result is that of plain attention over `[prefix, own]`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mpt_lightning.backbones.packed import LAYOUT, packed_attention

# The name for transformers' `set_attn_implementation`.
NAME = "mpt_shared_prefix"


def shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return attention `[B, S, heads, D]` to a shared prefix and to own tokens, and None in place of its weights.

    Without a prefix or a packed pass it is plain attention. The arguments are those of transformers' attention
    functions: queries `[B, heads, S, D]`; keys and values `[B, key heads, S, D]`; a mask `[B, 1, S, P + S]`, True where
    attended or 0 where attended. All of the prefix is attended; it is an attribute of the keys (see `PrefixLayer`).
    `scaling` of the scores is D^-0.5 by default.
    """
    layout = LAYOUT.get()
    if layout is not None:
        return packed_attention(layout, module, query, key, value, dropout=dropout, scaling=scaling), None
    prefix: tuple[Tensor, Tensor] | None = getattr(key, "shared_prefix", None)
    if prefix is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    keys, values = (states[0].to(query.dtype) for states in prefix)  # [G, P, D], G key heads
    heads, length = len(keys), keys.shape[1]
    tokens, width = query.shape[2:]
    # [G, heads per key head, B, S, ...] from here on, so that the queries of one key head are contiguous.
    queries = query.unflatten(1, (heads, -1)).permute(1, 2, 0, 3, 4) * (width**-0.5 if scaling is None else scaling)
    shape = queries.shape[:-1]
    far = (queries.reshape(heads, -1, width) @ keys.transpose(1, 2)).view(*shape, length)
    near = queries @ key.permute(1, 0, 3, 2)[:, None]
    near = near + _bias(attention_mask, length, tokens, near)
    scores = torch.cat([far, near], dim=-1)
    precise = torch.float32 if scores.dtype in (torch.float16, torch.bfloat16) else scores.dtype
    weights = functional.dropout(scores.softmax(dim=-1, dtype=precise).to(scores.dtype), dropout, dropout > 0)
    of_prefix = (weights[..., :length].reshape(heads, -1, length) @ values).view(*shape, width)
    mixed = of_prefix + weights[..., length:] @ value.transpose(0, 1)[:, None]
    return mixed.permute(2, 3, 0, 1, 4).flatten(2, 3), None


def _bias(mask: Tensor | None, length: int, tokens: int, like: Tensor) -> Tensor:
    """Return the summand of the scores of own tokens, `[B, S, S]` or `[S, S]`."""
    if mask is None:  # only later tokens are hidden
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=like.device).tril()
    else:
        seen = mask[:, 0, :, length:]
    if seen.dtype != torch.bool:
        return seen.to(like.dtype)
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, torch.finfo(like.dtype).min)


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """Return transformers' mask, or None in a packed pass, whose layout contains the mask."""
    return None if LAYOUT.get() is not None else sdpa_mask(*args, **options)


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, _mask)
