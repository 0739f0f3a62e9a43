"""Places for a prompt's tokens among a text's: `[prompt*4]` in a card's `input` or in the answer prefix."""

from __future__ import annotations

import re
from collections.abc import Callable

_MARK = re.compile(r"\[prompt\*(\d+)\]")


def count_slots(text: str) -> int:
    """Give the number of prompt tokens that a text has places for.

    Example:
        >>> count_slots("[prompt*4] sentence : {sentence} [prompt*2]")
        6
    """
    return sum(int(count) for count in _MARK.findall(text))


def with_slots(text: str, tokenize: Callable[[str], list[int]]) -> list[int]:
    """Tokenise a text; the prompt's tokens are -1, -2, ... in their order.

    Args:
        text: the text with its marks.
        tokenize: gives the ids of a piece of text, without special tokens.

    Example:
        >>> with_slots("[prompt*2] a [prompt*1]", lambda piece: [ord(c) for c in piece if c != " "])
        [-1, -2, 97, -3]
    """
    ids: list[int] = []
    slots = 0
    for number, piece in enumerate(_MARK.split(text)):
        if number % 2:
            ids += [-1 - slot for slot in range(slots, slots + int(piece))]
            slots += int(piece)
        elif piece.strip():
            ids += tokenize(piece)
    return ids
