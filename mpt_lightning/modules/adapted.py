"""What the methods that train or add weights share: no prompt, and a backbone whose model was changed."""

from abc import abstractmethod
from typing import Any

from mpt_lightning.backbones import Backbone
from mpt_lightning.errors import MPTError
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.prompts import EmptyPrompt

ADAPTATION = "adaptation"
"""The key under which a checkpoint says what was done to the model."""


class AdaptedModule(PromptModule):
    """A backbone whose own weights are trained, or that was given weights to train; see `BuiltModule`.

    One model serves all tasks: they differ in their texts alone.
    """

    @abstractmethod
    def change(self, backbone: Backbone) -> None:
        """Put what is trained into the model, or free what is there."""

    @abstractmethod
    def adaptation(self) -> dict[str, Any]:
        """Give as plain values all that decides what `change` does."""

    def adapt(self, backbone: Backbone) -> None:
        """Change the model that was just loaded.

        Raises:
            MPTError: nothing of it would be trained.
        """
        # Computed once and kept: that of the embeddings as they were loaded, which may be trained from here on.
        backbone.fingerprint  # noqa: B018
        before = set(backbone.modules())
        self.change(backbone)
        backbone.parts = [module for module in backbone.modules() if module not in before]
        if not any(parameter.requires_grad for parameter in backbone.parameters()):
            raise MPTError(f"{type(self).__name__} would train nothing: {self.adaptation()} leaves no free weight.")
        backbone.train(backbone.training)

    def build_prompt(self, backbone: Backbone) -> EmptyPrompt:
        """Give the tasks their names."""
        return EmptyPrompt(len(self.tasks), backbone.dim, self.tasks)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give one group: all that is trained."""
        backbone, _ = self.parts()
        trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        return [{"params": trained, "lr": self.hparams["lr"], "name": "weights"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what was done to the model."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[ADAPTATION] = self.adaptation()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the same was done to this model."""
        self.check_adaptation(checkpoint.get(ADAPTATION))
        super().on_load_checkpoint(checkpoint)

    def check_adaptation(self, found: dict[str, Any] | None) -> None:
        """Refuse a checkpoint of a model that was changed in another way.

        Raises:
            MPTError: it was.
        """
        if found is not None and found != self.adaptation():
            raise MPTError(
                f"The checkpoint was trained with {found}, and this run has {self.adaptation()}. Give the same "
                f"arguments to {type(self).__name__}, or train anew."
            )
