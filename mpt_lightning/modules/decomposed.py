"""DePT: prompt tuning with a shorter prompt and a low-rank change of the text's embeddings."""

from typing import Any

from mpt_lightning.backbones import Backbone
from mpt_lightning.errors import MPTError
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.modules.initialization import initial_prompts
from mpt_lightning.modules.options import PromptInit
from mpt_lightning.prompts import DecomposedPrompt


class DePT(PromptModule):
    """Decomposed prompt tuning (Shi and Lipani, 2023), of one task or of many.

    Args:
        backbone: Hub id ("google-t5/t5-base") or folder of the frozen model.
        prompt_length: P, tokens per prompt. The paper trades 100 tokens for 40 and a rank of 45.
        rank: R of the matrices `[S, R]` and `[R, H]`, S the data's max_input_length.
        text_length: S, where the data has no max_input_length.
        prompt_init: where prompts start: sampled vocabulary, the tokens of `init_text`, the class words, or random.
        init_text: the text of prompt_init="text".
        lr: learning rate of the prompts.
        shift_lr: learning rate of the matrices; the paper's is smaller than the prompt's.
        **kwargs: see `BuiltModule`.
    """

    def __init__(
        self,
        backbone: str,
        prompt_length: int = 40,
        rank: int = 45,
        text_length: int = 256,
        prompt_init: PromptInit = "vocabulary",
        init_text: str | None = None,
        lr: float = 0.3,
        shift_lr: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)
        if prompt_init == "checkpoint":
            raise MPTError("DePT cannot start from a checkpoint; set prompt_init to vocabulary, text or labels.")

    def build_prompt(self, backbone: Backbone) -> DecomposedPrompt:
        """Make one prompt per task, each with its own start."""
        options, length = self.hparams, self.hparams["prompt_length"]
        longest = getattr(self._datamodule(), "max_input_length", None) or options["text_length"]
        prompt = DecomposedPrompt(len(self.tasks), length, backbone.dim, longest, options["rank"], self.tasks)
        prompt.initialize(initial_prompts(options, backbone, self.cards, self.tasks))
        return prompt

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give the prompts' group and the matrices'."""
        _, prompt = self.parts()
        named = dict(prompt.named_parameters())
        prompts = [named.pop("prompt_embeddings")]
        return [
            {"params": prompts, "lr": self.hparams["lr"], "name": "prompts"},
            {"params": list(named.values()), "lr": self.hparams["shift_lr"], "name": "shifts"},
        ]
