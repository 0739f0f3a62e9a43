"""Half precision on a CPU trains without PyTorch's fused attention, with the same results."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mpt_lightning import load_backbone
from mpt_lightning.backbones.kernels import bidirectional_attention
from mpt_lightning.resources import BERT

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"
MODULE = SimpleNamespace(is_causal=False, training=True)


def masks() -> dict[str, Tensor | None]:
    seen = torch.ones(3, 1, 9, 9, dtype=torch.bool)
    seen[0, ..., 5:] = seen[2, ..., :2] = False
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
    return {"none": None, "boolean": seen, "added": added.bfloat16()}


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("options", [{}, {"scaling": 0.7}])
def test_equal_to_plain_attention(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    states = [torch.randn(3, 2, 9, 16).bfloat16() for _ in range(3)]
    exact = [state.double().requires_grad_() for state in states]
    half = [state.requires_grad_() for state in states]
    mask = masks()[name]
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    expected, _ = sdpa_attention_forward(MODULE, *exact, wide, **options)
    found, _ = bidirectional_attention(MODULE, *half, mask, **options)
    torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.02)
    direction = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad((found * direction).sum(), half),
        torch.autograd.grad((expected * direction).sum(), exact),
        strict=True,
    ):
        torch.testing.assert_close(one.double(), other, atol=0.03, rtol=0.03)


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    query = torch.zeros(1, 1, 400, 8, dtype=torch.bfloat16, requires_grad=True)
    found, _ = bidirectional_attention(MODULE, query, query, torch.ones_like(query), None, dropout=0.5)
    assert found.float().std() > 0
    assert found.detach().float().mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_training_in_half_precision_avoids_it(grad: bool, dtype: Any) -> None:
    backbone = load_backbone(BERT, dtype=dtype).eval()
    prompt = torch.randn(1, 4, backbone.dim)
    ids = torch.randint(5, 50, (2, 12))
    ids[:, -1] = backbone.tokenizer.mask_token_id
    inputs = (torch.zeros(2, dtype=torch.long), ids, torch.ones_like(ids), torch.full((2, 1), 7))
    with torch.set_grad_enabled(grad), profile(activities=[ProfilerActivity.CPU]) as profiler:
        backbone(prompt.requires_grad_(grad), *inputs)
    assert (FUSED in {event.key for event in profiler.key_averages()}) == (not grad or dtype == "float32")
