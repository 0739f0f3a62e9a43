"""DePT (Shi and Lipani, 2023): a shorter prompt, and a low-rank change of the text's own embeddings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpt_lightning.errors import MPTError
from mpt_lightning.prompts.base import Prompt, PromptOutput
from mpt_lightning.prompts.init import random_uniform


class DecomposedPrompt(Prompt):
    """Per task a free prompt `[P, H]`, and `A B` `[S, H]` that is added to the embeddings of the text's first S tokens.

    Args:
        num_tasks: T.
        length: P.
        dim: H.
        text_length: S, the longest text in tokens.
        rank: of A `[S, R]` and B `[R, H]`.
        tasks: [T] names of the rows.

    Raises:
        MPTError: a size is below 1.

    Example:
        >>> prompt = DecomposedPrompt(num_tasks=1, length=2, dim=8, text_length=5, rank=3)
        >>> output = prompt(torch.tensor([0]))
        >>> output.embeddings.shape, output.shift.shape
        (torch.Size([1, 2, 8]), torch.Size([1, 5, 8]))
    """

    content = "embeddings and a shift of the text's embeddings"

    def __init__(
        self, num_tasks: int, length: int, dim: int, text_length: int, rank: int, tasks: Sequence[str] | None = None
    ) -> None:
        super().__init__(num_tasks, length, dim, tasks)
        if min(text_length, rank) < 1:
            raise MPTError(f"text_length and rank must be at least 1, got {text_length} and {rank}.")
        self.text_length, self.rank = text_length, rank
        self.prompt_embeddings = nn.Parameter(random_uniform(num_tasks, length, dim))
        # B is zero, so that texts begin as they are.
        self.shift_cols = nn.Parameter(torch.randn(num_tasks, text_length, rank) / rank**0.5)
        self.shift_rows = nn.Parameter(torch.zeros(num_tasks, rank, dim))

    def forward(self, task_ids: Tensor) -> PromptOutput:
        """Return the prompts `[U, P, H]` and the shifts `[U, S, H]` of the tasks `[U]`."""
        shift = self.shift_cols[task_ids] @ self.shift_rows[task_ids]
        return PromptOutput(self.prompt_embeddings[task_ids], shift=shift)

    def initialize(self, prompts: Tensor) -> None:
        """Start from given prompts.

        Args:
            prompts: [T, P, H], or [P, H] for all tasks alike.
        """
        with torch.no_grad():
            self.prompt_embeddings.copy_(prompts)

    def task_parameters(self) -> list[str]:
        """Give the names of the parameters: all have one row per task."""
        return ["prompt_embeddings", "shift_cols", "shift_rows"]

    def config(self) -> dict[str, Any]:
        """Give the constructor's arguments."""
        return {
            "num_tasks": self.num_tasks,
            "length": self.length,
            "dim": self.dim,
            "text_length": self.text_length,
            "rank": self.rank,
            "tasks": list(self.tasks),
        }
