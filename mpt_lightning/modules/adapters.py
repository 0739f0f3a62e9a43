"""Bottleneck adapters in a frozen backbone."""

from typing import Annotated, Any

from mpt_lightning.arguments import NonNegativeFloat, PositiveInt, Range
from mpt_lightning.backbones import Backbone
from mpt_lightning.backbones.bottleneck import Places, add_adapters
from mpt_lightning.modules.finetuning import AdaptedModule


class Adapters(AdaptedModule):
    """Bottleneck adapters (Houlsby et al., 2019): small networks after the sublayers of a frozen backbone.

    They begin as the identity, so training starts at the backbone's own answers.

    Args:
        backbone: Hub id ("google-t5/t5-base") or folder of the frozen model: T5, GPT-2, Llama or one with its layers,
            BLOOM, GPT-NeoX.
        size: Features of the bottleneck.
        places: "houlsby" puts one after each attention and each feed-forward sublayer, "pfeiffer" (Pfeiffer et al.,
            2021) after the feed-forward sublayer only.
        dropout: Dropout of the bottleneck's features.
        lr: Learning rate.
        **kwargs: See `BackboneModule`.
    """

    def __init__(
        self,
        backbone: str,
        size: PositiveInt = 64,
        places: Places = "houlsby",
        dropout: Annotated[float, Range(0, 1, below=True)] = 0.0,
        lr: NonNegativeFloat = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)
        self.size, self.places, self.dropout, self.lr = size, places, dropout, lr

    def adaptation(self) -> dict[str, Any]:
        """Return the adapters' shape and places."""
        return {"size": self.size, "places": self.places}

    def change(self, backbone: Backbone) -> None:
        """Put the adapters into the model."""
        add_adapters(backbone, self.size, self.places, self.dropout)
