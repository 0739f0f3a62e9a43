"""Sharding a frozen backbone over ranks (FSDP2), for models that do not fit one device.

Each rank stores a part of every block, and gathers a whole block only while that block runs.
"""

import warnings
from functools import partial

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from transformers.modeling_layers import GradientCheckpointingLayer

from mpt_lightning.backbones.base import Backbone
from mpt_lightning.errors import MPTError


def shard(backbone: Backbone, mesh: DeviceMesh) -> None:
    """Shard a backbone over a one-dimensional mesh in place, and move it there part by part; do nothing if it is.

    From then on `forward`, `encode_prompts`, `score`, `generate` and `embeddings` gather weights, so all ranks must use
    them, in the same order. A model with trained weights, or without layers of transformers' own kind, is an MPTError.
    """
    if isinstance(backbone, FSDPModule):
        return
    if any(parameter.requires_grad for parameter in backbone.parameters()):
        raise MPTError(
            f"{backbone.name}: only a frozen backbone can be sharded, and this run trains weights inside it. Use "
            "--trainer.strategy ddp, or a method that trains prompts (PromptTuning, MPTSource, MPTTarget, CPT)."
        )
    # Children before parents, as `fully_shard` wants them.
    blocks = [layer for layer in reversed(list(backbone.modules())) if isinstance(layer, GradientCheckpointingLayer)]
    if not blocks:
        raise MPTError(
            f"{type(backbone.model).__name__} ({backbone.name}) has no layers of transformers' own kind to shard. "
            "Use --trainer.strategy ddp."
        )
    backbone.fingerprint  # noqa: B018  # computed and cached now, since a single rank may read it later
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(backbone, mesh=mesh)  # the rest: embeddings, norms, head
    backbone.sharded = True
    for method in ("encode_prompts", "keys_and_values", "score", "generate"):
        register_fsdp_forward_method(backbone, method)
    if hasattr(backbone.model, "generate"):  # a rank that has finished generating runs on until all ranks have
        backbone.model.generate = partial(backbone.model.generate, synced_gpus=True)
    # Logits are views of longer outputs, and never changed in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


class _Tied(torch.autograd.Function):
    """The identity on tensors; in the backward pass all get a gradient, possibly of zeros, if one does."""

    @staticmethod
    def forward(ctx: object, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def tie(keys: Tensor, values: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and values of a block whose output is not used.

    FSDP gathers a block's weights for the backward pass when a gradient reaches its output. Keys and values leave a
    block through the cache instead: if only they are used, the weights would not be gathered.
    """
    keys, values, _ = _Tied.apply(keys, values, output)
    return keys, values
