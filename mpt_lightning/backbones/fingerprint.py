"""Telling one backbone from another by its weights."""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

SAMPLES = 4096


def fingerprint(model: PreTrainedModel) -> str:
    """Return a short hash of a model's weights, whatever its name.

    Each parameter and saved buffer counts with its shape and a sample of its values: up to 4,096 values all of them, of
    larger tensors at least 4,096 at equal distances, in all columns alike. So merged adapters, a tuned head and further
    training are seen. A change is missed if it leaves the sample as it is: if it has fewer neighbouring values than the
    distance, as one row of a large embedding table, or is lost in rounding to bfloat16.

    Values are rounded to bfloat16, so that loading in another precision or on another device does not change the hash.
    Neither names nor tied weights do: a tensor counts wherever the model uses it.

    Args:
        model: not sharded, and without adapters.

    Returns:
        Two hashes, "<12 digits>-<12 digits>". The second is of the weights of linear layers but for the output layer's:
        of what quantization changes. For a quantized model it is the word "quantized".
    """
    head: Any = model.get_output_embeddings()
    parts: dict[bool, list[Tensor]] = {False: [], True: []}
    for module, tensor in _tensors(model):
        linear = isinstance(module, nn.Linear | Conv1D) and module is not head and tensor is module.weight
        parts[linear].append(tensor)
    first = _digest(parts[False])
    return f"{first}-{'quantized' if getattr(model, 'is_quantized', False) else _digest(parts[True])}"


def _tensors(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    for _, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                yield module, parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield module, buffer


def _digest(tensors: list[Tensor]) -> str:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    digest = hashlib.sha256(repr(shapes).encode())
    if tensors:
        # One transfer from the device.
        values = torch.cat([_sample(tensor) for tensor in tensors]).cpu()
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:12]


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    distance = max(1, len(flat) // SAMPLES)
    # Coprime to the width: a multiple of it would read one column.
    while math.gcd(distance, tensor.shape[-1] if tensor.dim() else 1) > 1:
        distance -= 1
    return flat[::distance].to(torch.bfloat16)
