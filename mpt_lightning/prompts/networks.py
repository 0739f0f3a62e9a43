"""Networks that prompts are trained through, one per task."""

from typing import Any

import torch
from torch import Tensor, nn


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
