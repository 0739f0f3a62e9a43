"""Methods that train weights of the backbone: their base class, and fine-tuning."""

from abc import abstractmethod
from typing import Any, Literal

from torch import nn

from mpt_lightning.arguments import NonNegativeFloat
from mpt_lightning.backbones import Backbone
from mpt_lightning.errors import MPTError
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.modules.initialization import build_classifier
from mpt_lightning.prompts import EmptyPrompt, Prompt

# The key in a checkpoint of what was done to the model.
ADAPTATION = "adaptation"


class AdaptedModule(PromptModule):
    """A backbone with trained weights, its own or added ones; see `BackboneModule` for the arguments.

    There is no prompt, and one model serves all tasks: they differ in their texts alone.
    """

    @abstractmethod
    def change(self, backbone: Backbone) -> None:
        """Put what is trained into the model, or unfreeze what is there."""

    @abstractmethod
    def adaptation(self) -> dict[str, Any]:
        """Return as plain values everything that decides what `change` does."""

    def adapt(self, backbone: Backbone) -> None:
        """Change the model that was just loaded."""
        # Computed and cached now, from the weights as they were loaded.
        backbone.fingerprint  # noqa: B018
        before = set(backbone.modules())
        self.change(backbone)
        backbone.parts = [module for module in backbone.modules() if module not in before]
        if self.head is None and not any(parameter.requires_grad for parameter in backbone.parameters()):
            raise MPTError(f"{type(self).__name__} would train nothing: {self.adaptation()} leaves no free weight.")
        backbone.train(backbone.training)

    def build_prompt(self, backbone: Backbone) -> Prompt:
        """Return a prompt without tokens, which holds the tasks' names."""
        return EmptyPrompt(len(self.tasks), backbone.dim, self.tasks)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one group: everything that is trained."""
        backbone, prompt = self.parts()
        trained = [value for part in (backbone, prompt) for value in part.parameters() if value.requires_grad]
        return [{"params": trained, "lr": self.lr, "name": "weights"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what was done to the model."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[ADAPTATION] = self.adaptation()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the same was done to this model."""
        found = checkpoint.get(ADAPTATION)
        if found is not None and found != self.adaptation():
            raise MPTError(
                f"The checkpoint was trained with {found}, and this run has {self.adaptation()}. Give "
                f"{type(self).__name__} the same arguments, or start a new run."
            )
        super().on_load_checkpoint(checkpoint)


class FineTuning(AdaptedModule):
    """Fine-tuning, of the whole backbone or of its output head.

    A checkpoint holds the trained weights in full: with train="all" the whole model.

    Args:
        backbone: Hub id ("google-t5/t5-base") or folder of the model.
        train: "all" trains every weight; "head" the output layer [V, H] on a frozen body. A head that is tied to the
            input embeddings starts as their copy, and the embeddings stay.
        head: "classification" adds a new classifier per task on a masked model's [CLS], which replaces the language
            model's head: classic fine-tuning; with train="head" on a frozen body.
        lr: Learning rate.
        **kwargs: See `BackboneModule`.

    Raises:
        MPTError: If an argument has an impossible value, or the weights would be trained in too low a precision.
    """

    def __init__(
        self,
        backbone: str,
        train: Literal["all", "head"] = "all",
        head: Literal["classification"] | None = None,
        lr: NonNegativeFloat = 1e-4,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)
        self.trained, self.head, self.lr = train, head, lr
        for argument, only in (("backbone_dtype", "float32"), ("backbone_quantization", None)):
            if getattr(self, argument) != only:
                raise MPTError(
                    f"FineTuning trains the backbone's weights, and with {argument}={getattr(self, argument)!r} small "
                    f"updates would be lost. Leave {argument} at {only}; --trainer.precision bf16-mixed saves memory."
                )

    def adaptation(self) -> dict[str, Any]:
        """Return what is trained."""
        return {"train": self.trained} if self.head is None else {"train": self.trained, "head": self.head}

    def build_prompt(self, backbone: Backbone) -> Prompt:
        """Return the tasks' new classifiers if there are any, else an empty prompt."""
        if self.head is None:
            return super().build_prompt(backbone)
        return build_classifier(backbone, self.cards, self.tasks)

    def change(self, backbone: Backbone) -> None:
        """Unfreeze the weights."""
        if self.trained == "all":
            # A classifier replaces the language model's head.
            part = backbone.model if self.head is None else backbone.model.base_model
            part.requires_grad_(True)
            return
        if self.head is not None:
            return
        head = backbone.model.get_output_embeddings()
        if head is None:
            raise MPTError(
                f"{type(backbone.model).__name__} ({backbone.name}) has no output layer to train. Set train='all'."
            )
        if head.weight is backbone.embeddings:
            head.weight = nn.Parameter(head.weight.detach().clone())
        head.requires_grad_(True)
