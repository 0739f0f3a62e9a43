"""Prompts of plain embeddings: vanilla prompt tuning (Lester et al., 2021), and none."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpt_lightning.prompts.base import Prompt, PromptOutput
from mpt_lightning.prompts.init import random_uniform


class FreePrompt(Prompt):
    """Base class of prompts with trained embeddings `[T, P, H]`; see `Prompt` for the arguments."""

    per_task: tuple[str, ...] = ("prompt_embeddings",)

    def __init__(self, num_tasks: int, length: int, dim: int, tasks: Sequence[str] | None = None) -> None:
        super().__init__(num_tasks, length, dim, tasks)
        self.prompt_embeddings = nn.Parameter(random_uniform(num_tasks, length, dim))

    @torch.no_grad()
    def initialize(self, prompts: Tensor) -> None:
        """Start from embeddings `[T, P, H]`, or `[P, H]` for all tasks, before any network that they pass through."""
        self.prompt_embeddings.copy_(prompts)


class SoftPrompt(FreePrompt):
    """One free prompt `[P, H]` per task: prompt tuning, and the teachers of MPT; see `Prompt` for the arguments.

    Example:
        >>> prompt = SoftPrompt(num_tasks=3, length=4, dim=8)
        >>> prompt(torch.tensor([2, 0])).embeddings.shape
        torch.Size([2, 4, 8])
    """

    def forward(self, task_ids: Tensor) -> PromptOutput:
        """Return the prompts `[U, P, H]` of the tasks `[U]`."""
        return PromptOutput(self.prompt_embeddings[task_ids])


class EmptyPrompt(Prompt):
    """A prompt of no tokens, P = 0: tasks have names only; see `Prompt` for the arguments.

    It is for methods that train the backbone's own weights or use it as it is.

    Example:
        >>> EmptyPrompt(num_tasks=3, dim=8)(torch.tensor([2, 0])).embeddings.shape
        torch.Size([2, 0, 8])
    """

    least_length = 0
    content = "no prompt, but trained weights of the backbone"

    def __init__(self, num_tasks: int, dim: int, tasks: Sequence[str] | None = None) -> None:
        super().__init__(num_tasks, 0, dim, tasks)

    def forward(self, task_ids: Tensor) -> PromptOutput:
        """Return embeddings `[U, 0, H]` for the tasks `[U]`."""
        return PromptOutput(torch.zeros(len(task_ids), 0, self.dim, device=task_ids.device))
