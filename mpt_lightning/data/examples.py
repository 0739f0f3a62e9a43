"""Rows become texts: the template's columns, the target, the references."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets.arrow_dataset import Dataset

from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.source import ROW
from mpt_lightning.errors import MPTError


@dataclass(frozen=True)
class Example:
    """One row as text."""

    row_id: int  # in the Hub's split
    values: dict[str, str]  # by the columns of the template
    target: str  # what the model learns to write
    references: list[str]  # what counts as right
    group: str  # id of the rows that are scored together, or ""


def read_examples(card: TaskCard, rows: Dataset) -> Iterator[Example | None]:
    """Yield one example per row, None for a row that the card drops."""
    needed = [column.split(".")[0] for column in (*card.columns, card.label, card.group or card.label)]
    if missing := [column for column in needed if column not in rows.column_names]:
        found = ", ".join(column for column in rows.column_names if column != ROW)
        raise MPTError(f"Task '{card.name}': got no column '{missing[0]}', expected one of {found}; change the card.")
    # By batches, since reading single rows costs several times as much.
    for batch in rows.select_columns(list(dict.fromkeys([*needed, ROW]))).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield _to_example(card, dict(zip(batch, values, strict=True)))


def _to_example(card: TaskCard, row: dict[str, Any]) -> Example | None:
    where = f"Task '{card.name}', row {row[ROW]}"
    values = {column: _text(row[column], column, where) for column in card.columns}
    if card.empty_text != "keep" and (empty := [column for column, text in values.items() if not text.strip()]):
        if card.empty_text == "drop":
            return None
        raise MPTError(
            f"{where}: got an empty text in column '{empty[0]}', expected some text; change the data, or set "
            "`empty_text: drop` or `keep` on the card."
        )
    label = _column(row, card.label, where)
    answers = label if isinstance(label, Sequence) and not isinstance(label, str | bytes) else [label]
    texts = [text for answer in answers if (text := _text(answer, card.label, where)).strip()]
    never_negative = card.choices is not None or (card.value_range is not None and card.value_range[0] > -1)
    if not texts or (never_negative and label == -1):
        if card.unlabelled == "drop":
            return None
        raise MPTError(
            f"{where}: got no label ({label!r}) in column '{card.label}', expected a label; change `splits`, or set "
            "`unlabelled: drop` on the card."
        )
    target, references = _label_texts(card, label, texts, where)
    group = ""
    if card.group:
        if (value := _column(row, card.group, where)) is None:
            raise MPTError(f"{where}: got nothing in column '{card.group}', expected a group; change the data.")
        group = _text(value, card.group, where)
    return Example(int(row[ROW]), values, target, references, group)


def _column(row: dict[str, Any], name: str, where: str) -> Any:
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise MPTError(f"{where}: got no '{name}' ({value!r} has no '{part}'), expected one; change the data.")
        value = value[part]
    return value


def _text(value: Any, column: str, where: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str | int | float):
        raise MPTError(
            f"{where}: got {type(value).__name__} in column '{column}', expected text; change `input` or add a "
            "`preprocess` function to the card."
        )
    if "\0" in (text := str(value)):
        raise MPTError(
            f"{where}: got {text[:40]!r} in column '{column}', expected text without zero bytes; change the data, "
            "which is damaged or in another encoding."
        )
    return text


def _label_texts(card: TaskCard, label: Any, texts: list[str], where: str) -> tuple[str, list[str]]:
    """Return the target and the references of a label, whose answers are `texts`."""
    if card.choices is not None:
        names = card.label_names or card.choices
        if label in names:
            label = names.index(label)
        if not isinstance(label, str) and label in range(len(names)):
            word = card.choices[int(label)]
            return word, [word]
        raise MPTError(
            f"{where}: got label {label!r}, expected 0 to {len(names) - 1} or one of {', '.join(names)}; change the "
            "data, or `label`, `choices` or `label_names` of the card."
        )
    if card.value_range is not None:
        low, high = card.value_range
        try:
            value = float(label)
        except (TypeError, ValueError):
            value = math.nan
        if not low <= value <= high:
            raise MPTError(
                f"{where}: got label {label!r}, expected a number from {low:g} to {high:g}; change the data, `label` "
                "or `value_range` of the card."
            )
        # The model writes values of the grid; metrics compare with the annotated value.
        grid = min(high, low + round((value - low) / card.value_step) * card.value_step)
        return f"{grid:.1f}", [f"{value:.6g}"]
    return texts[0], texts
