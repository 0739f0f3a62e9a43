"""Vanilla prompt tuning, of one task or of many at once: the baseline, and MPT's teachers."""

from typing import Any, Literal

import torch
from torch import Tensor

from mpt_lightning.arguments import NonNegativeFloat, PositiveInt
from mpt_lightning.backbones import Backbone
from mpt_lightning.errors import MPTError
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.modules.initialization import (
    PromptInit,
    build_classifier,
    checkpoint_prompts,
    initial_prompts,
)
from mpt_lightning.prompts import EncodedPrompt, Prompt, SoftPrompt, SuperposedPrompt
from mpt_lightning.prompts.init import vocabulary_ids

# The number of vocabulary tokens in SuperPos-Prompt's paper.
SUPERPOSED = 128


class PromptTuning(PromptModule):
    """Prompt tuning (Lester et al., 2021): one free prompt per task, the backbone frozen.

    Tasks share nothing, so one run over many tasks trains the same prompts as a separate run per task: it trains all
    the teachers of MPT.

    Args:
        backbone: Hub id ("google-t5/t5-base") or folder of the frozen model.
        prompt_length: P, tokens per prompt.
        prompt_init: Where prompts start: sampled vocabulary, the tokens of `init_text`, the class words, random, or
            the prompts of `init_checkpoint`.
        init_text: The text of prompt_init="text".
        init_checkpoint: The checkpoint of prompt_init="checkpoint".
        reparameterization: What a prompt is trained through: "none"; "residual", a small network added to it
            (Razdaibiedina et al., 2023); "mlp" or "lstm", P-tuning's networks (Liu et al., 2021); "superposition",
            weights over 128 vocabulary tokens (SuperPos-Prompt, Sadraei Javaheri et al., 2024), whatever `prompt_init`.
        network_width: Inner width of a network; that of the hidden states by default, half of it for "residual".
        head: "classification" trains a new classifier per task on a masked model's [CLS], beside the prompt, instead
            of reading the answer at the mask.
        lr: Learning rate.
        **kwargs: See `BackboneModule`.
    """

    title, paper = "Prompt tuning", "2104.08691"
    summary = "a free prompt per task before the input of a frozen model"
    fixed_arguments = (*PromptModule.fixed_arguments, "prompt_length", "reparameterization", "head")
    initial_arguments = (
        *PromptModule.initial_arguments, "prompt_init", "init_text", "init_checkpoint", "network_width",
    )  # fmt: skip

    def __init__(
        self,
        backbone: str,
        prompt_length: PositiveInt = 100,
        prompt_init: PromptInit = "vocabulary",
        init_text: str | None = None,
        init_checkpoint: str | None = None,
        reparameterization: Literal["none", "residual", "mlp", "lstm", "superposition"] = "none",
        network_width: PositiveInt | None = None,
        head: Literal["classification"] | None = None,
        lr: NonNegativeFloat = 0.3,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)
        self.prompt_length = prompt_length
        self.prompt_init = prompt_init
        self.init_text = init_text
        self.init_checkpoint = init_checkpoint
        self.reparameterization = reparameterization
        self.network_width = network_width
        self.head = head
        self.lr = lr
        if head is not None and reparameterization != "none":
            raise MPTError(
                f"head={head!r} has a free prompt beside it, got reparameterization={reparameterization!r}. Leave one "
                "of them unset."
            )

    def build_prompt(self, backbone: Backbone) -> Prompt:
        """Build one prompt per task, each with its own start."""
        length, kind = self.prompt_length, self.reparameterization
        shape = (len(self.tasks), length, backbone.dim)
        if self.head is not None:
            headed = build_classifier(backbone, self.cards, self.tasks, length)
            with torch.no_grad():
                headed.prompt_embeddings.copy_(self._start(backbone))
            return headed
        if kind == "superposition":
            banned, size = backbone.tokenizer.all_special_ids, len(backbone.embeddings)
            count = min(SUPERPOSED, size - len(set(banned)))
            tokens = [vocabulary_ids(size, count, exclude=banned) for _ in self.tasks]
            superposed = SuperposedPrompt(*shape, tokens, self.tasks)
            superposed.attach(backbone.embeddings)
            return superposed
        prompt: SoftPrompt | EncodedPrompt
        if kind == "none":
            prompt = SoftPrompt(*shape, self.tasks)
        else:
            prompt = EncodedPrompt(*shape, self.tasks, kind, self.network_width)
        prompt.initialize(self._start(backbone))
        return prompt

    def _start(self, backbone: Backbone) -> Tensor:
        """Return what the tasks' prompts start from, `[T, P, H]`."""
        length = self.prompt_length
        if self.prompt_init == "checkpoint":
            return checkpoint_prompts(self.init_checkpoint, backbone, self.tasks, length)
        return initial_prompts(self.prompt_init, backbone, length, self.init_text, self.cards, self.tasks)
