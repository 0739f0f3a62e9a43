"""Loading a frozen model by Hub id or folder."""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from mpt_lightning.backbones.base import Backbone
from mpt_lightning.backbones.causal import CausalBackbone
from mpt_lightning.backbones.compilation import check_compiler
from mpt_lightning.backbones.family import Family, family_of
from mpt_lightning.backbones.probe import check_backbone
from mpt_lightning.backbones.quantization import Quantization, keep_differentiable, quantized
from mpt_lightning.backbones.seq2seq import Seq2SeqBackbone
from mpt_lightning.errors import MPTError
from mpt_lightning.io import one_line
from mpt_lightning.resources import backbone_path

DType = Literal["float32", "bfloat16"]
AUTO_MODELS: dict[Family, Any] = {"seq2seq": AutoModelForSeq2SeqLM, "causal": AutoModelForCausalLM}
BACKBONES: dict[Family, type[Backbone]] = {"seq2seq": Seq2SeqBackbone, "causal": CausalBackbone}


def load_config(name_or_path: str) -> PreTrainedConfig:
    """Load a model's configuration; no code that comes with the model is run.

    Raises:
        MPTError: there is no such folder or Hub model, it cannot be reached or read, or it needs code of its own.
    """
    if not isinstance(name_or_path, str) or not name_or_path:
        raise MPTError(f"The backbone must be a Hub id or a folder, got {name_or_path!r}.")
    if name_or_path.startswith((".", "/", "~")) and not Path(name_or_path).expanduser().is_dir():
        raise MPTError(f"The backbone {name_or_path!r} looks like a folder, and there is none.")
    try:
        # Unless it is switched off, transformers asks on the terminal whether to run code that comes with a model.
        return AutoConfig.from_pretrained(backbone_path(name_or_path), trust_remote_code=False)
    except Exception as error:  # damaged files fail anywhere in transformers
        raise MPTError(
            f"Cannot load the backbone {name_or_path!r}. Expected a folder with a config.json, or the id of a Hub "
            "model that can be reached from here, of a type that transformers has: code that comes with a model is "
            f"never run. The cause: {one_line(error)}"
        ) from error


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
    """Load a model, frozen and ready for prompts.

    Args:
        name_or_path: Hub id ("google-t5/t5-base") or folder of an encoder-decoder or a decoder-only model.
        dtype: the precision of the frozen weights; prompts stay in fp32.
        dropout: keep the model's dropout on while prompts train.
        gradient_checkpointing: trade time for memory.
        quantization: keep the frozen weights in "4bit" or "8bit" (bitsandbytes).
        device: where quantized weights are made, and compiled code is tried; by default the first GPU, else the CPU.
        compiled: compile feed-forward networks and norms (`torch.compile`): a slow first step, faster ones after it.
        check: compare the model with itself on a few tokens (see `probe`), and refuse it if prompts would give wrong
            results.

    Returns:
        A `Seq2SeqBackbone` or a `CausalBackbone`.

    Raises:
        MPTError: the model cannot be found, is neither of the two kinds, or cannot be quantized or compiled here.
    """
    if dtype not in get_args(DType):
        raise MPTError(f"The backbone's dtype must be one of {', '.join(get_args(DType))}, got {dtype!r}.")
    config = load_config(name_or_path)
    path = backbone_path(name_or_path)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    device = device or torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if compiled:
        check_compiler(device)
    if quantization is not None:
        options |= quantized(quantization, options["dtype"], device)
    check_kind(config, name_or_path)
    auto: Any = AUTO_MODELS[family_of(config)]
    model, loading = auto.from_pretrained(path, trust_remote_code=False, output_loading_info=True, **options)
    if absent := sorted(loading["missing_keys"]):
        raise MPTError(
            f"{name_or_path!r} lacks {len(absent)} of the weights of {type(model).__name__} ({absent[0]}, ...), which "
            "would be random. Expected the whole language model with its head; give a checkpoint that was saved from "
            f"{type(model).__name__}."
        )
    if quantization is not None:
        keep_differentiable(model)
    return wrap_model(model, name_or_path, dropout, gradient_checkpointing, compiled, check)


def wrap_model(
    model: PreTrainedModel,
    name: str,
    dropout: bool = False,
    gradient_checkpointing: bool = False,
    compiled: bool = False,
    check: bool = True,
) -> Backbone:
    """Freeze a model that is already in memory, and make it ready for prompts; see `load_backbone`.

    Raises:
        MPTError: the model is neither an encoder-decoder nor decoder-only, or gives wrong results with prompts.
    """
    check_kind(model.config, name)
    kind = BACKBONES[family_of(model.config)]
    backbone = kind(model, name, dropout, gradient_checkpointing, compiled)
    if check:
        check_backbone(backbone)
    return backbone


def check_kind(config: PreTrainedConfig, name: str) -> None:
    """Raise if a model is neither an encoder-decoder nor decoder-only, or is known to give wrong results.

    Raises:
        MPTError: it is.
    """
    kind = config.model_type
    if kind == "prophetnet":
        raise MPTError(
            f"The backbone {name!r} is a ProphetNet, whose results depend on the padding of the batch in transformers "
            "itself. Use a T5 or BART model."
        )
    if config.is_encoder_decoder:
        known = kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    else:
        is_encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
        known = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not is_encoder
    if not known:
        raise MPTError(
            f"The backbone {name!r} is of the type {kind!r}, which is neither an encoder-decoder nor a decoder-only "
            "language model. Prompts of this package need one of these."
        )
