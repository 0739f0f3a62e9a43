"""Loading a frozen model by Hub id or folder."""

from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from mpt_lightning.backbones.base import Backbone
from mpt_lightning.backbones.causal import CausalBackbone
from mpt_lightning.backbones.seq2seq import Seq2SeqBackbone
from mpt_lightning.demo import backbone_path

DType = Literal["float32", "bfloat16"]


def load_config(name_or_path: str) -> PreTrainedConfig:
    """Load a model's configuration.

    Raises:
        ValueError: there is no such folder or Hub model, or it cannot be reached.
    """
    if name_or_path.startswith((".", "/", "~")) and not Path(name_or_path).expanduser().is_dir():
        raise ValueError(f"The backbone {name_or_path!r} looks like a folder, and there is none.")
    try:
        return AutoConfig.from_pretrained(backbone_path(name_or_path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Cannot load the backbone {name_or_path!r}. Expected a folder with a config.json, or the id of a Hub "
            f"model that can be reached from here. The cause: {str(error).splitlines()[0]}"
        ) from error


def load_backbone(
    name_or_path: str,
    dtype: DType = "float32",
    dropout: bool = False,
    gradient_checkpointing: bool = False,
) -> Backbone:
    """Load a model, frozen and ready for prompts.

    Args:
        name_or_path: Hub id ("google-t5/t5-base") or folder of an encoder-decoder or a decoder-only model.
        dtype: the precision of the frozen weights; prompts stay in fp32.
        dropout: keep the model's dropout on while prompts train.
        gradient_checkpointing: trade time for memory.

    Returns:
        A `Seq2SeqBackbone` or a `CausalBackbone`.

    Raises:
        ValueError: the model cannot be found, or is neither of the two kinds.
    """
    config = load_config(name_or_path)
    path = backbone_path(name_or_path)
    precision = getattr(torch, dtype)
    if config.is_encoder_decoder and config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=precision)
        return Seq2SeqBackbone(model, name_or_path, dropout, gradient_checkpointing)
    architectures = config.architectures or []
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not any("Masked" in a for a in architectures):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=precision)
        return CausalBackbone(model, name_or_path, dropout, gradient_checkpointing)
    raise ValueError(
        f"The backbone {name_or_path!r} is of the type {config.model_type!r}, which is neither an encoder-decoder "
        "nor a decoder-only language model. Prompts of this package need one of these."
    )
