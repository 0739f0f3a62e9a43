"""Prompts that are trained through something else: a small network, or weights over the vocabulary's embeddings.

Once trained, the network is not needed: `fold` gives the plain prompt.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpt_lightning.errors import MPTError
from mpt_lightning.prompts.base import Prompt, PromptOutput, through_networks
from mpt_lightning.prompts.init import random_uniform

EncoderName = Literal["residual", "mlp", "lstm"]


class EncodedPrompt(Prompt):
    """One free prompt per task, each passed through a network of its own.

    Args:
        num_tasks: T.
        length: P, tokens per prompt.
        dim: H.
        tasks: [T] names of the rows.
        encoder: "residual" adds a bottleneck network's output to the prompt (Razdaibiedina et al., 2023, section 3);
            "mlp" and "lstm" are those of P-tuning (Liu et al., 2021, section 3.2; `peft/tuners/p_tuning/model.py`).
        hidden: width of the network's inner layers; H by default, H / 2 for "residual".

    Raises:
        MPTError: an encoder of another name, or a width below 1.

    Example:
        >>> prompt = EncodedPrompt(num_tasks=2, length=4, dim=8, encoder="lstm", hidden=6)
        >>> prompt(torch.tensor([1])).embeddings.shape
        torch.Size([1, 4, 8])
    """

    def __init__(
        self,
        num_tasks: int,
        length: int,
        dim: int,
        tasks: Sequence[str] | None = None,
        encoder: EncoderName = "residual",
        hidden: int | None = None,
    ) -> None:
        super().__init__(num_tasks, length, dim, tasks)
        if encoder not in ENCODERS:
            raise MPTError(f"encoder must be one of {', '.join(ENCODERS)}, got {encoder!r}.")
        self.encoder = encoder
        self.hidden = hidden if hidden is not None else max(1, dim // 2) if encoder == "residual" else dim
        if self.hidden < 1:
            raise MPTError(f"hidden must be at least 1, got {hidden}.")
        self.prompt_embeddings = nn.Parameter(random_uniform(num_tasks, length, dim))
        # One per task: tasks that shared a network would not be trained as on their own.
        self.encoders = nn.ModuleList(ENCODERS[encoder](dim, self.hidden) for _ in range(num_tasks))

    def forward(self, task_ids: Tensor) -> PromptOutput:
        """Return the prompts `[U, P, H]` of the tasks `[U]`."""
        return PromptOutput(through_networks(self.prompt_embeddings, self.encoders, task_ids))

    def initialize(self, prompts: Tensor) -> None:
        """Start from given prompts, before their networks.

        Args:
            prompts: [T, P, H], or [P, H] for all tasks alike.
        """
        with torch.no_grad():
            self.prompt_embeddings.copy_(prompts)

    def task_parameters(self) -> list[str]:
        """Give the names of the parameters with one row per task; networks are kept beside them."""
        return ["prompt_embeddings"]

    def add_task(self, task: str, like: str | None = None) -> None:
        """Add a task, with a network that is a copy of `like`'s, or of the first task's; see `Prompt.add_task`."""
        source = 0 if like is None else self.index(like)
        super().add_task(task, like)
        network = ENCODERS[self.encoder](self.dim, self.hidden)
        network.load_state_dict(self.encoders[source].state_dict())
        self.encoders.append(network.to(self.prompt_embeddings))

    def remove_task(self, task: str) -> None:
        """Remove a task and its network; see `Prompt.remove_task`."""
        row = self.index(task)
        super().remove_task(task)
        del self.encoders[row]

    def config(self) -> dict[str, Any]:
        """Give the constructor's arguments."""
        return {
            "num_tasks": self.num_tasks,
            "length": self.length,
            "dim": self.dim,
            "tasks": list(self.tasks),
            "encoder": self.encoder,
            "hidden": self.hidden,
        }


class Residual(nn.Module):
    """`x + LayerNorm(W_up relu(W_down x))`; starts as the identity, so that the prompt's own start is not lost."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim), nn.LayerNorm(dim))
        nn.init.zeros_(self.network[-1].weight)  # type: ignore[arg-type]

    def forward(self, prompt: Tensor) -> Tensor:
        """Encode a prompt `[P, H]`."""
        encoded: Tensor = prompt + self.network(prompt)
        return encoded


class Recurrent(nn.Module):
    """A bidirectional LSTM of two layers over the prompt's tokens, then two linear layers."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(dim, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, dim))

    def forward(self, prompt: Tensor) -> Tensor:
        """Encode a prompt `[P, H]`."""
        encoded: Tensor = self.head(self.lstm(prompt)[0])
        return encoded


def perceptron(dim: int, hidden: int) -> nn.Module:
    """Three linear layers."""
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim)
    )


ENCODERS: dict[str, Any] = {"residual": Residual, "mlp": perceptron, "lstm": Recurrent}


class SuperposedPrompt(Prompt):
    """Each prompt token is a weighted sum of the embeddings of some vocabulary tokens (SuperPos-Prompt, 2024).

    Sadraei Javaheri et al. take 128 tokens. Here a task's prompt tokens share them, the embeddings stay frozen and
    only the weights `[T, P, N]` are trained.

    Args:
        num_tasks: T.
        length: P, tokens per prompt.
        dim: H.
        token_ids: [T][N] the vocabulary tokens of each task.
        tasks: [T] names of the rows.

    Raises:
        MPTError: not one list of tokens per task, or lists of different lengths.
    """

    embeddings: Tensor

    def __init__(
        self,
        num_tasks: int,
        length: int,
        dim: int,
        token_ids: Sequence[Sequence[int]],
        tasks: Sequence[str] | None = None,
    ) -> None:
        super().__init__(num_tasks, length, dim, tasks)
        numbers = all(type(token) is int for ids in token_ids for token in ids)
        if len(token_ids) != num_tasks or len({len(ids) for ids in token_ids}) != 1 or not token_ids[0] or not numbers:
            raise MPTError(f"token_ids must be {num_tasks} lists of one length, got {list(map(len, token_ids))}.")
        self.token_ids = [list(ids) for ids in token_ids]
        count = len(self.token_ids[0])
        # With this scale a token's norm is at first that of an embedding.
        self.weights = nn.Parameter(torch.randn(num_tasks, length, count) / count**0.5)
        self.register_buffer("embeddings", torch.zeros(num_tasks, count, dim), persistent=False)
        self._attached = False

    def attach(self, embeddings: Tensor) -> None:
        """Take the tokens' embeddings from the backbone's table `[V, H]`.

        Raises:
            MPTError: the table is of another width, or has too few rows.
        """
        ids = torch.tensor(self.token_ids, device=embeddings.device)
        if embeddings.shape[1] != self.dim or not 0 <= int(ids.min()) <= int(ids.max()) < len(embeddings):
            raise MPTError(
                f"The prompt has token ids from {int(ids.min())} to {int(ids.max())} of width {self.dim}, and the "
                f"backbone's embeddings are {list(embeddings.shape)}. Use the backbone that the prompt was made for."
            )
        self.embeddings.copy_(embeddings.detach()[ids])
        self._attached = True

    def forward(self, task_ids: Tensor) -> PromptOutput:
        """Return the prompts `[U, P, H]` of the tasks `[U]`.

        Raises:
            RuntimeError: `attach` has not been called.
        """
        if not self._attached:
            raise RuntimeError("The prompt has no embeddings yet: call attach(backbone.embeddings) first.")
        return PromptOutput(self.weights[task_ids] @ self.embeddings[task_ids])

    def task_parameters(self) -> list[str]:
        """Give the names of the parameters with one row per task."""
        return ["weights"]

    def add_task(self, task: str, like: str | None = None) -> None:
        """Add a task over the tokens of `like`, or of the first task; see `Prompt.add_task`."""
        source = 0 if like is None else self.index(like)
        super().add_task(task, self.tasks[source])
        self.token_ids.append(list(self.token_ids[source]))
        self.embeddings = torch.cat([self.embeddings, self.embeddings[source : source + 1]])

    def remove_task(self, task: str) -> None:
        """Remove a task and its tokens; see `Prompt.remove_task`."""
        row = self.index(task)
        super().remove_task(task)
        del self.token_ids[row]
        self.embeddings = torch.cat([self.embeddings[:row], self.embeddings[row + 1 :]])

    def config(self) -> dict[str, Any]:
        """Give the constructor's arguments."""
        return {
            "num_tasks": self.num_tasks,
            "length": self.length,
            "dim": self.dim,
            "token_ids": self.token_ids,
            "tasks": list(self.tasks),
        }
