"""Attention of bidirectional models where PyTorch's own kernel is slow."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def bidirectional_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return attention `[B, S, heads, D]`, and None in place of its weights; see `sdpa_attention_forward`.

    In half precision on a CPU, the backward pass of PyTorch's fused kernel (2.13) takes most of a training step. Plain
    matrix products take a fifth of its time, and memory for the scores `[B, heads, S, S]`.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    plain = half and query.device.type == "cpu" and torch.is_grad_enabled() and query.shape[1] == key.shape[1]
    if not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scaling = options.get("scaling")
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(2, 3)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    dropout = options.get("dropout") or 0.0
    weights = functional.dropout(scores.softmax(dim=-1), dropout, dropout > 0)
    return (weights @ value).transpose(1, 2), None
