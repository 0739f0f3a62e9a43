"""Prompts that are trained through a network, which is not needed after training: `fold` returns the plain prompt."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from mpt_lightning.errors import MPTError
from mpt_lightning.prompts.networks import ENCODERS, through_networks
from mpt_lightning.prompts.output import PromptOutput
from mpt_lightning.prompts.soft import FreePrompt

EncoderName = Literal["residual", "mlp", "lstm"]


class EncodedPrompt(FreePrompt):
    """One free prompt per task, each passed through a separate network; see `Prompt` for the other arguments.

    Args:
        encoder: "residual" adds a bottleneck network's output to the prompt (Razdaibiedina et al., 2023, section 3);
            "mlp" and "lstm" are those of P-tuning (Liu et al., 2021, section 3.2; `peft/tuners/p_tuning/model.py`).
        hidden: Width of the network's inner layers; H by default, H / 2 for "residual".

    Raises:
        MPTError: If the encoder is unknown, or a width is below 1.

    Example:
        >>> import torch
        >>> prompt = EncodedPrompt(num_tasks=2, length=4, dim=8, encoder="lstm", hidden=6)
        >>> prompt(torch.tensor([1])).embeddings.shape
        torch.Size([1, 4, 8])
    """

    per_task = ("prompt_embeddings", "encoders")

    def __init__(
        self,
        num_tasks: int,
        length: int,
        dim: int,
        tasks: Sequence[str] | None = None,
        encoder: EncoderName = "residual",
        hidden: int | None = None,
    ) -> None:
        super().__init__(num_tasks, length, dim, tasks)
        if encoder not in ENCODERS:
            raise MPTError(f"encoder must be one of {', '.join(ENCODERS)}, got {encoder!r}.")
        self.encoder = encoder
        self.hidden = hidden if hidden is not None else max(1, dim // 2) if encoder == "residual" else dim
        if self.hidden < 1:
            raise MPTError(f"hidden must be at least 1, got {hidden}.")
        # One per task: with a shared network a task's training would depend on the other tasks.
        self.encoders = nn.ModuleList(ENCODERS[encoder](dim, self.hidden) for _ in range(num_tasks))

    def forward(self, task_ids: Tensor) -> PromptOutput:
        """Return the prompts `[U, P, H]` of the tasks `[U]`."""
        return PromptOutput(through_networks(self.prompt_embeddings, self.encoders, task_ids))
