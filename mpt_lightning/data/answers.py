"""Answers in their places: a decoder-only model reads an answer as its tokenizer cuts text and answer together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import models
from transformers import PreTrainedTokenizerBase

#: Most answers that are remembered, which bounds the memory of a task with free text.
_REMEMBERED = 100_000


@dataclass(frozen=True)
class Placed:
    """A text up to its answer.

    Args:
        text: The text as it was tokenised; it ends with the space before the answer where the tokenizer joins that
            to the text's last word.
        ids: Token ids of the text.
        gap: What stands between the text and the answer: a space or nothing.
    """

    text: str
    ids: list[int]
    gap: str = ""


class Joiner:
    """Splits the tokens of `text answer` into those of the text and those of the answer.

    Most tokenizers join a space to the word after it ("it was| good"), some to the word before it ("it was |good").
    The ids of a text are followed by those that the answer adds, as long as they are a prefix of the ids of both.

    Args:
        tokenizer: The tokenizer.
        tokenize: Returns the ids of texts as the model reads them, without an end of sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokenize: Callable[[list[str]], list[list[int]]]) -> None:
        self._tokenize = tokenize
        model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
        # These models merge neighbouring tokens only, so that the last ones decide what an answer adds.
        self._local = isinstance(model, models.BPE | models.WordPiece | models.WordLevel)
        self._added: dict[tuple[tuple[int, ...], str], list[int] | None] = {}

    def place(self, texts: Sequence[str], answers: Sequence[str]) -> list[Placed]:
        """Tokenise texts up to their answers.

        Args:
            texts: B texts. One space at the end is the one before the answer; other whitespace there replaces it.
            answers: What may follow each of them; an empty string where that is not known.

        Returns:
            B texts. The space before the answer is left to the answer, unless the ids of the text alone are not a
            prefix for each of `answers` and those of the text with the space are.
        """
        placed = []
        stems = [text.removesuffix(" ") for text in texts]
        for text, stem, ids in zip(texts, stems, self._tokenize(stems), strict=True):
            placed.append(Placed(stem, ids, "" if text == stem and text[-1:].isspace() else " "))
        moved = [row for row, fits in enumerate(self._fits(placed, answers)) if not fits and placed[row].gap]
        if moved:
            with_space = [f"{stems[row]} " for row in moved]
            wider = [Placed(text, ids) for text, ids in zip(with_space, self._tokenize(with_space), strict=True)]
            for row, fits, place in zip(moved, self._fits(wider, answers), wider, strict=True):
                placed[row] = place if fits else placed[row]
        return placed

    def _fits(self, placed: Sequence[Placed], answers: Sequence[str]) -> list[bool]:
        columns = [self.added(placed, [answer] * len(placed)) for answer in answers]
        return [None not in row for row in zip(*columns, strict=True)]

    def added(self, placed: Sequence[Placed], answers: Sequence[str]) -> list[list[int] | None]:
        """Return the ids that answers add to their texts.

        Args:
            placed: B texts.
            answers: One answer for each [B].

        Returns:
            B lists of ids; None where the ids of a text are not a prefix of those of text and answer together.
        """
        keys = [
            (tuple(place.ids[-2:] if self._local else place.ids), place.gap + answer)
            for place, answer in zip(placed, answers, strict=True)
        ]
        found = {key: self._added[key] for key in keys if key in self._added}
        new = {key: place for key, place in zip(keys, placed, strict=True) if key not in found}
        if new:
            joined = self._tokenize([place.text + continuation for (_, continuation), place in new.items()])
            for (key, place), ids in zip(new.items(), joined, strict=True):
                size = len(place.ids)
                found[key] = ids[size:] if ids[:size] == place.ids else None
            if len(self._added) + len(new) > _REMEMBERED:
                self._added.clear()
            self._added |= {key: found[key] for key in new}
        return [found[key] for key in keys]
