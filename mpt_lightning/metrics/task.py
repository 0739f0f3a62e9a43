"""The metrics of one task, from texts to named scores."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchmetrics import Metric, SumMetric
from torchmetrics.classification import BinaryF1Score
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import SQuAD

from mpt_lightning.errors import MPTError
from mpt_lightning.metrics.registry import METRICS


class MultiRC(BinaryF1Score):
    """F1 over answers (`f1a`) and the share of groups, which are questions, whose rows are all right (`em`)."""

    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        # Flat float32 triples (two halves of the group's hash, right or wrong): for a rank without rows, torchmetrics
        # gathers an empty flat float32 tensor, which cannot be joined with other shapes or types.
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, predicted: Tensor, gold: Tensor, groups: Sequence[str]) -> None:  # type: ignore[override]
        """Add rows: classes [B], right classes [B], group ids [B]."""
        super().update(predicted, gold)
        right = (predicted == gold).tolist()
        triples = [(*_halves(group), float(row)) for row, group in zip(right, groups, strict=True)]
        self.rows.append(torch.tensor(triples, device=self.device).flatten())

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Return `f1a` and `em`, 0 to 1."""
        rows = torch.cat([self.rows] if isinstance(self.rows, Tensor) else self.rows).view(-1, 3)
        groups, index = rows[:, :2].unique(dim=0, return_inverse=True)
        right = torch.ones(len(groups), device=rows.device)
        return {"f1a": super().compute(), "em": right.scatter_reduce(0, index, rows[:, 2], reduce="amin").mean()}


class SQuADScores(SQuAD):
    """Exact match (`em`) and F1 (`f1`) of the best reference."""

    def update(self, predictions: list[str], references: list[list[str]]) -> None:  # type: ignore[override]
        """Add predictions [B] and their references [B]."""
        # The ids only pair predictions with answers inside this call.
        got: Any = [{"prediction_text": text, "id": str(row)} for row, text in enumerate(predictions)]
        gold: Any = [
            {"answers": {"text": texts, "answer_start": [0] * len(texts)}, "id": str(row)}
            for row, texts in enumerate(references)
        ]
        super().update(got, gold)

    def compute(self) -> dict[str, Tensor]:
        """Return `em` and `f1`, 0 to 1."""
        percent = super().compute()
        return {"em": percent["exact_match"] / 100, "f1": percent["f1"] / 100}


class Rouge(Metric):
    """ROUGE F-measures of the best reference; torchmetrics' class hangs when ranks have different numbers of rows."""

    full_state_update = False
    keys = ("rouge1", "rouge2", "rougeL")
    totals: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("totals", torch.zeros(len(self.keys)), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: list[str], references: list[list[str]]) -> None:
        """Add predictions [B] and their references [B]."""
        means = rouge_score(predictions, references, rouge_keys=self.keys)
        self.totals += torch.stack([means[f"{key}_fmeasure"] for key in self.keys]).to(self.device) * len(predictions)
        self.rows += len(predictions)

    def compute(self) -> dict[str, Tensor]:
        """Return `rouge1`, `rouge2` and `rougeL`, 0 to 1."""
        return dict(zip(self.keys, self.totals / self.rows, strict=True))


class ScoredTask(Protocol):
    """What metrics need of a task's card; see `mpt_lightning.data.card.TaskCard`."""

    name: str
    metrics: list[str]
    choices: list[str] | None
    value_range: tuple[float, float] | None


class TaskMetrics(nn.Module):
    """The metrics of a task's card, exact over partial batches and over ranks.

    Args:
        card: The task. Its `metrics` have these scores: accuracy, f1 (class 1 is positive), macro_f1, matthews,
            pearson and spearman under their names; `squad`: em and f1; `multirc`: f1a and em; `bleu`: bleu (SacreBLEU,
            13a); `rouge`: rouge1, rouge2 and rougeL.

    A prediction that is not a label of the task counts as wrong: as a class that is not the gold one, or as the end of
    the value range farthest from the gold value. `invalid` is the number of such predictions.
    """

    def __init__(self, card: ScoredTask) -> None:
        super().__init__()
        self.card = card
        with warnings.catch_warnings():
            # It keeps all rows, which is what a rank correlation needs.
            warnings.filterwarnings("ignore", message="Metric `SpearmanCorrcoef` will save all targets")
            self.metrics: Any = nn.ModuleDict(
                {name: METRICS[name].build(len(card.choices or [])) for name in card.metrics}
            )
        self.invalid = SumMetric()

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]], groups: Sequence[str]) -> None:
        """Add B rows: predicted texts [B], accepted texts of each row [B], and group ids [B], "" for none.

        Raises:
            MPTError: If the lengths differ, or a reference is not a label of the task.
        """
        if not len(predictions) == len(references) == len(groups):
            raise MPTError(
                f"Task '{self.card.name}': got {len(predictions)} predictions, {len(references)} references and "
                f"{len(groups)} groups, expected as many of each."
            )
        if not predictions:
            return
        labels, texts = self._labels(predictions, references), (list(predictions), [list(row) for row in references])
        for name, metric in self.metrics.items():
            entry = METRICS[name]
            metric.update(*(texts if entry.needs == "text" else labels), *([groups] if entry.grouped else []))

    def _labels(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Tensor]:
        """Return predicted and gold classes or values, [B] each; nothing for free text."""
        gold: list[float]
        predicted: list[float | None]
        if self.card.choices is not None:
            classes = {_normal(word): number for number, word in enumerate(self.card.choices)}
            gold = [classes.get(_normal(texts[0]), -1) for texts in references]
            if -1 in gold:
                raise MPTError(
                    f"Task '{self.card.name}': got the reference {references[gold.index(-1)][0]!r}, expected one of "
                    f"{', '.join(self.card.choices)}; change `choices` of the card."
                )
            predicted = [classes.get(_normal(text)) for text in predictions]
            wrong = [(right + 1) % len(classes) for right in gold]
        elif self.card.value_range is not None:
            low, high = self.card.value_range
            gold = [float(texts[0]) for texts in references]
            predicted = [_number(text, low, high) for text in predictions]
            wrong = [low if right - low > high - right else high for right in gold]
        else:
            return []
        self.invalid.update(predicted.count(None))
        filled = [other if label is None else label for label, other in zip(predicted, wrong, strict=True)]
        return [torch.tensor(column, device=self.invalid.device) for column in (filled, gold)]

    def compute(self) -> dict[str, Tensor]:
        """Return the scores over all rows of all ranks, by name, and for classes and values `invalid`.

        Scores are from 0 to 1 (matthews, pearson, spearman: -1 to 1; 0 where they are undefined, as for constant
        predictions).
        """
        scores: dict[str, Tensor] = {}
        with warnings.catch_warnings():
            # Constant predictions are a documented case here.
            warnings.filterwarnings("ignore", message="The variance of predictions or target is close to zero")
            for name, metric in self.metrics.items():
                found = metric.compute()
                scores |= {name: found} if isinstance(found, Tensor) else found
        scores = {name: torch.nan_to_num(score, nan=0.0) for name, score in scores.items()}
        if self.card.choices is not None or self.card.value_range is not None:
            scores["invalid"] = self.invalid.compute()
        return scores

    def reset(self) -> None:
        """Forget all rows."""
        for metric in [*self.metrics.values(), self.invalid]:
            metric.reset()


def average(scores: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of the scores of `TaskMetrics.compute`, without the number of invalid predictions."""
    return torch.stack([value.float() for name, value in scores.items() if name != "invalid"]).mean()


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


def _number(text: str, low: float, high: float) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if low <= value <= high else None


def _halves(group: str) -> tuple[float, float]:
    digest = hashlib.blake2b(group.encode(), digest_size=6).digest()
    # 24 bits each: what float32 represents exactly.
    return float(int.from_bytes(digest[:3], "big")), float(int.from_bytes(digest[3:], "big"))
