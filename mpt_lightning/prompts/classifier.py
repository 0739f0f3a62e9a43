"""A classifier per task on the first token's last hidden state, beside a prompt or alone."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpt_lightning.errors import MPTError
from mpt_lightning.prompts.base import Prompt, PromptOutput
from mpt_lightning.prompts.init import random_uniform


class ClassifierPrompt(Prompt):
    """P prompt tokens, which may be none, and a new linear layer per task that reads [CLS]; see `Prompt`.

    Args:
        class_counts: [T] the number of classes of each task, at least 2.
        hidden: D, the size of the model's hidden states.

    Example:
        >>> prompt = ClassifierPrompt(num_tasks=2, length=0, dim=8, class_counts=[2, 3], hidden=16)
        >>> weight, bias = prompt(torch.tensor([1, 0])).head
        >>> weight.shape, bias[1]
        (torch.Size([2, 3, 16]), tensor([0., 0., -inf], grad_fn=<SelectBackward0>))
    """

    least_length = 0
    content = "a classifier"
    per_task: tuple[str, ...] = ("prompt_embeddings", "weight", "bias", "class_counts")

    def __init__(
        self,
        num_tasks: int,
        length: int,
        dim: int,
        class_counts: Sequence[int],
        hidden: int,
        tasks: Sequence[str] | None = None,
    ) -> None:
        super().__init__(num_tasks, length, dim, tasks)
        if len(class_counts) != num_tasks or min(class_counts) < 2 or hidden < 1:
            raise MPTError(
                f"Expected {num_tasks} counts of at least 2, and a size of at least 1: {class_counts=}, {hidden=}."
            )
        self.class_counts, self.hidden = list(class_counts), hidden
        self.prompt_embeddings = nn.Parameter(random_uniform(num_tasks, length, dim))
        # As transformers starts a new classifier.
        self.weight = nn.Parameter(0.02 * torch.randn(num_tasks, max(class_counts), hidden))
        self.bias = nn.Parameter(torch.zeros(num_tasks, max(class_counts)))

    def check_classes(self, task: str, count: int) -> None:
        """Raise MPTError if a task has another number of classes than its classifier."""
        if (own := self.class_counts[self.index(task)]) != count:
            raise MPTError(
                f"The classifier of {task} has {own} classes, and the task's card has {count}. Use the card that it "
                "was trained with, or train a new classifier."
            )

    def forward(self, task_ids: Tensor) -> PromptOutput:
        """Return the prompts `[U, P, H]` and the classifiers of the tasks `[U]`; a class that a task lacks has -inf."""
        counts = torch.tensor(self.class_counts, device=task_ids.device)[task_ids]
        absent = torch.arange(self.bias.shape[1], device=task_ids.device) >= counts[:, None]
        bias = self.bias[task_ids].masked_fill(absent, float("-inf"))
        return PromptOutput(self.prompt_embeddings[task_ids], head=(self.weight[task_ids], bias))
