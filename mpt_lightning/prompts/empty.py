"""No prompt, for methods that train the backbone's own weights or use it as it is."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mpt_lightning.prompts.base import Prompt
from mpt_lightning.prompts.output import PromptOutput


class EmptyPrompt(Prompt):
    """A prompt of no tokens, P = 0: tasks have names only; see `Prompt` for the arguments.

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
