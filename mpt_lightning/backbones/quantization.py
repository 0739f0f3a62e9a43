"""Frozen weights in 4 or 8 bits (QLoRA; Dettmers et al., 2023)."""

import logging
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from mpt_lightning.errors import MPTError
from mpt_lightning.io import one_line

Quantization = Literal["4bit", "8bit"]


def check_quantization(kind: Quantization) -> None:
    """Raise an `MPTError` if bitsandbytes or accelerate is missing."""
    missing = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
    if missing:
        raise MPTError(
            f"backbone_quantization='{kind}' needs {' and '.join(missing)}, which is not installed. Run "
            "`pip install mpt_lightning[quantization]`, or leave backbone_quantization unset and use "
            "backbone_dtype='bfloat16' to save memory."
        )


def quantized(kind: Quantization, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a model that is quantized and placed on a device.

    "4bit" is QLoRA's NF4 with double quantization and computations in `dtype`, "8bit" LLM.int8(). A library that is
    missing, or does not support this machine, is an MPTError.
    """
    check_quantization(kind)
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import validate_bnb_backend_availability

    try:
        validate_bnb_backend_availability(raise_exception=True)
    except (RuntimeError, ImportError) as error:
        raise MPTError(
            f"backbone_quantization='{kind}': bitsandbytes cannot run on this machine. Use one with a device that it "
            f"supports, or leave backbone_quantization unset. The cause: {one_line(error)}"
        ) from error
    config = BitsAndBytesConfig(
        load_in_8bit=kind == "8bit",
        load_in_4bit=kind == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_differentiable(model: nn.Module) -> None:
    """Keep the layers of a quantized model differentiable.

    On a CPU with AVX512-BF16, bitsandbytes repacks a 4-bit layer when it first runs without gradients, for example in
    validation. From then on no gradient passes through it, without an error, and prompts would not be trained.
    """
    layers: Iterable[Any] = model.modules()
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    # At each product it logs that activations are cast to float16, which LLM.int8() always does.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
