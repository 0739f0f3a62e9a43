"""Bottleneck adapters (Houlsby et al., 2019): small networks after the sublayers of a model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpt_lightning.backbones.base import Backbone
from mpt_lightning.errors import MPTError

Places = Literal["houlsby", "pfeiffer"]


@dataclass(frozen=True)
class Architecture:
    """The names of the parts of a model's sublayers, the last with a path; an adapter comes after the last one."""

    name: str
    attention: tuple[str, ...]
    feed_forward: tuple[str, ...]


ARCHITECTURES = (
    Architecture("T5", ("q", "k", "v", "o"), ("wi", "wo")),
    Architecture("T5 1.1", ("q", "k", "v", "o"), ("wi_0", "wi_1", "wo")),
    Architecture("GPT-2", ("c_attn", "c_proj"), ("c_fc", "c_proj")),
    Architecture("Llama", ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")),
    Architecture("BLOOM", ("query_key_value", "dense"), ("dense_h_to_4h", "dense_4h_to_h")),
    Architecture("BERT", ("self", "output.dense"), ("intermediate", "output.dense")),  # RoBERTa, ELECTRA, DeBERTa, ...
    Architecture("DistilBERT", ("q_lin", "k_lin", "v_lin", "out_lin"), ("lin1", "lin2")),
    Architecture("ALBERT", ("query", "key", "value", "dense"), ("ffn", "ffn_output")),
    Architecture("ModernBERT", ("Wqkv", "Wo"), ("Wi", "Wo")),
    Architecture("GPT-NeoX", ("query_key_value", "dense"), ("dense_h_to_4h", "dense_4h_to_h")),
)


class Bottleneck(nn.Module):
    """An adapter: down to `size` features with dropout, a nonlinearity, and up again, added to its input.

    It starts as the identity, since the up-projection starts at zero. It computes in its own precision.
    """

    def __init__(self, dim: int, size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.down = nn.Linear(dim, size)
        self.up = nn.Linear(size, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return adapted hidden states `[..., H]`."""
        change = self.up(self.dropout(torch.relu(self.down(hidden.to(self.down.weight.dtype)))))
        return hidden + change.to(hidden.dtype)


def _adapted(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    adapter: Any = module.adapter
    return adapter(output)


def _projections(model: nn.Module, sublayers: list[tuple[str, ...]]) -> Iterator[nn.Module]:
    for module in model.modules():
        children = {name for name, _ in module.named_children()}
        fits = (names for names in sublayers if children >= {name.split(".")[0] for name in names})
        if names := next(fits, None):
            yield module.get_submodule(names[-1])


def add_adapters(backbone: Backbone, size: int, places: Places = "houlsby", dropout: float = 0.0) -> list[Bottleneck]:
    """Put adapters after sublayers of a model, before their output is added to the residual; return the adapters.

    The places are, for "houlsby", after attention (a decoder's cross-attention too) and feed-forward, for "pfeiffer"
    after feed-forward only. Adapters are trainable, in fp32. A model with other names of layers is an MPTError.
    """
    found = {
        "attention": list(_projections(backbone.model, [row.attention for row in ARCHITECTURES])),
        "feed-forward": list(_projections(backbone.model, [row.feed_forward for row in ARCHITECTURES])),
    }
    if unknown := [kind for kind, projections in found.items() if not projections]:
        raise MPTError(
            f"{type(backbone.model).__name__} ({backbone.name}) has no known {' or '.join(unknown)} layers. "
            f"Use a model with the layers of {', '.join(row.name for row in ARCHITECTURES)}, or PEFTModule."
        )
    chosen = found["feed-forward"] if places == "pfeiffer" else [*found["attention"], *found["feed-forward"]]
    adapters = []
    for projection in chosen:
        width: Any = getattr(projection, "out_features", None) or projection.nf  # GPT-2's Conv1D has `nf`
        adapter = Bottleneck(width, size, dropout)
        # A hook keeps the projection's class and weight, which some models read.
        projection.adapter = adapter
        projection.register_forward_hook(_adapted)
        adapters.append(adapter)
    return adapters
