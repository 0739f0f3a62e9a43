"""Hard prompts: a pattern and a verbalizer, scored by the backbone as it is."""

from collections.abc import Mapping
from typing import Any

from mpt_lightning.backbones import Backbone
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.prompts import EmptyPrompt


class HardPrompt(PromptModule):
    """Patterns and verbalizers (PET; Schick and Schuetze, 2021), scored without training.

    The pattern is the card's `input`, or the one of its `patterns` that the DataModule's `pattern` names; the
    verbalizer is its `choices`. Nothing is trained: `validate`, `test` and `predict` need no checkpoint. See
    `BackboneModule` for the arguments.
    """

    @classmethod
    def needs_checkpoint(cls, arguments: Mapping[str, Any]) -> bool:
        """Return False: nothing is trained."""
        return False

    def configure_model(self) -> None:
        """Load the backbone, and build the prompt again, for the tasks of this run."""
        self.prompt = None
        super().configure_model()

    def build_prompt(self, backbone: Backbone) -> EmptyPrompt:
        """Return a prompt without tokens, which holds the tasks' names."""
        return EmptyPrompt(len(self.tasks), backbone.dim, self.tasks)
