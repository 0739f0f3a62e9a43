"""Compiling the feed-forward networks and norms of a model (`torch.compile`).

These have one tensor as input and one as output, so that one compiled version fits all layers, passes and lengths. A
whole layer has masks, caches and its index as inputs, and torch would compile every combination of them, up to its
limit and then none. Attention has its own kernels.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mpt_lightning.errors import MPTError
from mpt_lightning.io import one_line

_VERSIONS = 32  # torch's limit for all models of a process together; beyond it the rest would run uncompiled


def check_compiler(device: torch.device) -> None:
    """Raise an `MPTError` if a line of code cannot be compiled and run on the device where the model will run."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        raise MPTError(
            f"backbone_compile=True: torch.compile does not work here for {device.type}. It needs a C++ compiler (g++ "
            "or clang++; on a GPU a C compiler and triton). Install it, or set backbone_compile=False. The cause: "
            f"{one_line(error)}"
        ) from error


def compile_parts(model: PreTrainedModel, name: str) -> None:
    """Compile feed-forward networks and norms of all layers in place, or raise if the layers have no such parts.

    The model keeps its modules and their names. Each part is compiled when it first runs, together with layers that
    PEFT has added by then.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    parts = [part for layer in layers for part in _parts(layer)]
    if not parts:
        raise MPTError(
            f"{type(model).__name__} ({name}) has no part that is known to gain from compiling: no feed-forward "
            "network that is a module, and no norm except torch's own. Set backbone_compile=False."
        )
    # One version each with gradients, without, and in inference mode, for one or more rows and one or more tokens.
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, _VERSIONS)
    for part in parts:
        part.compile(dynamic=True)  # lengths and batch sizes vary from step to step


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest modules within one that contain no attention and are not torch's own."""
    for child in module.children():
        attends, *inner = ("Attention" in type(part).__name__ for part in child.modules())
        if any(inner) or isinstance(child, nn.ModuleList):
            yield from _parts(child)
        elif not attends and not type(child).__module__.startswith("torch."):
            yield child
