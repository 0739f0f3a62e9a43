"""From texts to token ids: the tokenizer's side of a task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from mpt_lightning.backbones.family import Family, family_of
from mpt_lightning.backbones.load import load_config
from mpt_lightning.backbones.tokenizer import load_tokenizer
from mpt_lightning.data.answers import Joiner, Placed
from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.examples import Example
from mpt_lightning.data.rows import Split
from mpt_lightning.data.slots import count_slots, with_slots
from mpt_lightning.errors import MPTError

_CHUNK = 1000


@dataclass
class Encoder:
    """How a backbone reads and writes text.

    Args:
        tokenizer: Its tokenizer.
        family: The backbone's. For "seq2seq" the tokenizer closes inputs and targets as it was pretrained. For "causal"
            the input stays open and the target is what the answer adds to it, then the end of sequence; see `Joiner`.
        max_input_length: Most tokens of an input.
        answer_prefix: Words at the end of every input, joined with one space where there is no whitespace yet.
        with_bos: Whether inputs begin with what the tokenizer puts before a text; off where a context, which begins
            with it, comes before them. Decoder-only models.
    """

    tokenizer: PreTrainedTokenizerBase
    family: Family
    max_input_length: int
    answer_prefix: str = ""
    with_bos: bool = True

    def __post_init__(self) -> None:
        """Check the options, which may come from a checkpoint, and that a target can be closed."""
        if type(self.max_input_length) is not int or self.max_input_length < 1:
            raise MPTError(f"Got max_input_length={self.max_input_length!r}, expected a number of tokens >= 1.")
        if not isinstance(self.answer_prefix, str):
            raise MPTError(f"Got answer_prefix={self.answer_prefix!r}, expected a text.")
        if self.tokenizer.eos_token_id is None:
            raise MPTError(
                f"Tokenizer '{self.tokenizer.name_or_path}': got no end-of-sequence token, expected one to close "
                "targets with; change `backbone` or set its `eos_token`."
            )

    @classmethod
    def from_backbone(cls, backbone: str, max_input_length: int, **options: Any) -> Encoder:
        """Load the tokenizer and family of a backbone.

        Args:
            backbone: Hub id or local folder.
            max_input_length: Most tokens of an input.
            **options: `answer_prefix` and `with_bos`.

        Returns:
            The encoder.
        """
        family = family_of(load_config(backbone))
        return cls(load_tokenizer(backbone), family, max_input_length, **options)

    @property
    def pad_id(self) -> int:
        """Id for padding; the end of sequence where the tokenizer has none (the mask covers it)."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    @cached_property
    def identity(self) -> str:
        """Hash of all that decides which ids a text becomes."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        state = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        kind = (self.tokenizer.eos_token_id, self.family, self.max_input_length)
        return str(Hasher.hash([type(self.tokenizer).__name__, state, kind, self.answer_prefix, self.with_bos]))

    @property
    def opening(self) -> list[int]:
        """Ids that the tokenizer puts before a text: BOS, or none."""
        return list(self._around[0])

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        encoded = self.tokenizer("a", return_special_tokens_mask=True, verbose=False)
        ids, special = list(encoded["input_ids"]), [*encoded["special_tokens_mask"]]
        first = [*special, 0].index(0)
        last = [*special[::-1], 0].index(0)
        return ids[:first], ids[len(ids) - last :]

    def text(self, card: TaskCard, values: dict[str, str]) -> str:
        """The input text: the card's template, filled, then the answer prefix.

        Args:
            card: The task.
            values: Text of each column.

        Returns:
            The text.
        """
        text = render(card, values)
        joined = not self.answer_prefix or self.answer_prefix[0].isspace() or not text or text[-1].isspace()
        return f"{text}{self.answer_prefix}" if joined else f"{text} {self.answer_prefix}"

    def inputs(self, texts: list[str]) -> list[list[int]]:
        """Token ids of input texts, of any length; -1, -2, ... where a text has places for a prompt's tokens.

        Args:
            texts: B texts.

        Returns:
            B lists of ids.
        """
        if any(count_slots(text) for text in texts):
            return [self._with_slots(text) for text in texts]
        if self.family == "seq2seq":
            return self._ids(texts)
        eos = self.tokenizer.eos_token_id
        ids = self._ids(texts, add_special_tokens=self.with_bos)
        return [row[:-1] if row[-1:] == [eos] else row for row in ids]

    @cached_property
    def _joiner(self) -> Joiner:
        return Joiner(self.tokenizer, self.inputs)

    def place(self, texts: list[str], choices: list[str] | None) -> list[Placed]:
        """Tokenise texts up to their answers.

        Args:
            texts: B texts.
            choices: The task's choices, if any: the space before the answer is tokenised with the text or with the
                answer, whichever suits them all. It never depends on the right answer.

        Returns:
            B texts with their ids.
        """
        if self.family == "seq2seq":
            return [Placed(text, ids) for text, ids in zip(texts, self.inputs(texts), strict=True)]
        return self._joiner.place(texts, choices or [""])

    def answers(self, placed: list[Placed], answers: list[str]) -> list[list[int]]:
        """Return the label ids of answers in their places, closed by the end of sequence.

        Args:
            placed: B texts.
            answers: One answer for each [B].

        Returns:
            B lists of ids. Decoder-only models: where the ids of a text are not a prefix of those of text and answer
            together, the ids of `targets`.
        """
        if self.family == "seq2seq":
            return self.targets(answers)
        joined = self._joiner.added(placed, answers)
        apart = self.targets([answer for answer, ids in zip(answers, joined, strict=True) if ids is None])
        alone, eos = iter(apart), self.tokenizer.eos_token_id
        return [next(alone) if ids is None else [*ids, eos] for ids in joined]

    def choices(self, placed: list[Placed], choices: list[str] | None) -> list[list[list[int]]]:
        """Return the label ids of each of a task's choices in their places [B, C]; B empty lists without choices."""
        columns = [self.answers(placed, [choice] * len(placed)) for choice in choices or []]
        return [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in placed]

    def targets(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of B target texts on their own, closed by the end of sequence."""
        if not texts:
            return []
        if self.family == "seq2seq":
            encoded = self.tokenizer(text_target=texts, verbose=False)["input_ids"]
            return [list(row) for row in encoded]
        return [[*row, self.tokenizer.eos_token_id] for row in self.plain([f" {text}" for text in texts])]

    def plain(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of B texts as they stand, without special tokens around them."""
        return self._ids(texts, add_special_tokens=False)

    def _with_slots(self, text: str) -> list[int]:
        before, after = self._around
        ids = with_slots(text, lambda piece: self.plain([piece])[0])
        if self.family == "seq2seq":
            return [*before, *ids, *after]
        return [*before, *ids] if self.with_bos else ids

    def _ids(self, texts: list[str], **options: Any) -> list[list[int]]:
        encoded = self.tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]
        return [list(row) for row in encoded]

    def fit(self, card: TaskCard, example: Example) -> tuple[Example, Placed]:
        """Cut the one column that may be cut until the input fits.

        Args:
            card: The task; its `truncate` names the column, else the row's longest is cut.
            example: The row.

        Returns:
            The example as it fits, the same object where it does already, and its input.

        Raises:
            MPTError: If the input has no tokens, or if the rest of the row leaves no room for any of that column.
        """
        where = f"Task '{card.name}', row {example.row_id}"
        placed = self._place_row(card, example)
        if not placed.ids:
            raise MPTError(f"{where}: got an input without tokens, expected some; change the data.")
        if len(placed.ids) <= self.max_input_length:
            return example, placed
        column = card.truncate or max(card.columns, key=lambda name: len(example.values[name]))
        whole = example.values[column]
        ends = self._token_ends(whole)
        kept, fitted = len(ends), example
        # Tokens merge at the borders, so the whole input is measured after each cut; one cut is mostly enough.
        while len(placed.ids) > self.max_input_length and kept:
            kept = max(0, kept - (len(placed.ids) - self.max_input_length))
            part = whole[: ends[kept - 1]].rstrip() if kept else ""
            fitted = replace(example, values={**example.values, column: part})
            placed = self._place_row(card, fitted)
        if not kept:
            raise MPTError(
                f"{where}: got {len(placed.ids)} tokens without column '{column}', the one that may be cut, expected "
                f"fewer than max_input_length={self.max_input_length}; raise `max_input_length`, or change `truncate` "
                "or `input` of the card."
            )
        return fitted, placed

    def fit_all(self, card: TaskCard, examples: list[Example]) -> list[tuple[Example, Placed]]:
        """Do what `fit` does for B examples, in few calls of the tokenizer."""
        placed = self.place([self.text(card, example.values) for example in examples], card.choices)
        return [
            (example, whole) if 0 < len(whole.ids) <= self.max_input_length else self.fit(card, example)
            for example, whole in zip(examples, placed, strict=True)
        ]

    def _place_row(self, card: TaskCard, example: Example) -> Placed:
        return self.place([self.text(card, example.values)], card.choices)[0]

    def _token_ends(self, text: str) -> list[int]:
        if not self.tokenizer.is_fast:
            return list(range(1, len(text) + 1))
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [end for _, end in offsets["offset_mapping"]]

    def encode(self, card: TaskCard, rows: Iterator[Example], split: Split) -> Iterator[dict[str, Any]]:
        """Encode examples, a thousand at a time.

        Args:
            card: The task.
            rows: The examples.
            split: Our name of the split; only training targets have a limit.

        Yields:
            One mapping per row, as it is cached.

        Raises:
            MPTError: If an input has no tokens or cannot be cut to fit, or a training target is too long.
        """
        while chunk := list(islice(rows, _CHUNK)):
            fitted = self.fit_all(card, chunk)
            placed = [place for _, place in fitted]
            targets = self.answers(placed, [example.target for example in chunk])
            choices = self.choices(placed, None if self.family == "seq2seq" else card.choices)
            for whole, (example, place), target, own in zip(chunk, fitted, targets, choices, strict=True):
                if split == "train" and card.max_target_length and len(target) > card.max_target_length:
                    raise MPTError(
                        f"Task '{card.name}', row {example.row_id}: got a target of {len(target)} tokens, expected at "
                        f"most {card.max_target_length}; raise `max_target_length` of the card or drop the row."
                    )
                yield {
                    "input_ids": place.ids,
                    "labels": target,
                    "choices": own,
                    "text": self.text(card, example.values),
                    "references": example.references,
                    "group": example.group,
                    "row_id": example.row_id,
                    "cut": example is not whole,
                }


def render(card: TaskCard, values: dict[str, str]) -> str:
    """Fill the card's template.

    Args:
        card: The task.
        values: Text of each column.

    Returns:
        The text.
    """
    return "".join(literal + (values[column] if column else "") for literal, column in card.parts)
