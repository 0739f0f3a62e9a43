"""Bottleneck adapters in a frozen backbone."""

from typing import Any

from mpt_lightning.backbones import Backbone
from mpt_lightning.backbones.bottleneck import Places, add_adapters
from mpt_lightning.errors import MPTError
from mpt_lightning.modules.adapted import AdaptedModule


class Adapters(AdaptedModule):
    """Bottleneck adapters (Houlsby et al., 2019): small networks after the sublayers of a frozen backbone.

    They begin as the identity, so training starts at the backbone's own answers.

    Args:
        backbone: Hub id ("google-t5/t5-base") or folder of the frozen model: T5, GPT-2, Llama or one with its layers,
            BLOOM, GPT-NeoX.
        size: features of the bottleneck.
        places: "houlsby" puts one after each attention and each feed-forward sublayer, "pfeiffer" (Pfeiffer et al.,
            2021) after the feed-forward sublayer only.
        dropout: dropout of the bottleneck's features.
        lr: learning rate.
        **kwargs: see `BuiltModule`.

    Raises:
        MPTError: an argument has an impossible value.
    """

    def __init__(
        self,
        backbone: str,
        size: int = 64,
        places: Places = "houlsby",
        dropout: float = 0.0,
        lr: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)
        if not 0 <= dropout < 1:
            raise MPTError(f"dropout must be at least 0 and below 1, got {dropout}.")

    def adaptation(self) -> dict[str, Any]:
        """Give the adapters' shape and places."""
        return {name: self.hparams[name] for name in ("size", "places")}

    def change(self, backbone: Backbone) -> None:
        """Put the adapters into the model."""
        add_adapters(backbone, self.hparams["size"], self.hparams["places"], self.hparams["dropout"])
