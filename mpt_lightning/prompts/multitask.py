"""Multitask prompt tuning (Wang et al., ICLR 2023): a shared prompt times low-rank task matrices."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mpt_lightning.errors import MPTError
from mpt_lightning.prompts.base import Prompt, PromptOutput
from mpt_lightning.prompts.init import random_uniform


class MultitaskPrompt(Prompt):
    r"""`P^_k = P* (Hadamard) W_k` with `W_k = sum_r u_kr v_kr^T` (paper section 3.1; rank one there).

    All tasks train the shared prompt P* `[P, H]` (the slow weights); each task trains its factors u `[P, R]` and
    v `[R, H]` (the fast weights). Names are PEFT's (`peft/tuners/multitask_prompt_tuning/model.py`). The arguments that
    are not listed are those of `Prompt`.

    Args:
        rank: R, at least 1.
        factor_init: "ones" starts every task at P^_k = P*, so that the shared prompt's initialisation reaches the
            model; "normal" is PEFT's N(0, 0.02), which starts every prompt at about zero (4e-4 of P*'s scale).

    Example:
        >>> prompt = MultitaskPrompt(num_tasks=1, length=100, dim=768, rank=1)
        >>> sum(parameter.numel() for parameter in prompt.parameters())
        77668
    """

    per_task = ("prefix_task_cols", "prefix_task_rows")

    def __init__(
        self,
        num_tasks: int,
        length: int,
        dim: int,
        rank: int = 1,
        tasks: Sequence[str] | None = None,
        factor_init: Literal["ones", "normal"] = "ones",
    ) -> None:
        super().__init__(num_tasks, length, dim, tasks)
        if rank < 1:
            raise MPTError(f"rank must be at least 1, got {rank}.")
        if factor_init not in ("ones", "normal"):
            raise MPTError(f"factor_init must be 'ones' or 'normal', got {factor_init!r}.")
        self.rank = rank
        self.prompt_embeddings = nn.Parameter(random_uniform(length, dim))
        # With u = v = 1/sqrt(R) the sum over ranks is one; the noise tells tasks and ranks apart.
        mean = rank**-0.5 if factor_init == "ones" else 0.0
        self.prefix_task_cols = nn.Parameter(mean + 0.02 * torch.randn(num_tasks, length, rank))
        self.prefix_task_rows = nn.Parameter(mean + 0.02 * torch.randn(num_tasks, rank, dim))

    def forward(self, task_ids: Tensor) -> PromptOutput:
        """Return the prompts `[U, P, H]` of the tasks `[U]` (paper equation 1)."""
        factors = self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids]
        return PromptOutput(self.prompt_embeddings * factors)

    @torch.no_grad()
    def initialize(self, prompts: Tensor) -> None:
        """Start the shared prompt from given embeddings `[P, H]`; the factors stay."""
        self.prompt_embeddings.copy_(prompts)

    @classmethod
    def from_source(cls, source: "MultitaskPrompt", tasks: Sequence[str], start: str = "average") -> "MultitaskPrompt":
        """Start target tasks, which share P*, from the prompt of a source run (paper section 3.3).

        `start` "average" takes the mean of the source tasks' u and of their v, "shared" takes P* alone with factors
        near one; any other word names the source task whose factors are copied (an `MPTError` if it is unknown).
        """
        prompt = cls(len(tasks), source.length, source.dim, source.rank, tasks)
        with torch.no_grad():
            prompt.prompt_embeddings.copy_(source.prompt_embeddings)
            if start != "shared":
                rows = slice(None) if start == "average" else [source.index(start)]
                prompt.prefix_task_cols.copy_(source.prefix_task_cols[rows].mean(dim=0))
                prompt.prefix_task_rows.copy_(source.prefix_task_rows[rows].mean(dim=0))
        return prompt
