"""A task's examples as token ids: the filled template, cut to fit, and its answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from mpt_lightning.arguments import PositiveInt, check_arguments
from mpt_lightning.backbones.base import Family
from mpt_lightning.backbones.load import family_of
from mpt_lightning.backbones.pretrained import load_config, load_tokenizer
from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.examples import Example
from mpt_lightning.data.formats import FORMATS, EncodedInput, MaskedFormat
from mpt_lightning.data.rows import Split
from mpt_lightning.data.template import SLOT, render
from mpt_lightning.errors import MPTError

_CHUNK = 1000


@dataclass
class Encoder:
    """How a backbone reads a task's examples; `format` is how its family writes inputs and answers.

    Args:
        answer_prefix: Words at the end of every input, joined with one space unless there is whitespace.
        with_bos: Whether the inputs of a decoder-only model begin with BOS; False if they follow a context, which
            begins with it.
        classifies: Whether a classifier on a masked model's first token answers, so that inputs have no mask.
    """

    tokenizer: PreTrainedTokenizerBase
    family: Family
    max_input_length: PositiveInt
    answer_prefix: str = ""
    with_bos: bool = True
    classifies: bool = False

    def __post_init__(self) -> None:
        check_arguments(Encoder, vars(self))  # they may come from a checkpoint
        self.format = FORMATS[self.family](self.tokenizer, self.with_bos)
        if isinstance(self.format, MaskedFormat):
            self.format.classifies = self.classifies

    @classmethod
    def from_backbone(cls, backbone: str, max_input_length: int, **options: Any) -> Encoder:
        """Load the tokenizer and family of a backbone, by Hub id or local folder, and return the encoder."""
        family = family_of(load_config(backbone))
        return cls(load_tokenizer(backbone), family, max_input_length, **options)

    @property
    def pad_id(self) -> int:
        """Id for padding; the end of sequence if the tokenizer has none (the attention mask covers it)."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    @cached_property
    def identity(self) -> str:
        """Hash of everything that decides which ids a text becomes."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        state = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        kind = (self.tokenizer.eos_token_id, self.family, self.max_input_length, self.classifies)
        return str(Hasher.hash([type(self.tokenizer).__name__, state, kind, self.answer_prefix, self.with_bos]))

    def text(self, card: TaskCard, values: dict[str, str]) -> str:
        """Return the input text: the card's template filled with the columns' texts, then the answer prefix."""
        text = render(card, values)
        joined = not self.answer_prefix or self.answer_prefix[0].isspace() or not text or text[-1].isspace()
        return f"{text}{self.answer_prefix}" if joined else f"{text} {self.answer_prefix}"

    def fit(self, card: TaskCard, examples: list[Example]) -> list[tuple[Example, EncodedInput]]:
        """Return B examples, each with one column cut until its input fits, and their inputs.

        The column is the card's `truncate`, or else the row's longest; an example that fits is the same object.
        """
        self._check_places(card, examples)
        return [
            (example, encoded) if 0 < len(encoded.ids) <= self.max_input_length else self._cut(card, example, encoded)
            for example, encoded in zip(examples, self._encode_inputs(card, examples), strict=True)
        ]

    def _check_places(self, card: TaskCard, examples: list[Example]) -> None:
        """Raise if a row's own texts have places, unless they are the whole input, or the template has none."""
        answer = self.format.reserved if any(word in card.input for word in self.format.reserved) else ()
        prompt = () if card.input == f"{{{card.columns[0]}}}" else (SLOT,)
        places = (*answer, *prompt)
        for example in examples if places else ():
            for column, text in example.values.items():
                if found := [place for place in places if place in text]:
                    raise MPTError(
                        f"Task '{card.name}', row {example.row_id}: got {found[0]} in column '{column}', expected it "
                        "in the card's template only, where it is the place of the answer or of the prompt; change or "
                        "drop the row."
                    )

    def _encode_inputs(self, card: TaskCard, examples: list[Example]) -> list[EncodedInput]:
        return self.format.encode_inputs(
            [self.text(card, example.values) for example in examples], card.words(self.family)
        )

    def _cut(self, card: TaskCard, example: Example, encoded: EncodedInput) -> tuple[Example, EncodedInput]:
        where = f"Task '{card.name}', row {example.row_id}"
        if not encoded.ids:
            raise MPTError(f"{where}: got an input without tokens, expected some; change the data.")
        column = card.truncate or max(card.columns, key=lambda name: len(example.values[name]))
        whole = example.values[column]
        if any(word in whole for word in self.format.reserved):
            raise MPTError(
                f"{where}: got {len(encoded.ids)} tokens and the place of the answer in column '{column}', which would "
                f"be cut, expected at most max_input_length={self.max_input_length}; raise `max_input_length`, or put "
                "the place into `input` or `masked` of the card."
            )
        ends = list(range(1, len(whole) + 1))
        if self.tokenizer.is_fast:
            offsets = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ends = [end for _, end in offsets["offset_mapping"]]
        kept, fitted = len(ends), example
        # Tokens merge at the borders, so the whole input is measured after each cut; one cut is mostly enough.
        while len(encoded.ids) > self.max_input_length and kept:
            kept = max(0, kept - (len(encoded.ids) - self.max_input_length))
            part = whole[: ends[kept - 1]].rstrip() if kept else ""
            fitted = replace(example, values={**example.values, column: part})
            (encoded,) = self._encode_inputs(card, [fitted])
        if not kept:
            raise MPTError(
                f"{where}: got {len(encoded.ids)} tokens without column '{column}', the one that may be cut, expected "
                f"fewer than max_input_length={self.max_input_length}; raise `max_input_length`, or change `truncate` "
                "or `input` of the card."
            )
        return fitted, encoded

    def encode(self, card: TaskCard, rows: Iterator[Example], split: Split) -> Iterator[dict[str, Any]]:
        """Yield one mapping per example, as it is cached; only training targets have a length limit."""
        while chunk := list(islice(rows, _CHUNK)):
            fitted = self.fit(card, chunk)
            inputs = [encoded for _, encoded in fitted]
            words = card.words(self.family)
            shares = [card.shares(example.references[0], words) for example in chunk]
            answers = [
                words[share.index(max(share))] if words else example.target
                for example, share in zip(chunk, shares, strict=True)
            ]
            targets = self.format.answers(inputs, answers)
            choices = self.format.choices(inputs, words if self.format.continues else None)
            encoded_rows = zip(chunk, fitted, targets, choices, shares, strict=True)
            for whole, (example, encoded), target, own, share in encoded_rows:
                if split == "train" and card.max_target_length and len(target) > card.max_target_length:
                    raise MPTError(
                        f"Task '{card.name}', row {example.row_id}: got a target of {len(target)} tokens, expected at "
                        f"most {card.max_target_length}; raise `max_target_length` of the card or drop the row."
                    )
                yield {
                    "input_ids": encoded.ids,
                    "labels": target,
                    "choices": own,
                    "shares": share,
                    "text": self.text(card, example.values),
                    "references": example.references,
                    "group": example.group,
                    "row_id": example.row_id,
                    "cut": example is not whole,
                }
