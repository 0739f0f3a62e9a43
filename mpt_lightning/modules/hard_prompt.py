"""Hard prompts: a pattern and a verbaliser, scored by the backbone as it is."""

from typing import Any

from mpt_lightning.backbones import Backbone
from mpt_lightning.errors import MPTError
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.prompts import EmptyPrompt


class HardPrompt(PromptModule):
    """Patterns and verbalisers (PET; Schick and Schuetze, 2021), scored without training.

    The pattern is the card's `input`, or the one of its `patterns` that the DataModule's `pattern` names; the
    verbaliser is its `choices`. Nothing is trained: `validate`, `test` and `predict` need no checkpoint.

    Args:
        backbone: Hub id ("google-t5/t5-base") or folder of the model.
        **kwargs: see `BuiltModule`.
    """

    def __init__(self, backbone: str, **kwargs: Any) -> None:
        super().__init__(backbone=backbone, **kwargs)

    @classmethod
    def needs_checkpoint(cls, arguments: Any) -> bool:
        """Say that evaluating takes no checkpoint."""
        return False

    def _fits(self) -> bool:
        # There is no training that a prompt could come from.
        return self._trainer is not None

    def setup(self, stage: str) -> None:
        """Take the data's tasks.

        Raises:
            MPTError: this is a training run.
        """
        super().setup(stage)
        if stage == "fit":
            raise MPTError(
                "HardPrompt trains nothing: run `mpt validate` or `mpt test` (in Python trainer.validate or "
                "trainer.test), or train with FineTuning(train='head'), PromptTuning or another method."
            )
        self.tasks = self._data_tasks()

    def configure_model(self) -> None:
        """Load the backbone; the prompt is empty, and of the tasks of this run."""
        self.prompt = None
        super().configure_model()

    def build_prompt(self, backbone: Backbone) -> EmptyPrompt:
        """Give the tasks their names."""
        return EmptyPrompt(len(self.tasks), backbone.dim, self.tasks)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give no group: nothing is trained."""
        return []
