"""Prefix tuning: keys and values for every layer, of one task or of many."""

from typing import Any, Literal

import torch

from mpt_lightning.arguments import NonNegativeFloat, PositiveInt
from mpt_lightning.backbones import Backbone
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.modules.initialization import PromptInit, initial_prompt
from mpt_lightning.prompts.prefix import PrefixPrompt


class PrefixTuning(PromptModule):
    """Prefix tuning (Li and Liang, 2021) on decoder-only models, and P-tuning v2 (Liu et al., 2022) on masked ones.

    Args:
        backbone: Hub id ("gpt2") or folder of the frozen model.
        prompt_length: P, keys and values per layer and head.
        prefix_init: "vocabulary" and "text" start from the keys and values of real tokens, which few-shot runs need
            (the paper's section 4.3 and appendix); "random" from a normal distribution. A network starts at random.
        init_text: The text of prefix_init="text".
        projection: Train through a network, as the paper does, rather than the keys and values themselves.
        network_width: Inner width of the network; that of the hidden states by default.
        lr: Learning rate.
        **kwargs: See `BackboneModule`.
    """

    families = ("causal", "masked")
    group_name = "prefixes"
    fixed_arguments = (*PromptModule.fixed_arguments, "prompt_length", "projection")
    initial_arguments = (*PromptModule.initial_arguments, "prefix_init", "init_text", "network_width")

    def __init__(
        self,
        backbone: str,
        prompt_length: PositiveInt = 20,
        prefix_init: Literal["vocabulary", "text", "random"] = "vocabulary",
        init_text: str | None = None,
        projection: bool = False,
        network_width: PositiveInt | None = None,
        lr: NonNegativeFloat = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)
        self.prompt_length = prompt_length
        self.prefix_init, self.init_text = prefix_init, init_text
        self.projection, self.network_width = projection, network_width
        self.lr = lr

    def build_prompt(self, backbone: Backbone) -> PrefixPrompt:
        """Build the prefix."""
        start: PromptInit = "text" if self.prefix_init == "text" else "vocabulary"
        with torch.no_grad():
            embeddings = initial_prompt(start, backbone, self.prompt_length, self.init_text, [])
            layers = backbone.keys_and_values(embeddings[None].to(backbone.embeddings))
        _, heads, _, width = layers[0][0].shape
        inner = (self.network_width or backbone.dim) if self.projection else None
        prompt = PrefixPrompt(len(self.tasks), self.prompt_length, len(layers), heads, width, self.tasks, inner)
        if inner is None and self.prefix_init != "random":
            prompt.initialize(layers)
        return prompt
