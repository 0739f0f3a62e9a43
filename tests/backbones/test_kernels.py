"""Half precision on a CPU: short rows train without PyTorch's fused attention, with the same gradients."""

from contextlib import nullcontext

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mpt_lightning import load_backbone
from mpt_lightning.backbones.kernels import SHORT, attention_kernel
from mpt_lightning.resources import BERT

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("autocast", [False, True])
def test_short_rows_train_without_the_fused_kernel(autocast: bool) -> None:
    backbone = load_backbone(BERT, dtype="float32" if autocast else "bfloat16").eval()
    prompt = torch.randn(1, 4, backbone.dim, requires_grad=True)
    ids = torch.randint(5, 50, (2, 12))
    ids[:, -1] = backbone.tokenizer.mask_token_id
    inputs = (torch.zeros(2, dtype=torch.long), ids, torch.ones_like(ids), torch.full((2, 1), 7))
    gradients = {}
    for name in ("chosen", "fused"):
        context = nullcontext() if name == "chosen" else pytest.MonkeyPatch.context()
        with context as patch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if patch is not None:
                patch.setattr("mpt_lightning.backbones.kernels.SHORT", 0)
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                logits = backbone(prompt, *inputs).logits
        assert (FUSED in {event.key for event in profiler.key_averages()}) == (name == "fused")
        (gradients[name],) = torch.autograd.grad(logits.float().logsumexp(-1).sum(), prompt)
    torch.testing.assert_close(gradients["chosen"], gradients["fused"], atol=0.05, rtol=0.1)


@pytest.mark.parametrize(
    ("dtype", "tokens", "grad", "chosen"),
    [
        (torch.bfloat16, SHORT - 1, True, True),
        (torch.bfloat16, SHORT, True, False),
        (torch.bfloat16, 8, False, False),
        (torch.float32, 8, True, False),
    ],
)
def test_which_passes_choose_a_kernel(dtype: torch.dtype, tokens: int, grad: bool, chosen: bool) -> None:
    with torch.set_grad_enabled(grad):
        context = attention_kernel(torch.zeros(1, 1, dtype=dtype), tokens)
    assert isinstance(context, nullcontext) != chosen
