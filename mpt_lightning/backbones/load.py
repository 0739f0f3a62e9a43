"""Loading a frozen model by Hub id or folder."""

from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from mpt_lightning.backbones.base import Backbone, Family
from mpt_lightning.backbones.causal import CausalBackbone
from mpt_lightning.backbones.compilation import check_compiler
from mpt_lightning.backbones.masked import MaskedBackbone
from mpt_lightning.backbones.pretrained import load_config
from mpt_lightning.backbones.probe import check_backbone
from mpt_lightning.backbones.quantization import Quantization, keep_differentiable, quantized
from mpt_lightning.backbones.seq2seq import Seq2SeqBackbone
from mpt_lightning.errors import MPTError
from mpt_lightning.resources import backbone_path

DType = Literal["float32", "bfloat16"]
# One class per family.
BACKBONES: tuple[type[Backbone], ...] = (Seq2SeqBackbone, CausalBackbone, MaskedBackbone)


def backbone_class(config: PreTrainedConfig, name: str) -> type[Backbone]:
    """Return the backbone class of a model; raise if the model belongs to no family, or has wrong results."""
    for kind in BACKBONES:
        if kind.takes(config):
            return kind
    raise MPTError(
        f"The backbone {name!r} is of the type {config.model_type!r}, which is neither an encoder-decoder, "
        "nor a decoder-only, nor a masked language model. Prompts of this package need one of these."
    )


def family_of(config: PreTrainedConfig) -> Family:
    """Return a model's family; see `backbone_class`."""
    return backbone_class(config, config.name_or_path or config.model_type).family


def load_backbone(
    name_or_path: str,
    dtype: DType = "float32",
    dropout: bool = False,
    gradient_checkpointing: bool = False,
    quantization: Quantization | None = None,
    device: torch.device | None = None,
    compiled: bool = False,
    check: bool = True,
) -> Backbone:
    """Load a frozen model for prompts.

    Args:
        name_or_path: Hub id ("google-t5/t5-base") or folder of an encoder-decoder, a decoder-only or a masked
            language model.
        dtype: Precision of the frozen weights; prompts stay in fp32.
        dropout: Keep the model's dropout on while prompts train.
        gradient_checkpointing: Recompute activations in the backward pass, which saves memory and costs time.
        quantization: Keep the frozen weights in "4bit" or "8bit" (bitsandbytes).
        device: Where weights are quantized and the compiler is tested; by default the first GPU, else the CPU.
        compiled: Compile feed-forward networks and norms (`torch.compile`): a slow first step, faster ones after it.
        check: Compare the results with the bare model's on a few tokens (see `probe`).

    Raises:
        MPTError: If the model cannot be found, belongs to no family, gives wrong results with prompts, or cannot
            be quantized or compiled here.
    """
    if dtype not in get_args(DType):
        raise MPTError(f"The backbone's dtype must be one of {', '.join(get_args(DType))}, got {dtype!r}.")
    config = load_config(name_or_path)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    device = device or torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if compiled:
        check_compiler(device)
    if quantization is not None:
        options |= quantized(quantization, options["dtype"], device)
    model, loading = backbone_class(config, name_or_path).auto_model.from_pretrained(
        backbone_path(name_or_path), trust_remote_code=False, output_loading_info=True, **options
    )
    if absent := sorted(loading["missing_keys"]):
        raise MPTError(
            f"{name_or_path!r} lacks {len(absent)} of the weights of {type(model).__name__} ({absent[0]}, ...), which "
            f"would be random. Expected the whole language model with its head, as saved from {type(model).__name__}."
        )
    if quantization is not None:
        keep_differentiable(model)
    own = {"dropout": dropout, "gradient_checkpointing": gradient_checkpointing, "compiled": compiled}
    return wrap_model(model, name_or_path, check=check, **own)


def wrap_model(model: PreTrainedModel, name: str, *, check: bool = True, **options: bool) -> Backbone:
    """Freeze a model that is already in memory, and prepare it for prompts; see `load_backbone` and `Backbone`."""
    backbone = backbone_class(model.config, name)(model, name, **options)
    if check:
        check_backbone(backbone)
    return backbone
