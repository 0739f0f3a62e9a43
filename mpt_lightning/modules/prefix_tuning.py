"""Prefix tuning: keys and values for every layer, of one task or of many."""

from typing import Any

import torch

from mpt_lightning.backbones import Backbone, CausalBackbone
from mpt_lightning.errors import MPTError
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.modules.initialization import initial_prompt
from mpt_lightning.modules.options import PrefixInit, PromptInit
from mpt_lightning.prompts.prefix import PrefixPrompt


class PrefixTuning(PromptModule):
    """Prefix tuning (Li and Liang, 2021), on decoder-only models.

    Args:
        backbone: Hub id ("gpt2") or folder of the frozen model.
        prompt_length: P, keys and values per layer and head.
        prefix_init: "vocabulary" and "text" start from what the model makes of real tokens, which few-shot runs need
            (the paper's section 4.3 and appendix); "random" from a normal distribution. A network starts at random.
        init_text: the text of prefix_init="text".
        projection: train through a network, as the paper does, rather than the keys and values themselves.
        network_width: inner width of the network; by default that of the hidden states.
        lr: learning rate.
        **kwargs: see `BuiltModule`.
    """

    def __init__(
        self,
        backbone: str,
        prompt_length: int = 20,
        prefix_init: PrefixInit = "vocabulary",
        init_text: str | None = None,
        projection: bool = False,
        network_width: int | None = None,
        lr: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)

    def build_prompt(self, backbone: Backbone) -> PrefixPrompt:
        """Make the prefix.

        Raises:
            MPTError: the backbone is an encoder-decoder.
        """
        options, length = self.hparams, self.hparams["prompt_length"]
        if not isinstance(backbone, CausalBackbone):
            raise MPTError(
                f"PrefixTuning is for decoder-only models, and {backbone.name} is an encoder-decoder, whose encoder "
                "keeps no keys and values. Set --model.backbone to a decoder-only model, or use PromptTuning."
            )
        start: PromptInit = "text" if options["prefix_init"] == "text" else "vocabulary"
        with torch.no_grad():
            embeddings = initial_prompt(start, backbone, length, options["init_text"], [])
            layers = backbone.encode_prompts(embeddings[None].to(backbone.embeddings.device)).layers
        _, heads, _, width = layers[0][0].shape
        inner = (options["network_width"] or backbone.dim) if options["projection"] else None
        prompt = PrefixPrompt(len(self.tasks), length, len(layers), heads, width, self.tasks, inner)
        if inner is None and options["prefix_init"] != "random":
            prompt.initialize(layers)
        return prompt

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give one group: the prefixes."""
        _, prompt = self.parts()
        return [{"params": list(prompt.parameters()), "lr": self.hparams["lr"], "name": "prefixes"}]
