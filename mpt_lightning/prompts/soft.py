"""Vanilla prompt tuning (Lester et al., 2021): one free prompt per task."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpt_lightning.prompts.base import Prompt, PromptOutput
from mpt_lightning.prompts.init import random_uniform


class SoftPrompt(Prompt):
    """One free prompt `[P, H]` per task: prompt tuning, and the teachers of MPT.

    Args:
        num_tasks: T.
        length: P, tokens per prompt.
        dim: H.
        tasks: [T] names of the rows.

    Example:
        >>> prompt = SoftPrompt(num_tasks=3, length=4, dim=8)
        >>> prompt(torch.tensor([2, 0])).embeddings.shape
        torch.Size([2, 4, 8])
    """

    def __init__(self, num_tasks: int, length: int, dim: int, tasks: Sequence[str] | None = None) -> None:
        super().__init__(num_tasks, length, dim, tasks)
        self.prompt_embeddings = nn.Parameter(random_uniform(num_tasks, length, dim))

    def forward(self, task_ids: Tensor) -> PromptOutput:
        """Return the prompts `[U, P, H]` of the tasks `[U]`."""
        return PromptOutput(self.prompt_embeddings[task_ids])

    def initialize(self, prompts: Tensor) -> None:
        """Start from given prompts.

        Args:
            prompts: [T, P, H], or [P, H] for all tasks alike.
        """
        with torch.no_grad():
            self.prompt_embeddings.copy_(prompts)

    def task_parameters(self) -> list[str]:
        """Give the names of the parameters with one row per task."""
        return ["prompt_embeddings"]

    def config(self) -> dict[str, Any]:
        """Give the constructor's arguments."""
        return {"num_tasks": self.num_tasks, "length": self.length, "dim": self.dim, "tasks": list(self.tasks)}
