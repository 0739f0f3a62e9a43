"""Vanilla prompt tuning, of one task or of many at once: the baseline, and MPT's teachers."""

from typing import Any

import torch

from mpt_lightning.backbones import Backbone
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.modules.options import PromptInit
from mpt_lightning.modules.start import checkpoint_prompts, class_words, initial_prompt
from mpt_lightning.prompts import SoftPrompt


class PromptTuning(PromptModule):
    """Prompt tuning (Lester et al., 2021): one free prompt per task, the backbone frozen.

    Tasks do not share anything, so a run over many tasks trains each one's prompt as a run of its own would: one
    run makes all the teachers of MPT.

    Args:
        backbone: Hub id ("google-t5/t5-base") or folder of the frozen model.
        prompt_length: P, tokens per prompt.
        prompt_init: where prompts start: sampled vocabulary, the tokens of `init_text`, the class words, random, or
            the prompts of `init_checkpoint`.
        init_text: the text of prompt_init="text".
        init_checkpoint: the checkpoint of prompt_init="checkpoint".
        lr: learning rate.
        **kwargs: see `BuiltModule`.
    """

    def __init__(
        self,
        backbone: str,
        prompt_length: int = 100,
        prompt_init: PromptInit = "vocabulary",
        init_text: str | None = None,
        init_checkpoint: str | None = None,
        lr: float = 0.3,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)

    def build_prompt(self, backbone: Backbone) -> SoftPrompt:
        """Make one prompt per task, each with its own start."""
        options, length = self.hparams, self.hparams["prompt_length"]
        prompt = SoftPrompt(len(self.tasks), length, backbone.dim, self.tasks)
        if options["prompt_init"] == "checkpoint":
            starts = checkpoint_prompts(options["init_checkpoint"], backbone, self.tasks, length)
        else:
            starts = torch.stack(
                [
                    initial_prompt(
                        options["prompt_init"], backbone, length, options["init_text"], class_words(self.cards, [task])
                    )
                    for task in self.tasks
                ]
            )
        prompt.initialize(starts)
        return prompt

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give one group: the prompts."""
        _, prompt = self.parts()
        return [{"params": list(prompt.parameters()), "lr": self.hparams["lr"], "name": "prompts"}]
