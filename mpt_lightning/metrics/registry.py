"""The metrics that a card may name, one entry each. Light (no torch): cards are checked against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any, Literal


@dataclass(frozen=True)
class Entry:
    """A metric.

    Args:
        needs: The field that a card must set, or `text` for none. With `choices` and `value_range`, the metric's
            `update` takes predicted and gold classes or values [B], with `text` predictions and lists of references.
        path: Its class, a `torchmetrics.Metric`; `compute` returns one score, or scores by name.
        options: Arguments of the class.
        classes: The only number of classes that it is defined for. Unset: any, and the class takes the number first.
        grouped: Whether the card must set `group`, and `update` takes the rows' groups too.
    """

    needs: Literal["choices", "value_range", "text"]
    path: str
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: int | None = None
    grouped: bool = False

    def build(self, num_classes: int) -> Any:
        """Return the metric for a task with so many classes."""
        counted = [num_classes] if self.needs == "choices" and self.classes is None else []
        return resolve_name(self.path)(*counted, **self.options)


METRICS: dict[str, Entry] = {
    "accuracy": Entry("choices", "torchmetrics.classification.MulticlassAccuracy", {"average": "micro"}),
    "f1": Entry("choices", "torchmetrics.classification.BinaryF1Score", classes=2),
    "macro_f1": Entry("choices", "torchmetrics.classification.MulticlassF1Score", {"average": "macro"}),
    "matthews": Entry("choices", "torchmetrics.classification.MulticlassMatthewsCorrCoef"),
    "multirc": Entry("choices", "mpt_lightning.metrics.task.MultiRC", classes=2, grouped=True),
    "pearson": Entry("value_range", "torchmetrics.PearsonCorrCoef"),
    "spearman": Entry("value_range", "torchmetrics.SpearmanCorrCoef"),
    "squad": Entry("text", "mpt_lightning.metrics.task.SQuADScores"),
    "bleu": Entry("text", "torchmetrics.text.SacreBLEUScore"),
    "rouge": Entry("text", "mpt_lightning.metrics.task.Rouge"),
}
