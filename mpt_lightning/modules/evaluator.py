"""The metrics of all evaluated tasks, by the names on their cards."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from mpt_lightning.data.card import TaskCard
from mpt_lightning.errors import MPTError
from mpt_lightning.metrics.task import TaskMetrics, average


class Evaluator:
    """Losses and metrics of one evaluation of `tasks`, in the order of the dataloaders.

    A task without a card has a loss and no metric. `prompts` are those of all tasks, as `Backbone.encode_prompts`
    returns them.
    """

    def __init__(self, tasks: Sequence[str], cards: Mapping[str, TaskCard], prompts: Any, device: torch.device) -> None:
        self.tasks, self.prompts = list(tasks), prompts
        self.metrics = {task: TaskMetrics(cards[task]).to(device) for task in self.tasks if task in cards}
        self._losses = {task: MeanMetric().to(device) for task in self.tasks}

    def update(self, task: str, predictions: list[str], batch: Mapping[str, Any]) -> None:
        """Add a batch's predictions; does nothing for a task without metrics."""
        if task not in self.metrics:
            return
        if "references" not in batch:
            raise MPTError(
                f"Task '{task}': got batches without `references`, expected the accepted answers of each row, because "
                "its card has metrics. Add them to the batches, or leave the card out of the DataModule's `cards`."
            )
        self.metrics[task].update(predictions, batch["references"], batch.get("groups") or [""] * len(predictions))

    def update_loss(self, task: str, loss: Tensor, tokens: int) -> None:
        """Add a batch's loss, weighted by its label tokens."""
        self._losses[task].update(loss.detach(), tokens)

    def compute(self) -> dict[str, Tensor]:
        """Return scalars over all ranks: `<task>/loss`, `<task>/<metric>`, `loss`, and `average` over tasks."""
        values: dict[str, Tensor] = {}
        means, losses = [], []
        for task in self.tasks:
            values[f"{task}/loss"] = self._losses[task].compute()
            losses.append(values[f"{task}/loss"])
            if task in self.metrics:
                found = self.metrics[task].compute()
                values |= {f"{task}/{name}": value for name, value in found.items()}
                means.append(average(found))
        values["loss"] = torch.stack(losses).mean()
        if means:
            values["average"] = torch.stack(means).mean()
        return values
