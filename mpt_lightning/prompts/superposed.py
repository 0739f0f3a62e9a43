"""SuperPos-Prompt (Sadraei Javaheri et al., 2024): prompts as weighted sums of vocabulary embeddings."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpt_lightning.errors import MPTError
from mpt_lightning.prompts.base import PromptOutput, TokenPrompt


class SuperposedPrompt(TokenPrompt):
    """Each prompt token is a weighted sum of the frozen embeddings of N vocabulary tokens (128 in the paper).

    A task's prompt tokens share the vocabulary tokens; only the weights `[T, P, N]` are trained. See `Prompt`
    for the other arguments.

    Args:
        token_ids: [T][N] the vocabulary tokens of each task.

    Raises:
        MPTError: If `token_ids` is not one list per task, or the lists differ in length.
    """

    per_task = ("weights", "embeddings", "token_ids")

    def __init__(
        self,
        num_tasks: int,
        length: int,
        dim: int,
        token_ids: Sequence[Sequence[int]],
        tasks: Sequence[str] | None = None,
    ) -> None:
        super().__init__(num_tasks, length, dim, tasks)
        if len(token_ids) != num_tasks or len({len(ids) for ids in token_ids}) != 1 or not token_ids[0]:
            raise MPTError(f"token_ids must be {num_tasks} lists of one length, got {list(map(len, token_ids))}.")
        self.token_ids = [list(ids) for ids in token_ids]
        count = len(self.token_ids[0])
        # With this scale a token's norm is at first that of an embedding.
        self.weights = nn.Parameter(torch.randn(num_tasks, length, count) / count**0.5)
        self.register_buffer("embeddings", torch.zeros(num_tasks, count, dim), persistent=False)

    def forward(self, task_ids: Tensor) -> PromptOutput:
        """Return the prompts `[U, P, H]` of the tasks `[U]`."""
        return PromptOutput(self.weights[task_ids] @ self.attached()[task_ids])

    def add_task(self, task: str, like: str | None = None) -> None:
        """Add a task over the tokens of `like`, by default of the first task; see `Prompt.add_task`."""
        # The mean of weights over different tokens has no meaning.
        super().add_task(task, self.tasks[0] if like is None else like)
