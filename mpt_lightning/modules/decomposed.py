"""DePT: prompt tuning with a shorter prompt and a low-rank change of the text's embeddings."""

from typing import Any

from mpt_lightning.arguments import NonNegativeFloat, PositiveInt
from mpt_lightning.backbones import Backbone
from mpt_lightning.errors import MPTError
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.modules.initialization import PromptInit, initial_prompts
from mpt_lightning.prompts import DecomposedPrompt


class DePT(PromptModule):
    """Decomposed prompt tuning (Shi and Lipani, 2023), of one task or of many.

    Args:
        backbone: Hub id ("google-t5/t5-base") or folder of the frozen model.
        prompt_length: P, tokens per prompt. The paper trades 100 tokens for 40 and a rank of 45.
        rank: R of the matrices `[S, R]` and `[R, H]`, S the data's max_input_length.
        text_length: S for data without a max_input_length.
        prompt_init: Where prompts start: sampled vocabulary, the tokens of `init_text`, the class words, or random.
        init_text: The text of prompt_init="text".
        lr: Learning rate of the prompts.
        shift_lr: Learning rate of the matrices; the paper's is smaller than the prompt's.
        **kwargs: See `BackboneModule`.
    """

    fixed_arguments = (*PromptModule.fixed_arguments, "prompt_length", "rank")
    initial_arguments = (*PromptModule.initial_arguments, "prompt_init", "init_text", "text_length")

    def __init__(
        self,
        backbone: str,
        prompt_length: PositiveInt = 40,
        rank: PositiveInt = 45,
        text_length: PositiveInt = 256,
        prompt_init: PromptInit = "vocabulary",
        init_text: str | None = None,
        lr: NonNegativeFloat = 0.3,
        shift_lr: NonNegativeFloat = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)
        if prompt_init == "checkpoint":
            raise MPTError("DePT cannot start from a checkpoint; set prompt_init to vocabulary, text or labels.")
        self.prompt_length, self.rank, self.text_length = prompt_length, rank, text_length
        self.prompt_init, self.init_text = prompt_init, init_text
        self.lr, self.shift_lr = lr, shift_lr

    def build_prompt(self, backbone: Backbone) -> DecomposedPrompt:
        """Build one prompt per task, each with its own start."""
        longest = getattr(self._datamodule(), "max_input_length", None) or self.text_length
        prompt = DecomposedPrompt(len(self.tasks), self.prompt_length, backbone.dim, longest, self.rank, self.tasks)
        starts = initial_prompts(self.prompt_init, backbone, self.prompt_length, self.init_text, self.cards, self.tasks)
        prompt.initialize(starts)
        return prompt

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the prompts' group and the matrices'."""
        _, prompt = self.parts()
        named = dict(prompt.named_parameters())
        prompts = [named.pop("prompt_embeddings")]
        return [
            {"params": prompts, "lr": self.lr, "name": "prompts"},
            {"params": list(named.values()), "lr": self.shift_lr, "name": "shifts"},
        ]
