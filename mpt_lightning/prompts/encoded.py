"""Prompts that are trained through a network, which is not needed after training: `fold` returns the plain prompt."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpt_lightning.errors import MPTError
from mpt_lightning.prompts.base import PromptOutput
from mpt_lightning.prompts.soft import FreePrompt

EncoderName = Literal["residual", "mlp", "lstm"]


class Residual(nn.Module):
    """`x + LayerNorm(W_up relu(W_down x))` of a prompt `[P, H]`; the identity at the start."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim), nn.LayerNorm(dim))
        nn.init.zeros_(self.network[-1].weight)  # type: ignore[arg-type]

    def forward(self, prompt: Tensor) -> Tensor:
        """Encode a prompt `[P, H]`."""
        return prompt + self.network(prompt)


class Recurrent(nn.Module):
    """A bidirectional LSTM of two layers over the prompt's tokens, then two linear layers."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(dim, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, dim))

    def forward(self, prompt: Tensor) -> Tensor:
        """Encode a prompt `[P, H]`."""
        return self.head(self.lstm(prompt)[0])


def perceptron(dim: int, hidden: int) -> nn.Module:
    """Build three linear layers."""
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim)
    )


# By the names of `EncodedPrompt(encoder=...)`.
ENCODERS: dict[str, Any] = {"residual": Residual, "mlp": perceptron, "lstm": Recurrent}


def through_networks(rows: Tensor, networks: nn.ModuleList, task_ids: Tensor) -> Tensor:
    """Pass the rows `[T, ...]` of some tasks `[U]` through the tasks' own networks; return their outputs `[U, ...]`.

    The other tasks' networks get zero gradients, like their rows: in a distributed run each parameter needs a gradient
    on every rank, whichever tasks its batch has.
    """
    tasks = task_ids.tolist()
    encoded = torch.stack([networks[task](rows[task]) for task in tasks])
    idle = [p.sum() for task, network in enumerate(networks) if task not in tasks for p in network.parameters()]
    return encoded + 0 * torch.stack(idle).sum() if idle and torch.is_grad_enabled() else encoded


class EncodedPrompt(FreePrompt):
    """One free prompt per task, each passed through a separate network; see `Prompt` for the other arguments.

    Args:
        encoder: "residual" adds a bottleneck network's output to the prompt (Razdaibiedina et al., 2023, section 3);
            "mlp" and "lstm" are those of P-tuning (Liu et al., 2021, section 3.2; `peft/tuners/p_tuning/model.py`).
        hidden: Width of the network's inner layers; H by default, H / 2 for "residual".

    Raises:
        MPTError: If the encoder is unknown, or a width is below 1.

    Example:
        >>> prompt = EncodedPrompt(num_tasks=2, length=4, dim=8, encoder="lstm", hidden=6)
        >>> prompt(torch.tensor([1])).embeddings.shape
        torch.Size([1, 4, 8])
    """

    per_task = ("prompt_embeddings", "encoders")

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
        # One per task: with a shared network a task's training would depend on the other tasks.
        self.encoders = nn.ModuleList(ENCODERS[encoder](dim, self.hidden) for _ in range(num_tasks))

    def forward(self, task_ids: Tensor) -> PromptOutput:
        """Return the prompts `[U, P, H]` of the tasks `[U]`."""
        return PromptOutput(through_networks(self.prompt_embeddings, self.encoders, task_ids))
