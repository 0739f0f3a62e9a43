"""Patterns of a card: other words around the same columns, and other words for the same classes (PET)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from mpt_lightning.errors import MPTError

if TYPE_CHECKING:
    from mpt_lightning.data.card import TaskCard


@dataclass
class Pattern:
    """Another input template of a task.

    Args:
        input: Template over columns of the card's own `input`.
        choices: Words of class 0..C-1 that fit it (a verbaliser). Unset: the card's.
    """

    input: str
    choices: list[str] | None = None


def read_patterns(card: TaskCard, given: Any) -> list[Pattern]:
    """Make patterns of what a card's file has.

    Args:
        card: The card.
        given: A list of patterns, or of mappings with `input` and `choices`.

    Returns:
        The patterns.

    Raises:
        MPTError: If it is something else.
    """
    known = {item.name for item in fields(Pattern)}
    items = given if isinstance(given, list) else [given]
    for number, item in enumerate(items):
        mapping = isinstance(item, Mapping) and "input" in item and set(item) <= known
        if not isinstance(given, list) or not (mapping or isinstance(item, Pattern)):
            raise MPTError(
                f"Task card '{card.name}': got patterns[{number}]={item!r}, expected a list of mappings with `input` "
                "and, if its words are others, `choices`; change `patterns`."
            )
    return [item if isinstance(item, Pattern) else Pattern(**item) for item in items]


def apply_pattern(card: TaskCard, number: int) -> TaskCard:
    """The card with one of its patterns in place of its input.

    Args:
        card: The card.
        number: Place in `card.patterns`, from 0.

    Returns:
        The card, without further patterns.

    Raises:
        MPTError: If there is no such pattern, or if it does not fit the card.
    """
    if not 0 <= number < len(card.patterns):
        there = f"0 to {len(card.patterns) - 1}" if card.patterns else "none, since the card has no `patterns`"
        raise MPTError(
            f"Task '{card.name}': got pattern={number}, expected {there}; change `pattern`, or leave it unset for the "
            "card's `input`."
        )
    pattern, where = card.patterns[number], f"Task card '{card.name}', patterns[{number}]"
    try:
        chosen = replace(card, input=pattern.input, choices=pattern.choices or card.choices, patterns=[])
    except ValueError as error:
        raise MPTError(f"{where}: {error}") from error
    if unknown := [column for column in chosen.columns if column not in card.columns]:
        raise MPTError(
            f"{where}: got the column '{unknown[0]}', expected columns of the card's `input` "
            f"({', '.join(card.columns)}); change `patterns`."
        )
    if pattern.choices is not None and len(pattern.choices) != len(card.choices or []):
        raise MPTError(
            f"{where}: got {len(pattern.choices)} choices, expected {len(card.choices or [])}, one for each of the "
            "card's `choices`; change `patterns`."
        )
    return chosen
