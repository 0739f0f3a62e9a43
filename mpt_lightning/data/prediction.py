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
    """A row as token ids.

    Attributes:
        task: its task's name.
        text: the input as the model reads it.
        ids: token ids of the text.
        choices: token ids of each of the task's choices; empty for tasks without choices.
    """

    task: str
    text: str
    ids: list[int]
    choices: list[list[int]]


def encode_rows(
    encoder: Encoder, cards: Mapping[str, TaskCard], given: Sequence[Any], tasks: Sequence[str], raw: bool
) -> list[Row]:
    """Tokenise rows, those of a task together.

    Args:
        encoder: how texts become tokens.
        cards: the tasks' cards by name.
        given: [B] strings or mappings of columns.
        tasks: [B] the rows' tasks.
        raw: read strings as they are, without the card's template.

    Returns:
        [B].

    Raises:
        MPTError: a row cannot be read; the message names it.
    """
    read = [_read(number, given[number], task, cards.get(task), raw) for number, task in enumerate(tasks)]
    rows: dict[int, Row] = {}
    for task in dict.fromkeys(tasks):
        numbers, card = [number for number, name in enumerate(tasks) if name == task], cards.get(task)
        choices = card.choices if card is not None else None
        if card is None or raw:
            texts: list[Any] = [read[number] for number in numbers]
            placed = encoder.place(texts, choices)
            for number, place in zip(numbers, placed, strict=True):
                if not 0 < len(place.ids) <= encoder.max_input_length:
                    raise MPTError(
                        f"Text {number} (task {task}) has {len(place.ids)} tokens, expected 1 to "
                        f"{encoder.max_input_length}; change the text, or give its columns, of which the card says "
                        "which one may be cut."
                    )
        else:
            examples: list[Any] = [read[number] for number in numbers]
            fitted = encoder.fit_all(card, examples)
            texts, placed = (
                [encoder.text(card, example.values) for example, _ in fitted],
                [place for _, place in fitted],
            )
        for number, text, place, ids in zip(numbers, texts, placed, encoder.choices(placed, choices), strict=True):
            rows[number] = Row(task, text, place.ids, ids)
    return [rows[number] for number in range(len(given))]


def _read(row: int, given: Any, task: str, card: TaskCard | None, raw: bool) -> str | Example:
    """Check a row; return its text where there is no template to fill, else its columns."""
    where = f"Text {row} (task {task})"
    if not isinstance(given, str | Mapping) or (raw and not isinstance(given, str)):
        expected = "a string" if raw else "a string or a mapping of columns"
        raise MPTError(f"{where}: got {type(given).__name__}, expected {expected}; change `texts`.")
    if raw or card is None:
        if not isinstance(given, str):
            raise MPTError(f"{where} is given as columns, and the checkpoint has no card of the task; give a text.")
        if not given.strip():
            raise MPTError(f"{where} is empty; give some text.")
        return plain_text(given, "text", where)
    columns = card.columns
    if isinstance(given, str):
        if len(columns) > 1:
            raise MPTError(
                f"{where}: got a string, expected a mapping of the columns {', '.join(columns)}; give these, or "
                "raw=True (--raw) with the text as the model reads it."
            )
        given = {columns[0]: given}
    if missing := [column for column in columns if column not in given]:
        raise MPTError(f"{where} has no {', '.join(missing)}; the card reads {', '.join(columns)}.")
    values = {column: plain_text(given[column], column, where) for column in columns}
    if card.empty_text != "keep" and (empty := [column for column, text in values.items() if not text.strip()]):
        raise MPTError(f"{where} has nothing in {', '.join(empty)}; give some text.")
    return Example(row, values, "", [], "")


def plain_text(value: Any, field: str, where: str) -> str:
    """Return a field's text; numbers are written out.

    Raises:
        MPTError: it is not text.
    """
    plain = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    # Halves of surrogate pairs, which JSON can write, are not characters.
    if not plain or re.search("[\0\ud800-\udfff]", str(value)):
        raise MPTError(f"{where}: got {field}={str(value)[:40]!r} ({type(value).__name__}), expected text.")
    return str(value)
