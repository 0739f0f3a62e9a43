"""The metrics of all evaluated tasks, by the names on their cards."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mpt_lightning.data.card import TaskCard
from mpt_lightning.errors import MPTError
from mpt_lightning.metrics.task import TaskMetrics, average


class Evaluator(nn.Module):
    """Losses and metrics of an evaluation.

    Args:
        tasks: The tasks, in the order of the dataloaders.
        cards: Their cards; a task without one has a loss and no metric.
    """

    def __init__(self, tasks: Sequence[str], cards: Mapping[str, TaskCard]) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self._metrics = nn.ModuleList(TaskMetrics(cards[t]) if t in cards else nn.Identity() for t in self.tasks)
        self._losses: Any = nn.ModuleList(MeanMetric() for _ in self.tasks)

    def has_metrics(self, task: str) -> bool:
        """Return whether the task has a card, and so metrics."""
        return isinstance(self._metrics[self.tasks.index(task)], TaskMetrics)

    def update(self, task: str, predictions: list[str], batch: Mapping[str, Any]) -> None:
        """Add a batch's predictions; does nothing for a task without metrics.

        Raises:
            MPTError: If the batch has no `references`.
        """
        metrics = self._metrics[self.tasks.index(task)]
        if not isinstance(metrics, TaskMetrics):
            return
        if "references" not in batch:
            raise MPTError(
                f"Task '{task}': got batches without `references`, expected the accepted answers of each row, because "
                "its card has metrics. Add them to the batches, or leave the card out of the DataModule's `cards`."
            )
        metrics.update(predictions, batch["references"], batch.get("groups") or [""] * len(predictions))

    def update_loss(self, task: str, loss: Tensor, tokens: int) -> None:
        """Add a batch's loss, weighted by its label tokens."""
        self._losses[self.tasks.index(task)].update(loss.detach(), tokens)

    def compute(self) -> dict[str, Tensor]:
        """Return the scores: `<task>/loss`, `<task>/<metric>`, `loss`, and `average` over the tasks' mean metrics.

        Returns:
            Scalars by name, reduced over ranks.
        """
        values: dict[str, Tensor] = {}
        means, losses = [], []
        for task, metrics, loss in zip(self.tasks, self._metrics, self._losses, strict=True):
            values[f"{task}/loss"] = loss.compute()
            losses.append(values[f"{task}/loss"])
            if isinstance(metrics, TaskMetrics):
                found = metrics.compute()
                values |= {f"{task}/{name}": value for name, value in found.items()}
                means.append(average(found))
        values["loss"] = torch.stack(losses).mean()
        if means:
            values["average"] = torch.stack(means).mean()
        return values
