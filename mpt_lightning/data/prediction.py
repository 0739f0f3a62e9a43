"""Rows to predict: strings or columns, checked and tokenised as in training."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.examples import Example
from mpt_lightning.data.tokenize import Encoder
from mpt_lightning.errors import MPTError

Text = str | Mapping[str, str]


@dataclass
class Row:
    """A row as token ids: the input as the model reads it, its ids, and those of each of the task's choices."""

    task: str
    text: str
    ids: list[int]
    choices: list[list[int]]


def encode_rows(
    encoder: Encoder, cards: Mapping[str, TaskCard], given: Sequence[Any], tasks: Sequence[str], raw: bool
) -> list[Row]:
    """Tokenise B rows, strings or mappings of columns; with `raw`, strings are read without the card's template."""
    rows: dict[int, Row] = {}
    for task in dict.fromkeys(tasks):
        numbers, card = [number for number, name in enumerate(tasks) if name == task], cards.get(task)
        choices = card.words(encoder.family) if card is not None else None
        values: list[Any] = [_read(number, given[number], task, None if raw else card) for number in numbers]
        if card is None or raw:
            inputs, texts = encoder.format.encode_inputs(values, choices), values
            for number, encoded in zip(numbers, inputs, strict=True):
                if not 0 < len(encoded.ids) <= encoder.max_input_length:
                    raise MPTError(
                        f"Text {number} (task {task}) has {len(encoded.ids)} tokens, expected 1 to "
                        f"{encoder.max_input_length}; change the text, or give its columns, one of which may be cut."
                    )
        else:
            fitted = encoder.fit(card, values)
            inputs, texts = [encoded for _, encoded in fitted], [encoder.text(card, e.values) for e, _ in fitted]
        own = encoder.format.choices(inputs, choices)
        for number, text, encoded, ids in zip(numbers, texts, inputs, own, strict=True):
            rows[number] = Row(task, text, encoded.ids, ids)
    return [rows[number] for number in range(len(given))]


def _read(row: int, given: Any, task: str, card: TaskCard | None) -> str | Example:
    """Check a row; return its text if there is no template to fill, else its columns."""
    where = f"Text {row} (task {task})"
    columns = ["text"] if card is None else card.columns
    if isinstance(given, str):
        if len(columns) > 1:
            raise MPTError(
                f"{where}: got a string, expected a mapping of the columns {', '.join(columns)}; give these, or "
                "raw=True (--raw) with the text as the model reads it."
            )
        given = {columns[0]: given}
    elif card is None or not isinstance(given, Mapping):
        expected = "a string" if card is None else "a string or a mapping of columns"
        raise MPTError(f"{where}: got {type(given).__name__}, expected {expected}; change `texts`.")
    if missing := [column for column in columns if column not in given]:
        raise MPTError(f"{where} has no {', '.join(missing)}; the card reads {', '.join(columns)}.")
    values = {column: plain_text(given[column], column, where) for column in columns}
    may_be_empty = card is not None and card.empty_text == "keep"
    if not may_be_empty and (empty := [column for column, text in values.items() if not text.strip()]):
        raise MPTError(f"{where} has nothing in {', '.join(empty)}, expected some text; change `texts`.")
    return values["text"] if card is None else Example(row, values, "", [], "")


def plain_text(value: Any, field: str, where: str) -> str:
    """Return a field's text, numbers as digits; raise MPTError if it is not text."""
    plain = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    # Halves of surrogate pairs, which JSON can write, are not characters.
    if not plain or re.search("[\0\ud800-\udfff]", str(value)):
        raise MPTError(f"{where}: got {field}={str(value)[:40]!r} ({type(value).__name__}), expected text.")
    return str(value)
