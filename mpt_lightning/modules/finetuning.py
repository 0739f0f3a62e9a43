"""Fine-tuning: every weight of the backbone, or its output head alone."""

from typing import Any

from torch import nn

from mpt_lightning.backbones import Backbone
from mpt_lightning.errors import MPTError
from mpt_lightning.modules.adapted import AdaptedModule
from mpt_lightning.modules.options import Trained


class FineTuning(AdaptedModule):
    """Fine-tuning, of the whole backbone or of its output head.

    A checkpoint holds the trained weights in full: with train="all" the whole model.

    Args:
        backbone: Hub id ("google-t5/t5-base") or folder of the model.
        train: "all" trains every weight; "head" the output layer [V, H] on a frozen body. A head that is tied to the
            input embeddings starts as their copy, and the embeddings stay.
        lr: learning rate.
        **kwargs: see `BuiltModule`.

    Raises:
        MPTError: an argument has an impossible value, or the weights would be trained in a precision too low.
    """

    def __init__(self, backbone: str, train: Trained = "all", lr: float = 1e-4, **kwargs: Any) -> None:
        super().__init__(backbone=backbone, **kwargs)
        for argument, only in (("backbone_dtype", "float32"), ("backbone_quantization", None)):
            if self.hparams[argument] != only:
                raise MPTError(
                    f"FineTuning trains the backbone's weights, and with {argument}={self.hparams[argument]!r} small "
                    f"updates would be lost. Leave {argument} at {only}; --trainer.precision bf16-mixed saves memory."
                )

    def adaptation(self) -> dict[str, Any]:
        """Give what is trained."""
        return {"train": self.hparams["train"]}

    def change(self, backbone: Backbone) -> None:
        """Free the weights."""
        if self.hparams["train"] == "all":
            backbone.model.requires_grad_(True)
            return
        head = backbone.model.get_output_embeddings()
        if head is None:
            raise MPTError(
                f"{type(backbone.model).__name__} ({backbone.name}) has no output layer to train. Set train='all'."
            )
        if head.weight is backbone.embeddings:
            head.weight = nn.Parameter(head.weight.detach().clone())
        head.requires_grad_(True)
