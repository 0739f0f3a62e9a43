"""Prefix tuning (Li and Liang, 2021): keys and values for every layer of a decoder-only model, no embeddings."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpt_lightning.errors import MPTError
from mpt_lightning.prompts.base import Prompt, PromptOutput
from mpt_lightning.prompts.encoded import through_networks


class PrefixPrompt(Prompt):
    """One prefix per task: P keys and values in each layer, trained directly or through a network.

    See `Prompt` for the other arguments, and for the errors.

    Args:
        layers: Layers of the model.
        heads: Its key heads.
        width: D, the size of a key head.
        projection: None trains keys and values directly; a number is the inner width of a network of two layers that
            computes them from P embeddings of the size heads * D (the paper's section 4.3).

    Example:
        >>> prefix = PrefixPrompt(num_tasks=1, length=4, layers=2, heads=3, width=5)
        >>> keys, values = prefix(torch.tensor([0, 0])).layers[1]
        >>> keys.shape
        torch.Size([2, 3, 4, 5])
    """

    per_task: tuple[str, ...] = ("prefix",)
    content = "keys and values for every layer"

    def __init__(
        self,
        num_tasks: int,
        length: int,
        layers: int,
        heads: int,
        width: int,
        tasks: Sequence[str] | None = None,
        projection: int | None = None,
    ) -> None:
        super().__init__(num_tasks, length, heads * width, tasks)
        if min(layers, heads, width) < 1 or (projection is not None and projection < 1):
            raise MPTError(f"Sizes must be at least 1: {layers=}, {heads=}, {width=}, {projection=}.")
        self.layers, self.heads, self.width, self.projection = layers, heads, width, projection
        inner = 2 * layers * self.dim if projection is None else self.dim
        self.prefix = nn.Parameter(torch.randn(num_tasks, length, inner))
        self.networks = nn.ModuleList()
        if projection is not None:
            self.per_task = ("prefix", "networks")
            for _ in range(num_tasks):
                hidden, output = nn.Linear(self.dim, projection), nn.Linear(projection, 2 * layers * self.dim)
                self.networks.append(nn.Sequential(hidden, nn.Tanh(), output))

    def forward(self, task_ids: Tensor) -> PromptOutput:
        """Return per layer the keys and values `[U, heads, P, D]` of the tasks `[U]`."""
        if self.projection is None:
            states = self.prefix[task_ids]
        else:
            states = through_networks(self.prefix, self.networks, task_ids)
        split = states.view(len(task_ids), self.length, self.layers, 2, self.heads, self.width)
        return PromptOutput(layers=tuple((both[0], both[1]) for both in split.permute(2, 3, 0, 4, 1, 5)))

    def initialize(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Start every task, if trained without a network, from keys and values, per layer `[1, heads, P, D]` each."""
        if self.projection is not None:
            raise MPTError("A prefix that is the output of a network cannot start from given keys and values.")
        stacked = torch.stack([torch.stack([states[0] for states in pair]) for pair in layers])
        with torch.no_grad():  # [layers, 2, heads, P, D] to [P, layers, 2, heads, D]
            self.prefix.copy_(stacked.permute(3, 0, 1, 2, 4).flatten(1))
