"""The base class of all prompts, named tasks with one row each, and what they return."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mpt_lightning.errors import MPTError


@dataclass
class PromptOutput:
    """The prompts of U tasks.

    Attributes:
        embeddings: `[U, P, H]`, which precede the text's embeddings; None if the prompts are keys and values.
        layers: Per layer the keys and values `[U, heads, P, D]`, which precede the text's; empty if the prompts
            are embeddings.
        shift: `[U, S, H]`, added to the embeddings of the text's first S tokens, or None.
        head: Classifiers on the first token's last hidden state, weights `[U, C, D]` and biases `[U, C]`, or None.
    """

    embeddings: Tensor | None = None
    layers: tuple[tuple[Tensor, Tensor], ...] = ()
    shift: Tensor | None = None
    head: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, prompts: "Tensor | PromptOutput") -> "PromptOutput":
        """Return prompts unchanged, and plain embeddings `[U, P, H]` as an output without anything else."""
        return PromptOutput(prompts) if isinstance(prompts, Tensor) else prompts

    @property
    def length(self) -> int:
        """P, tokens per prompt."""
        if self.layers:
            return self.layers[0][0].shape[2]
        return 0 if self.embeddings is None else self.embeddings.shape[1]

    def __getitem__(self, rows: Tensor) -> "PromptOutput":
        """Return some of the prompts, in the order of `rows` `[N]` in 0..U-1."""
        return PromptOutput(
            None if self.embeddings is None else self.embeddings[rows],
            tuple((keys[rows], values[rows]) for keys, values in self.layers),
            None if self.shift is None else self.shift[rows],
            None if self.head is None else (self.head[0][rows], self.head[1][rows]),
        )

    def embeddings_alone(self) -> Tensor:
        """Return the embeddings `[U, P, H]`; raise an `MPTError` if they are not all of the output."""
        if self.embeddings is None or self.shift is not None or self.head is not None:
            got = "one that has a classifier" if self.head is not None else "one that shifts the text's embeddings too"
            got = "keys and values" if self.embeddings is None else got
            raise MPTError(f"Expected a prompt of embeddings alone, got {got}.")
        return self.embeddings


class Prompt(nn.Module, ABC):
    """Prompts of one or many named tasks: task ids in, `PromptOutput` out.

    A new prompt writes `__init__`, `forward` and `per_task`. It keeps each constructor argument that determines its
    shape as an attribute of the same name, so that checkpoints store it.

    Args:
        num_tasks: T, at least 1.
        length: P, tokens per prompt, at least 1 (`EmptyPrompt`: 0).
        dim: H, the backbone's embedding size.
        tasks: [T] names of the rows; "0", "1", ... by default.

    Raises:
        MPTError: If a size is below 1, or names are missing or repeated.
    """

    # All prompts with a `forward`, by class name, as checkpoints name them.
    classes: ClassVar[dict[str, type["Prompt"]]] = {}
    # What is trained, in words for messages.
    content: ClassVar[str] = "embeddings"
    least_length: ClassVar[int] = 1
    # The attributes that have one row per task: tensors `[T, ...]`, lists of T items or of T networks.
    per_task: tuple[str, ...] = ()

    def __init__(self, num_tasks: int, length: int, dim: int, tasks: Sequence[str] | None = None) -> None:
        super().__init__()
        for name, size, least in (("num_tasks", num_tasks, 1), ("length", length, self.least_length), ("dim", dim, 1)):
            if size < least:
                raise MPTError(f"{name} must be at least {least}, got {size}.")
        self.length, self.dim = length, dim
        self.tasks = [str(row) for row in range(num_tasks)] if tasks is None else list(tasks)
        if len(self.tasks) != num_tasks or len(set(self.tasks)) != num_tasks:
            raise MPTError(f"tasks must be {num_tasks} different names, got {self.tasks}.")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the class for checkpoints."""
        super().__init_subclass__(**kwargs)
        if cls.forward is not Prompt.forward:
            Prompt.classes[cls.__name__] = cls

    @property
    def num_tasks(self) -> int:
        """T, the number of tasks."""
        return len(self.tasks)

    @abstractmethod
    def forward(self, task_ids: Tensor) -> PromptOutput:
        """Return the prompts of some tasks `[U]`: rows in 0..T-1, repeats allowed."""

    def attach(self, embeddings: Tensor) -> None:
        """Copy what the prompt needs of the backbone's embeddings `[V, H]`; nothing by default."""

    def task_parameters(self) -> list[str]:
        """Return the names of the parameters `[T, ...]`, which have one row per task."""
        return [name for name in self.per_task if isinstance(getattr(self, name), nn.Parameter)]

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments that are kept as attributes, as plain values, for checkpoints."""
        arguments = inspect.signature(type(self)).parameters
        return {name: deepcopy(getattr(self, name)) for name in arguments if hasattr(self, name)}

    def index(self, task: str) -> int:
        """Return the row of a task; raise an `MPTError` if it is unknown, as all methods that take a name."""
        if task not in self.tasks:
            raise MPTError(f"Unknown task {task!r}. This prompt has: {', '.join(self.tasks)}.")
        return self.tasks.index(task)

    @torch.no_grad()
    def fold(self, task: str) -> Tensor:
        """Return one task's prompt, which must be of embeddings alone, as a detached `[P, H]` matrix."""
        row = torch.tensor([self.index(task)], device=next(self.parameters(), torch.empty(0)).device)
        return self(row).embeddings_alone()[0]

    @torch.no_grad()
    def add_task(self, task: str, like: str | None = None) -> None:
        """Add a task with an unused name to a trained prompt; create optimizers afterwards, as parameters are replaced.

        The row of the task `like` is copied. By default the new row is the mean of all rows, and its network, if any, a
        copy of the first task's.
        """
        if task in self.tasks:
            raise MPTError(f"The task {task!r} exists already. Choose another name, or rename_task() first.")
        source = None if like is None else self.index(like)
        for name in self.per_task:
            rows: Any = getattr(self, name)
            if isinstance(rows, Tensor):
                new = rows.mean(dim=0) if source is None else rows[source]
                self._replace(name, torch.cat([rows, new[None]]))
            else:
                rows.append(deepcopy(rows[source or 0]))
        self.tasks.append(task)

    @torch.no_grad()
    def remove_task(self, task: str) -> None:
        """Remove a task that is not the only one from a trained prompt; create optimizers afterwards."""
        row = self.index(task)
        if self.num_tasks == 1:
            raise MPTError(f"{task!r} is the only task; a prompt needs at least one.")
        for name in self.per_task:
            rows: Any = getattr(self, name)
            if isinstance(rows, Tensor):
                self._replace(name, torch.cat([rows[:row], rows[row + 1 :]]))
            else:
                del rows[row]
        del self.tasks[row]

    def rename_task(self, task: str, new: str) -> None:
        """Rename a task to an unused name."""
        row = self.index(task)
        if new in self.tasks and new != task:
            raise MPTError(f"Cannot rename {task!r} to {new!r}: that name is taken.")
        self.tasks[row] = new

    def _replace(self, name: str, value: Tensor) -> None:
        old = getattr(self, name)
        setattr(self, name, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)


class TokenPrompt(Prompt):
    """Base class of prompts made of the backbone's embeddings of their `token_ids`; `attach` them before `forward`."""

    token_ids: list[Any]
    embeddings: Tensor
    _attached = False

    def attach(self, embeddings: Tensor) -> None:
        """Copy the embeddings `[..., H]` of the token ids `[...]` from the backbone's table `[V, H]`, if it fits."""
        ids = torch.tensor(self.token_ids, device=embeddings.device)
        low, high = int(ids.min()), int(ids.max())
        if embeddings.shape[1] != self.dim or not 0 <= low <= high < len(embeddings):
            raise MPTError(
                f"The prompt has token ids from {low} to {high} and the width {self.dim}; the backbone's embeddings "
                f"are {list(embeddings.shape)}. Use the backbone that the prompt was trained with."
            )
        self.embeddings.copy_(embeddings.detach()[ids])
        self._attached = True

    def attached(self) -> Tensor:
        """Return the attached embeddings `[..., H]`."""
        if not self._attached:
            raise RuntimeError("The prompt has no embeddings yet: call attach(backbone.embeddings) first.")
        return self.embeddings
