"""The choice between PyTorch's kernels of attention, where its own choice is slow."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# From about this many tokens on, the memory that the fused kernel saves makes it faster.
SHORT = 256


def attention_kernel(states: Tensor, tokens: int) -> AbstractContextManager[None]:
    """Return the context of a pass over states `[B, ...]` of `tokens` tokens each.

    On a CPU, the backward pass of PyTorch's fused attention (2.13) takes five times as long in half precision as in
    fp32, and short rows then spend more than half of a training step there.
    """
    kind = states.device.type
    half = states.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(kind)
    if kind == "cpu" and half and tokens < SHORT and torch.is_grad_enabled():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
