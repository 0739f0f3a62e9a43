"""Input templates: columns in braces, slots for a prompt's tokens (`[prompt*4]`), and a card's other patterns (PET)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, islice
from string import Formatter
from typing import TYPE_CHECKING, Any

from mpt_lightning.errors import MPTError

if TYPE_CHECKING:
    from mpt_lightning.data.card import TaskCard

# The places of the answer and of the second segment in a template for masked language models.
MASK, SEPARATOR = "[MASK]", "[SEP]"
# How the places of a prompt's tokens begin.
SLOT = "[prompt*"
_SLOTS = re.compile(r"\[prompt\*(\d+)\]")
# Places, and what was probably meant as one.
_PLACES = re.compile(r"\[(?:mask|sep|prompt)[^\]]*\]|<mask>", re.IGNORECASE)


def wrong_places(text: str) -> list[str]:
    """Return what looks like one of a text's places and is none, such as `[mask]` or `[prompt 4]`."""
    return [p for p in _PLACES.findall(text) if p not in (MASK, SEPARATOR) and not _SLOTS.fullmatch(p)]


@lru_cache
def parse_template(template: str) -> tuple[tuple[str, str | None], ...]:
    """Return a template's (literal text, column that follows it or None) pairs; an error is what was expected."""
    try:
        parsed = list(Formatter().parse(template))
    except (ValueError, TypeError) as error:
        raise ValueError(f"a template like 'text: {{sentence}}' ({error})") from None
    for _, column, spec, conversion in parsed:
        if column is not None and (not column or column.isdigit() or re.search(r"[.\[\]]", column)):
            raise ValueError("plain column names in braces, like {sentence}")
        if spec or conversion:
            raise ValueError("column names without a format, like {sentence}")
    return tuple((literal, column) for literal, column, _, _ in parsed)


def render(card: TaskCard, values: Mapping[str, str]) -> str:
    """Return the card's template filled with the text of each column."""
    return "".join(literal + (values[column] if column else "") for literal, column in card.parts)


def count_slots(text: str) -> int:
    """Return the number of prompt tokens that a text has slots for.

    Example:
        >>> count_slots("[prompt*4] sentence : {sentence} [prompt*2]")
        6
    """
    return sum(int(count) for count in _SLOTS.findall(text))


def with_slots(text: str, tokenize: Callable[[str], list[int]]) -> list[int]:
    """Return a text's token ids, with -1, -2, ... in its slots; `tokenize` returns those of a piece of text.

    Example:
        >>> with_slots("[prompt*2] a [prompt*1]", lambda piece: [ord(c) for c in piece if c != " "])
        [-1, -2, 97, -3]
    """
    ids: list[int] = []
    slots = count(-1, -1)
    for number, piece in enumerate(_SLOTS.split(text)):
        if number % 2:
            ids += islice(slots, int(piece))
        elif piece.strip():
            ids += tokenize(piece)
    return ids


@dataclass
class Pattern:
    """Another input template of a task, over columns of the card's own `input`.

    `choices` are the words of class 0..C-1 that fit it (a verbalizer). Unset: the card's.
    """

    input: str
    choices: list[str] | None = None


def read_pattern(card: TaskCard, option: str, given: Any) -> Pattern:
    """Return a pattern of a card's file, which is a mapping with `input` and `choices`; `option` is its field."""
    try:
        return given if isinstance(given, Pattern) else Pattern(**given)
    except TypeError:
        raise MPTError(
            f"Task card '{card.name}': got {given!r} in {option}, expected a mapping with `input` and optional "
            f"`choices`; change `{option}`."
        ) from None


def apply_pattern(card: TaskCard, number: int) -> TaskCard:
    """Return the card with pattern `number`, from 0, in place of its input, and without further patterns."""
    if not 0 <= number < len(card.patterns):
        expected = f"0 to {len(card.patterns) - 1}" if card.patterns else "none, since the card has no `patterns`"
        raise MPTError(
            f"Task '{card.name}': got pattern={number}, expected {expected}; change `pattern`, or leave it unset."
        )
    return with_pattern(card, card.patterns[number], f"patterns[{number}]")


def with_pattern(card: TaskCard, pattern: Pattern, where: str) -> TaskCard:
    """Return the card with a pattern in place of its input, and without further patterns.

    Args:
        card: The card.
        pattern: The pattern.
        where: The card's field that contains the pattern, for messages: `masked` or `patterns[0]`.

    Raises:
        MPTError: If the pattern is not a template over the card's columns, or has another number of choices.
    """
    option, where = where.split("[")[0], f"Task card '{card.name}', {where}"
    # A regression task keeps the two words of `masked`, which are the ends of its scale.
    words = None if pattern is card.masked and card.value_range is not None else pattern.choices
    if words is not None and len(words) != len(card.choices or []):
        raise MPTError(
            f"{where}: got {len(words)} choices, expected {len(card.choices or [])}, one for each of the card's "
            f"`choices`; change `{option}`."
        )
    try:
        chosen = replace(
            card,
            input=pattern.input,
            choices=words or card.choices,
            label_names=card.label_names or card.choices,
            patterns=[],
            masked=card.masked and replace(card.masked, input=pattern.input) if card.value_range is not None else None,
        )
    except ValueError as error:
        text = str(error).removeprefix(f"Task card '{card.name}': ")
        raise MPTError(f"{where}: {text}") from error
    if unknown := [column for column in chosen.columns if column not in card.columns]:
        raise MPTError(
            f"{where}: got the column '{unknown[0]}', expected columns of the card's `input` "
            f"({', '.join(card.columns)}); change `{option}`."
        )
    return chosen
