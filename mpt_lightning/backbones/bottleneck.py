"""Bottleneck adapters (Houlsby et al., 2019): small networks after the sublayers of a model."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpt_lightning.backbones.base import Backbone
from mpt_lightning.errors import MPTError

Places = Literal["houlsby", "pfeiffer"]

# The last projection of a sublayer, by the names of the layers in it: T5; GPT-2; Llama and its kin; BLOOM, GPT-NeoX.
ATTENTION = {
    ("q", "k", "v", "o"): "o",
    ("c_attn", "c_proj"): "c_proj",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "o_proj",
    ("query_key_value", "dense"): "dense",
}
FEED_FORWARD = {
    ("wi", "wo"): "wo",
    ("wi_0", "wi_1", "wo"): "wo",
    ("c_fc", "c_proj"): "c_proj",
    ("gate_proj", "up_proj", "down_proj"): "down_proj",
    ("dense_h_to_4h", "dense_4h_to_h"): "dense_4h_to_h",
}


class Bottleneck(nn.Module):
    """An adapter: down to a few features, a nonlinearity, and up again, added to its input.

    It begins as the identity, since the way up begins at zero. It computes in its own precision.

    Args:
        dim: H.
        size: features in between.
        dropout: of these features, in training.
    """

    def __init__(self, dim: int, size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.down = nn.Linear(dim, size)
        self.up = nn.Linear(size, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Give `[..., H]` for `[..., H]`."""
        change = self.up(self.dropout(torch.relu(self.down(hidden.to(self.down.weight.dtype)))))
        return hidden + change.to(hidden.dtype)


def _adapted(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    adapter: Any = module.adapter
    return adapter(output)


def _projections(model: nn.Module, sublayers: dict[tuple[str, ...], str]) -> Iterator[nn.Module]:
    for module in model.modules():
        children = dict(module.named_children())
        for names, last in sublayers.items():
            if children.keys() >= set(names):
                yield children[last]
                break


def add_adapters(backbone: Backbone, size: int, places: Places = "houlsby", dropout: float = 0.0) -> list[Bottleneck]:
    """Put an adapter after sublayers of each layer of a model, before what they give is added to the residual.

    Args:
        backbone: its model is changed.
        size: features of the bottleneck.
        places: "houlsby" after attention (a decoder's cross-attention too) and feed-forward, "pfeiffer" after
            feed-forward only.
        dropout: of the bottleneck.

    Returns:
        The adapters, trainable, in fp32.

    Raises:
        MPTError: the model's layers are of no known kind.
    """
    found = {kind: list(_projections(backbone.model, known)) for kind, known in _KINDS.items()}
    if unknown := [kind for kind, projections in found.items() if not projections]:
        raise MPTError(
            f"{type(backbone.model).__name__} ({backbone.name}) has no {' and no '.join(unknown)} sublayer of a known "
            "kind. Adapters know the layers of T5, GPT-2, Llama (and models with its layers), BLOOM and GPT-NeoX; "
            "use one of these as --model.backbone, or PEFTModule."
        )
    chosen = found["feed-forward"] if places == "pfeiffer" else [*found["attention"], *found["feed-forward"]]
    adapters = []
    for projection in chosen:
        width: Any = getattr(projection, "out_features", None) or projection.nf  # GPT-2's Conv1D has `nf`
        adapter = Bottleneck(width, size, dropout)
        # A hook leaves the projection what it is: models look at its weight.
        projection.adapter = adapter
        projection.register_forward_hook(_adapted)
        adapters.append(adapter)
    return adapters


_KINDS = {"attention": ATTENTION, "feed-forward": FEED_FORWARD}
