"""Vanilla prompt tuning, of one task or of many at once: the baseline, and MPT's teachers."""

from typing import Any

from mpt_lightning.backbones import Backbone
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.modules.initialization import checkpoint_prompts, initial_prompts
from mpt_lightning.modules.options import PromptInit, Reparameterization
from mpt_lightning.prompts import EncodedPrompt, Prompt, SoftPrompt, SuperposedPrompt
from mpt_lightning.prompts.init import vocabulary_ids


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
        reparameterization: what a prompt is trained through: "none"; "residual", a small network added to it
            (Razdaibiedina et al., 2023); "mlp" or "lstm", P-tuning's networks (Liu et al., 2021); "superposition",
            weights over 128 vocabulary tokens (SuperPos-Prompt, Sadraei Javaheri et al., 2024), whatever `prompt_init`.
        network_width: inner width of a network; by default that of the hidden states, half of it for "residual".
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
        reparameterization: Reparameterization = "none",
        network_width: int | None = None,
        lr: float = 0.3,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)

    def build_prompt(self, backbone: Backbone) -> Prompt:
        """Make one prompt per task, each with its own start."""
        options, length = self.hparams, self.hparams["prompt_length"]
        shape, kind = (len(self.tasks), length, backbone.dim), options["reparameterization"]
        if kind == "superposition":
            banned = backbone.tokenizer.all_special_ids
            size = len(backbone.embeddings)
            count = min(SUPERPOSED, size - len(set(banned)))
            tokens = [vocabulary_ids(size, count, exclude=banned) for _ in self.tasks]
            superposed = SuperposedPrompt(*shape, tokens, self.tasks)
            superposed.attach(backbone.embeddings)
            return superposed
        prompt: SoftPrompt | EncodedPrompt
        if kind == "none":
            prompt = SoftPrompt(*shape, self.tasks)
        else:
            prompt = EncodedPrompt(*shape, self.tasks, kind, options["network_width"])
        if options["prompt_init"] == "checkpoint":
            starts = checkpoint_prompts(options["init_checkpoint"], backbone, self.tasks, length)
        else:
            starts = initial_prompts(options, backbone, self.cards, self.tasks)
        prompt.initialize(starts)
        return prompt

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give one group: the prompts."""
        _, prompt = self.parts()
        return [{"params": list(prompt.parameters()), "lr": self.hparams["lr"], "name": "prompts"}]


SUPERPOSED = 128
"""The paper's number of tokens."""
