"""The values that arguments of the modules may have."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from mpt_lightning.backbones.bottleneck import Places
from mpt_lightning.backbones.quantization import Quantization, check_quantization
from mpt_lightning.errors import MPTError
from mpt_lightning.objectives import Layers, Normalize, Positions, Stacks
from mpt_lightning.prompts.context import EpsilonScale

OptimizerName = Literal["adamw", "adafactor"]
Reparameterization = Literal["none", "residual", "mlp", "lstm", "superposition"]
ScheduleName = Literal["linear", "constant", "cosine"]
Method = Literal["cpt", "prompt_tuning", "instruction", "icl"]
Trained = Literal["all", "head"]
PrefixInit = Literal["vocabulary", "text", "random"]
PromptInit = Literal["vocabulary", "text", "labels", "random", "checkpoint"]


def check_options(options: Mapping[str, Any]) -> None:
    """Check arguments that the command line's types do not, or that come from Python.

    Raises:
        MPTError: one has an impossible value.
    """
    allowed = {
        "backbone_dtype": ("float32", "bfloat16"),
        "backbone_quantization": (None, *get_args(Quantization)),
        "optimizer": get_args(OptimizerName),
        "schedule": get_args(ScheduleName),
        "prefix_init": get_args(PrefixInit),
        "prompt_init": get_args(PromptInit),
        "reparameterization": get_args(Reparameterization),
        "hidden_layers": get_args(Layers),
        "hidden_positions": get_args(Positions),
        "hidden_stacks": get_args(Stacks),
        "method": get_args(Method),
        "train": get_args(Trained),
        "places": get_args(Places),
        "epsilon_scale": get_args(EpsilonScale),
        "normalize": get_args(Normalize),
    }
    for name, choices in allowed.items():
        if name in options and options[name] not in choices:
            raise MPTError(f"{name} must be one of {', '.join(map(str, choices))}, got {options[name]!r}.")
    for name in (
        "lr",
        "shared_lr",
        "task_lr",
        "shift_lr",
        "warmup_steps",
        "weight_decay",
        "logits_weight",
        "hidden_weight",
    ):
        if name in options and not (_is_number(options[name]) and options[name] >= 0):
            raise MPTError(f"{name} must be 0 or more, got {options[name]!r}.")
    if options.get("backbone_quantization"):
        check_quantization(options["backbone_quantization"])
    for name in ("epsilon", "template_epsilon"):
        if options.get(name) is not None and not (_is_number(options[name]) and options[name] > 0):
            raise MPTError(f"{name} must be above 0, or null for no bound; got {options[name]!r}.")
    if "decay" in options and not (_is_number(options["decay"]) and 0 < options["decay"] <= 1):
        raise MPTError(f"decay must be above 0 and at most 1 (1 weighs all examples alike), got {options['decay']}.")
    for name in (
        "prompt_length",
        "rank",
        "max_new_tokens",
        "num_beams",
        "instruction_length",
        "network_width",
        "size",
        "text_length",
        "teacher_every",
        "teacher_top_k",
    ):
        if options.get(name) is not None and not (isinstance(options[name], int) and options[name] >= 1):
            raise MPTError(f"{name} must be 1 or more, got {options[name]!r}.")
    for name, kind in (("tasks", list), ("backbone", str)):
        if options.get(name) is not None and not isinstance(options[name], kind):
            raise MPTError(f"{name} must be a {'list of names' if kind is list else 'text'}, got {options[name]!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
