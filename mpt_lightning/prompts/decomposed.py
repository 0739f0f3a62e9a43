"""DePT (Shi and Lipani, 2023): a shorter prompt, and a low-rank shift of the text's own embeddings."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpt_lightning.errors import MPTError
from mpt_lightning.prompts.base import PromptOutput
from mpt_lightning.prompts.soft import FreePrompt


class DecomposedPrompt(FreePrompt):
    """Per task a free prompt `[P, H]`, and `A B` `[S, H]` that is added to the embeddings of the text's first S tokens.

    See `Prompt` for the other arguments, and for the errors.

    Args:
        text_length: S, the longest text in tokens.
        rank: R of A `[S, R]` and B `[R, H]`.

    Example:
        >>> prompt = DecomposedPrompt(num_tasks=1, length=2, dim=8, text_length=5, rank=3)
        >>> output = prompt(torch.tensor([0]))
        >>> output.embeddings.shape, output.shift.shape
        (torch.Size([1, 2, 8]), torch.Size([1, 5, 8]))
    """

    content = "embeddings and a shift of the text's embeddings"
    per_task = ("prompt_embeddings", "shift_cols", "shift_rows")

    def __init__(
        self, num_tasks: int, length: int, dim: int, text_length: int, rank: int, tasks: Sequence[str] | None = None
    ) -> None:
        super().__init__(num_tasks, length, dim, tasks)
        if min(text_length, rank) < 1:
            raise MPTError(f"text_length and rank must be at least 1, got {text_length} and {rank}.")
        self.text_length, self.rank = text_length, rank
        # B is zero, so that texts are unchanged at the start.
        self.shift_cols = nn.Parameter(torch.randn(num_tasks, text_length, rank) / rank**0.5)
        self.shift_rows = nn.Parameter(torch.zeros(num_tasks, rank, dim))

    def forward(self, task_ids: Tensor) -> PromptOutput:
        """Return the prompts `[U, P, H]` and the shifts `[U, S, H]` of the tasks `[U]`."""
        shift = self.shift_cols[task_ids] @ self.shift_rows[task_ids]
        return PromptOutput(self.prompt_embeddings[task_ids], shift=shift)
