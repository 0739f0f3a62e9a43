"""Evaluating one task after another: predictions as texts, metrics by the cards' names."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric

from mpt_lightning.backbones import Backbone
from mpt_lightning.data.card import TaskCard
from mpt_lightning.errors import MPTError
from mpt_lightning.metrics.task import TaskMetrics, average
from mpt_lightning.objectives import IGNORE


class Evaluator(nn.Module):
    """The metrics of all evaluated tasks.

    Args:
        tasks: the tasks, in the order of the dataloaders.
        cards: their cards; a task without one has a loss and no metric.
    """

    def __init__(self, tasks: Sequence[str], cards: Mapping[str, TaskCard]) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self._metrics = nn.ModuleList(TaskMetrics(cards[t]) if t in cards else nn.Identity() for t in self.tasks)
        self._losses: Any = nn.ModuleList(MeanMetric() for _ in self.tasks)

    def has_metrics(self, task: str) -> bool:
        """Whether the task has a card, and so metrics."""
        return isinstance(self._metrics[self.tasks.index(task)], TaskMetrics)

    def update(self, task: str, predictions: list[str], batch: Mapping[str, Any]) -> None:
        """Count a batch's predictions; nothing where the task has no metrics."""
        metrics = self._metrics[self.tasks.index(task)]
        if not isinstance(metrics, TaskMetrics):
            return
        if "references" not in batch:
            raise MPTError(
                f"Task '{task}': got batches without `references`, expected the accepted answers of each row, because "
                "its card has metrics. Add them to the batches, or leave the card out of the DataModule's `cards`."
            )
        groups = batch.get("groups") or [""] * len(predictions)
        metrics.update(predictions, batch["references"], groups)

    def update_loss(self, task: str, loss: Tensor, tokens: int) -> None:
        """Count a batch's loss, weighted by its label tokens."""
        self._losses[self.tasks.index(task)].update(loss.detach(), tokens)

    def compute(self) -> dict[str, Tensor]:
        """Give `<task>/loss`, `<task>/<metric>`, `loss`, and `average`: the mean over tasks of their metrics' mean.

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


def with_gold(choices: Tensor, labels: Tensor) -> Tensor:
    """Append the gold answer to the choices.

    Args:
        choices: [B, C, M'] tokens, -100 for padding.
        labels: [B, M] tokens, -100 for padding.

    Returns:
        [B, C + 1, max(M, M')].
    """
    width = max(choices.shape[2], labels.shape[1])
    columns = [functional.pad(t, (0, width - t.shape[2]), value=IGNORE) for t in (choices, labels[:, None])]
    return torch.cat(columns, dim=1)


def counted_rows(batch: Mapping[str, Any], loaders: Any, batch_idx: int, dataloader_idx: int) -> int:
    """Give how many rows of a batch count: the last batch may be filled up (see `EvalSampler`).

    Args:
        batch: B rows.
        loaders: the Trainer's.
        batch_idx: the batch's place.
        dataloader_idx: its loader's.
    """
    loader = loaders[dataloader_idx] if isinstance(loaders, list) else loaders
    # The batch sampler's: to predict, Lightning makes a loader that has no other.
    filling: int = getattr(getattr(getattr(loader, "batch_sampler", None), "sampler", None), "filling", 0)
    return len(batch["labels"]) - (filling if filling and batch_idx + 1 == len(loader) else 0)


def choice_texts(best: Tensor, card: TaskCard | None) -> list[str]:
    """Give the words of the chosen classes `[B]`; their numbers where no card names them."""
    words = card.choices if card is not None else None
    return [words[index] if words else str(index) for index in best.tolist()]


def generated_texts(backbone: Backbone, inputs: tuple[Any, ...], options: dict[str, Any]) -> list[str]:
    """Generate an answer for each row, and give its text without special tokens."""
    tokenizer = backbone.tokenizer
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens = backbone.generate(*inputs, do_sample=False, pad_token_id=padding, **options)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def records(task: str, predictions: Sequence[str], batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give one plain record per predicted row."""
    size = len(predictions)
    texts, rows = batch.get("texts") or [""] * size, batch.get("row_ids") or list(range(size))
    golds = batch.get("references") or [[]] * size
    return [
        {"task": task, "row": int(row), "text": text, "prediction": prediction, "gold": list(gold)}
        for row, text, prediction, gold in zip(rows, texts, predictions, golds, strict=True)
    ]


def plain_card(card: TaskCard) -> dict[str, Any]:
    """Give a card as plain values that `weights_only` loading accepts."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(card).items()}


def read_cards(cards: Mapping[str, Any]) -> dict[str, TaskCard]:
    """Make cards of a checkpoint's plain values."""
    return {name: TaskCard(**values) for name, values in cards.items()}
