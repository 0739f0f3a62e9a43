"""Prefix tuning (Li and Liang, 2021): keys and values for every layer of a decoder-only model, no embeddings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpt_lightning.errors import MPTError
from mpt_lightning.prompts.base import Prompt, PromptOutput, through_networks

Layers = tuple[tuple[Tensor, Tensor], ...]


class PrefixPrompt(Prompt):
    """One prefix per task: P keys and values in each layer, trained as they are or through a network.

    Args:
        num_tasks: T.
        length: P.
        layers: layers of the model.
        heads: its key heads.
        width: D, of a key head.
        tasks: [T] names of the rows.
        projection: None trains keys and values as they are; a number is the inner width of a network of two layers
            that makes them from P embeddings of the size heads * D (the paper's section 4.3).

    Raises:
        MPTError: a size is below 1.

    Example:
        >>> prefix = PrefixPrompt(num_tasks=1, length=4, layers=2, heads=3, width=5)
        >>> keys, values = prefix(torch.tensor([0, 0])).layers[1]
        >>> keys.shape
        torch.Size([2, 3, 4, 5])
    """

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
            self.networks.extend(self._network(projection) for _ in range(num_tasks))

    def _network(self, inner: int) -> nn.Module:
        return nn.Sequential(nn.Linear(self.dim, inner), nn.Tanh(), nn.Linear(inner, 2 * self.layers * self.dim))

    def forward(self, task_ids: Tensor) -> PromptOutput:
        """Return per layer the keys and values `[U, heads, P, D]` of the tasks `[U]`."""
        if self.projection is None:
            states = self.prefix[task_ids]
        else:
            states = through_networks(self.prefix, self.networks, task_ids)
        split = states.view(len(task_ids), self.length, self.layers, 2, self.heads, self.width)
        return PromptOutput(layers=tuple((both[0], both[1]) for both in split.permute(2, 3, 0, 4, 1, 5)))

    def initialize(self, layers: Layers) -> None:
        """Start every task from given keys and values.

        Args:
            layers: per layer `[1, heads, P, D]` each.

        Raises:
            MPTError: this prefix comes out of a network.
        """
        if self.projection is not None:
            raise MPTError("A prefix that comes out of a network cannot start from given keys and values.")
        stacked = torch.stack([torch.stack([states[0] for states in pair]) for pair in layers])
        with torch.no_grad():  # [layers, 2, heads, P, D] to [P, layers, 2, heads, D]
            self.prefix.copy_(stacked.permute(3, 0, 1, 2, 4).flatten(1))

    def task_parameters(self) -> list[str]:
        """Give the names of the parameters with one row per task; networks are kept beside them."""
        return ["prefix"]

    def add_task(self, task: str, like: str | None = None) -> None:
        """Add a task; a network is a copy of `like`'s, or of the first task's. See `Prompt.add_task`."""
        source = 0 if like is None else self.index(like)
        super().add_task(task, like)
        if self.projection is not None:
            network = self._network(self.projection)
            network.load_state_dict(self.networks[source].state_dict())
            self.networks.append(network.to(self.prefix))

    def remove_task(self, task: str) -> None:
        """Remove a task and its network; see `Prompt.remove_task`."""
        row = self.index(task)
        super().remove_task(task)
        if self.projection is not None:
            del self.networks[row]

    def config(self) -> dict[str, Any]:
        """Give the constructor's arguments."""
        return {
            "num_tasks": self.num_tasks,
            "length": self.length,
            "layers": self.layers,
            "heads": self.heads,
            "width": self.width,
            "tasks": list(self.tasks),
            "projection": self.projection,
        }
