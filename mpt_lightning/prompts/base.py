"""What all prompts share: named tasks, one row each."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mpt_lightning.errors import MPTError


@dataclass
class PromptOutput:
    """What a prompt puts before, or adds to, the text of U tasks.

    Attributes:
        embeddings: `[U, P, H]` embeddings that stand before the text's, or None.
        layers: Per layer the keys and values `[U, heads, P, D]` that stand before the text's, or None.
        shift: `[U, S, H]`, added to the embeddings of the text's first S tokens, or None.
    """

    embeddings: Tensor | None = None
    layers: tuple[tuple[Tensor, Tensor], ...] | None = None
    shift: Tensor | None = None

    @classmethod
    def of(cls, prompts: "Tensor | PromptOutput") -> "PromptOutput":
        """Return prompts as they are, and plain embeddings `[U, P, H]` as an output without anything else."""
        return cls(prompts) if isinstance(prompts, Tensor) else prompts

    @property
    def length(self) -> int:
        """P, tokens per prompt."""
        if self.embeddings is not None:
            return self.embeddings.shape[1]
        return self.layers[0][0].shape[2] if self.layers else 0

    def __getitem__(self, rows: Tensor) -> "PromptOutput":
        """Return some of the prompts, in the order of `rows` `[N]` in 0..U-1."""
        return PromptOutput(
            None if self.embeddings is None else self.embeddings[rows],
            None if self.layers is None else tuple((keys[rows], values[rows]) for keys, values in self.layers),
            None if self.shift is None else self.shift[rows],
        )

    def embeddings_alone(self) -> Tensor:
        """Return the embeddings `[U, P, H]`.

        Raises:
            MPTError: If they are not all of the output.
        """
        if self.embeddings is None or self.shift is not None:
            raise MPTError(
                "Expected a prompt of embeddings alone, got "
                f"{'keys and values' if self.embeddings is None else 'one that shifts the embeddings of the text too'}."
            )
        return self.embeddings


class Prompt(nn.Module, ABC):
    """Prompts of one or many named tasks: task ids in, `PromptOutput` out.

    Args:
        num_tasks: T, at least 1.
        length: P, tokens per prompt, at least 1 (`EmptyPrompt`: 0).
        dim: H, the backbone's embedding size.
        tasks: [T] names of the rows; "0", "1", ... by default.

    Raises:
        MPTError: a size is below 1, or names are missing or repeated.
    """

    least_length: ClassVar[int] = 1
    # What is trained, in words for messages.
    content: ClassVar[str] = "embeddings"

    def __init__(self, num_tasks: int, length: int, dim: int, tasks: Sequence[str] | None = None) -> None:
        super().__init__()
        for name, size, least in (("num_tasks", num_tasks, 1), ("length", length, self.least_length), ("dim", dim, 1)):
            if size < least:
                raise MPTError(f"{name} must be at least {least}, got {size}.")
        self.length, self.dim = length, dim
        self.tasks = [str(row) for row in range(num_tasks)] if tasks is None else list(tasks)
        if len(self.tasks) != num_tasks or len(set(self.tasks)) != num_tasks:
            raise MPTError(f"tasks must be {num_tasks} different names, got {self.tasks}.")

    @property
    def num_tasks(self) -> int:
        """T, the number of tasks."""
        return len(self.tasks)

    @abstractmethod
    def forward(self, task_ids: Tensor) -> PromptOutput:
        """Return the prompts of some tasks.

        Args:
            task_ids: [U] rows, in 0..T-1, repeats allowed.
        """

    def attach(self, embeddings: Tensor) -> None:
        """Take what the prompt needs of the backbone's embeddings `[V, H]`; nothing by default."""

    @abstractmethod
    def task_parameters(self) -> list[str]:
        """Give the names of the parameters that have one row per task in their first dimension."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Give the constructor's arguments as plain values, for checkpoints."""

    def index(self, task: str) -> int:
        """Give the row of a task.

        Raises:
            MPTError: there is no such task.
        """
        if task not in self.tasks:
            raise MPTError(f"Unknown task {task!r}. This prompt has: {', '.join(self.tasks)}.")
        return self.tasks.index(task)

    @torch.no_grad()
    def fold(self, task: str) -> Tensor:
        """Return one task's prompt as a detached `[P, H]` matrix.

        Raises:
            MPTError: If the task is unknown, or its prompt is not of embeddings alone.
        """
        row = torch.tensor([self.index(task)], device=next(self.parameters(), torch.empty(0)).device)
        output: PromptOutput = self(row)
        return output.embeddings_alone()[0]

    def add_task(self, task: str, like: str | None = None) -> None:
        """Add a task to a trained prompt; make optimizers afterwards, since parameters are replaced.

        Args:
            task: the new name.
            like: the task whose row is copied; by default the new row is the mean of all rows.

        Raises:
            MPTError: the name is taken, or `like` is unknown.
        """
        if task in self.tasks:
            raise MPTError(f"The task {task!r} exists already. Choose another name, or rename_task() first.")
        source = None if like is None else self.index(like)
        for name in self.task_parameters():
            rows: Tensor = getattr(self, name).data
            new = rows.mean(dim=0) if source is None else rows[source]
            self._replace(name, torch.cat([rows, new[None]]))
        self.tasks.append(task)

    def remove_task(self, task: str) -> None:
        """Remove a task from a trained prompt; make optimizers afterwards.

        Raises:
            MPTError: the task is unknown, or the last one.
        """
        row = self.index(task)
        if self.num_tasks == 1:
            raise MPTError(f"{task!r} is the only task; a prompt needs at least one.")
        for name in self.task_parameters():
            rows: Tensor = getattr(self, name).data
            self._replace(name, torch.cat([rows[:row], rows[row + 1 :]]))
        del self.tasks[row]

    def rename_task(self, task: str, new: str) -> None:
        """Rename a task.

        Raises:
            MPTError: the task is unknown, or the new name is taken.
        """
        row = self.index(task)
        if new in self.tasks and new != task:
            raise MPTError(f"Cannot rename {task!r} to {new!r}: that name is taken.")
        self.tasks[row] = new

    def _replace(self, name: str, value: Tensor) -> None:
        setattr(self, name, nn.Parameter(value, requires_grad=getattr(self, name).requires_grad))


def through_networks(rows: Tensor, networks: nn.ModuleList, task_ids: Tensor) -> Tensor:
    """Pass the rows of some tasks through the tasks' own networks.

    The other tasks' networks get gradients of zero, as their rows do: in a distributed run each parameter needs a
    gradient on every rank, whatever tasks it has drawn.

    Args:
        rows: [T, ...].
        networks: one per task.
        task_ids: [U] in 0..T-1.

    Returns:
        [U, ...] what the networks give.
    """
    tasks = task_ids.tolist()
    made = torch.stack([networks[task](rows[task]) for task in tasks])
    idle = [p.sum() for task, network in enumerate(networks) if task not in tasks for p in network.parameters()]
    return made + 0 * torch.stack(idle).sum() if idle and torch.is_grad_enabled() else made
