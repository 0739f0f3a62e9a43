"""A card's metric names become torchmetrics; text is the currency."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, PearsonCorrCoef, SpearmanCorrCoef, SumMetric
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import SacreBLEUScore, SQuAD

from mpt_lightning.errors import MPTError

_ROUGE_KEYS = ("rouge1", "rouge2", "rougeL")


class ScoredTask(Protocol):
    """What metrics need of a task's card; see `mpt_lightning.data.card.TaskCard`."""

    name: str
    metrics: list[str]
    choices: list[str] | None
    value_range: tuple[float, float] | None


class GroupExactMatch(Metric):
    """Share of groups whose rows are all right (MultiRC: questions with every answer judged right)."""

    full_state_update = False
    higher_is_better = True
    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        # Flat float32 triples (two halves of the group's hash, right or wrong): torchmetrics stands in a flat float32
        # tensor for a rank without rows, and other shapes or types would not join with it.
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, correct: Sequence[bool], groups: Sequence[str]) -> None:
        """Add rows.

        Args:
            correct: Whether each row [B] is right.
            groups: Group id of each row [B].
        """
        triples = [(*_halves(group), float(right)) for right, group in zip(correct, groups, strict=True)]
        self.rows.append(torch.tensor(triples, device=self.device).flatten())

    def compute(self) -> Tensor:
        """Share of groups that are right, 0 to 1."""
        rows = torch.cat([self.rows] if isinstance(self.rows, Tensor) else self.rows).view(-1, 3)
        groups, index = rows[:, :2].unique(dim=0, return_inverse=True)
        right = torch.ones(len(groups), device=rows.device)
        return right.scatter_reduce(0, index, rows[:, 2], reduce="amin").mean()


class TaskMetrics(nn.Module):
    """The metrics of a task's card, right over partial batches and over ranks.

    Args:
        card: The task. Its `metrics` give these scores: accuracy, f1 (class 1 is positive), macro_f1, matthews,
            pearson and spearman under their names; `squad` gives em and f1; `multirc` gives f1a and em (a question
            counts if all its answers are right); `bleu` gives bleu (SacreBLEU, 13a); `rouge` gives rouge1, rouge2
            and rougeL (F-measure of the best reference).

    A prediction that is no label of the task counts as wrong: a class that is not the gold one, or the end of the value
    range farthest from the gold value. `invalid` says how many there were.
    """

    def __init__(self, card: ScoredTask) -> None:
        super().__init__()
        self.card = card
        self.metrics = nn.ModuleDict({name: _build(name, len(card.choices or [])) for name in card.metrics})
        if "multirc" in card.metrics:
            self.metrics["multirc_em"] = GroupExactMatch()
        self.invalid = SumMetric()

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]], groups: Sequence[str]) -> None:
        """Add a batch.

        Args:
            predictions: Predicted text of each row [B].
            references: Texts that count as right, for each row [B].
            groups: Group id of each row [B], "" for none.

        Raises:
            MPTError: If the lengths differ, or a reference is no label of the task.
        """
        if not len(predictions) == len(references) == len(groups):
            raise MPTError(
                f"Task '{self.card.name}': got {len(predictions)} predictions, {len(references)} references and "
                f"{len(groups)} groups, expected as many of each."
            )
        if not predictions:
            return
        if self.card.choices is not None:
            self._update_classes(self.card.choices, predictions, references, groups)
        if self.card.value_range is not None:
            self._update_values(*self.card.value_range, predictions, references)
        self._update_texts(predictions, references)

    def _update_classes(
        self,
        choices: list[str],
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        groups: Sequence[str],
    ) -> None:
        ids = {_normal(word): number for number, word in enumerate(choices)}
        gold = [ids.get(_normal(words[0]), -1) for words in references]
        if -1 in gold:
            wrong = references[gold.index(-1)][0]
            raise MPTError(
                f"Task '{self.card.name}': got the reference {wrong!r}, expected one of {', '.join(choices)}; change "
                "`choices` of the card."
            )
        got = [ids.get(_normal(text), -1) for text in predictions]
        self.invalid.update(got.count(-1))
        got = [(right + 1) % len(choices) if label < 0 else label for label, right in zip(got, gold, strict=True)]
        pair = self._tensors(got, gold)
        for name in ("accuracy", "f1", "macro_f1", "matthews", "multirc"):
            if name in self.metrics:
                self._metric(name).update(*pair)
        if "multirc_em" in self.metrics:
            correct = [label == right for label, right in zip(got, gold, strict=True)]
            self._metric("multirc_em").update(correct, groups)

    def _update_values(
        self, low: float, high: float, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> None:
        gold = [float(texts[0]) for texts in references]
        got, invalid = [], 0
        for text, right in zip(predictions, gold, strict=True):
            value = _number(text)
            if value is None or not low <= value <= high:
                invalid += 1
                value = low if right - low > high - right else high
            got.append(value)
        self.invalid.update(invalid)
        pair = self._tensors(got, gold)
        for name in ("pearson", "spearman"):
            if name in self.metrics:
                self._metric(name).update(*pair)

    def _update_texts(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        if "squad" in self.metrics:
            # The ids only pair predictions with answers inside this call.
            got = [{"prediction_text": text, "id": str(row)} for row, text in enumerate(predictions)]
            gold = [
                {"answers": {"text": list(texts), "answer_start": [0] * len(texts)}, "id": str(row)}
                for row, texts in enumerate(references)
            ]
            self._metric("squad").update(got, gold)
        if "bleu" in self.metrics:
            self._metric("bleu").update(list(predictions), [list(texts) for texts in references])
        if "rouge" in self.metrics:
            # Not torchmetrics' ROUGEScore: it gathers row by row and hangs when ranks have different numbers of rows.
            scores = rouge_score(list(predictions), [list(texts) for texts in references], rouge_keys=_ROUGE_KEYS)
            means = self.metrics["rouge"]
            for key in _ROUGE_KEYS:
                means[key].update(scores[f"{key}_fmeasure"], weight=len(predictions))  # type: ignore[index]

    def compute(self) -> dict[str, Tensor]:
        """Scores over all rows of all ranks, by name.

        Returns:
            Scores from 0 to 1 (matthews, pearson, spearman: -1 to 1; 0 where they are undefined, as for constant
            predictions), and `invalid`, the number of predictions that are no label, for classes and values.
        """
        scores: dict[str, Tensor] = {}
        with warnings.catch_warnings():
            # Constant predictions are a documented case here, not a surprise.
            warnings.filterwarnings("ignore", message="The variance of predictions or target is close to zero")
            for name in self.card.metrics:
                if name == "squad":
                    both = self._metric("squad").compute()
                    scores |= {"em": both["exact_match"] / 100, "f1": both["f1"] / 100}
                elif name == "multirc":
                    scores |= {"f1a": self._metric(name).compute(), "em": self._metric("multirc_em").compute()}
                elif name == "rouge":
                    means = self.metrics["rouge"]
                    scores |= {key: means[key].compute() for key in _ROUGE_KEYS}  # type: ignore[index]
                else:
                    scores[name] = torch.nan_to_num(self._metric(name).compute(), nan=0.0)
        if self.card.choices is not None or self.card.value_range is not None:
            scores["invalid"] = self.invalid.compute()
        return scores

    def reset(self) -> None:
        """Forget all rows."""
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def _metric(self, name: str) -> Metric:
        metric = self.metrics[name]
        if not isinstance(metric, Metric):
            raise TypeError(f"'{name}' is a {type(metric).__name__}, not one metric.")
        return metric

    def _tensors(self, *columns: Sequence[float]) -> list[Tensor]:
        return [torch.tensor(column, device=self.invalid.device) for column in columns]


def average(scores: Mapping[str, Tensor]) -> Tensor:
    """Mean of a task's scores, without the count of invalid predictions.

    Args:
        scores: What `TaskMetrics.compute` gave.

    Returns:
        The mean.
    """
    return torch.stack([value.float() for name, value in scores.items() if name != "invalid"]).mean()


def _build(name: str, num_classes: int) -> nn.Module:
    if name == "accuracy":
        return MulticlassAccuracy(num_classes, average="micro")
    if name in ("f1", "multirc"):
        return BinaryF1Score()
    if name == "macro_f1":
        return MulticlassF1Score(num_classes, average="macro")
    if name == "matthews":
        return MulticlassMatthewsCorrCoef(num_classes)
    if name == "pearson":
        return PearsonCorrCoef()
    if name == "spearman":
        with warnings.catch_warnings():
            # It keeps all rows, which is what a rank correlation needs.
            warnings.filterwarnings("ignore", message="Metric `SpearmanCorrcoef` will save all targets")
            return SpearmanCorrCoef()
    if name == "squad":
        return SQuAD()
    if name == "bleu":
        return SacreBLEUScore()
    if name == "rouge":
        return nn.ModuleDict({key: MeanMetric() for key in _ROUGE_KEYS})
    raise MPTError(f"Got the metric {name!r}, expected one of the names in `mpt_lightning.data.card.METRICS`.")


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _halves(group: str) -> tuple[float, float]:
    digest = hashlib.blake2b(group.encode(), digest_size=6).digest()
    # 24 bits each: what float32 holds exactly.
    return float(int.from_bytes(digest[:3], "big")), float(int.from_bytes(digest[3:], "big"))
