"""Identifying a backbone by its weights."""

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
    """Return two short hashes of a model's weights, "<12 digits>-<12 digits>".

    The second is that of the weights that quantization changes: linear layers except the output layer. For a quantized
    model it is the word "quantized". The first covers everything else.

    A hash covers the shape of each parameter and saved buffer and a sample of its values: all of up to 4,096 values,
    and at least 4,096 of larger tensors at equal distances, over all columns. So it detects merged adapters, a tuned
    head and further training. It misses a change outside the sample, such as one row of a large embedding table.

    Values are rounded to bfloat16, so that the hash is the same in another precision or on another device. It does not
    depend on names or tied weights: a tensor counts wherever the model uses it. The model must be neither sharded nor
    adapted.
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
        buffers = dict(module.named_buffers(recurse=False))
        saved = [buffer for name, buffer in buffers.items() if name not in module._non_persistent_buffers_set]
        yield from ((module, tensor) for tensor in (*module.parameters(recurse=False), *saved))


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
