"""From texts to token ids: the tokenizer's side of a task, cached on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from datasets.arrow_dataset import Dataset
from datasets.exceptions import DatasetGenerationError
from datasets.features import Features, List, Value
from datasets.fingerprint import Hasher
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mpt_lightning.backbones.load import load_config
from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.examples import Example
from mpt_lightning.data.rows import Draw, Split, examples, select_rows, source_rows
from mpt_lightning.data.source import preprocess_source
from mpt_lightning.demo import backbone_path

#: Part of the cache key: raise it when the same input would give other ids.
_FORMAT = 1
_CHUNK = 1000
_FEATURES = Features(
    input_ids=List(Value("int32")),
    labels=List(Value("int32")),
    text=Value("string"),
    references=List(Value("string")),
    group=Value("string"),
    row_id=Value("int64"),
    cut=Value("bool"),
)


@dataclass
class Encoder:
    """How a backbone reads and writes text.

    Args:
        tokenizer: Its tokenizer.
        is_encoder_decoder: Whether it has an encoder; if so, the tokenizer closes inputs and targets as it was
            pretrained. Otherwise the input stays open and the target is " " + text + end of sequence, tokenised on
            its own because some tokenizers merge across the border.
        max_input_length: Most tokens of an input.
    """

    tokenizer: PreTrainedTokenizerBase
    is_encoder_decoder: bool
    max_input_length: int

    def __post_init__(self) -> None:
        """Check that a target can be closed."""
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"Tokenizer '{self.tokenizer.name_or_path}': got no end-of-sequence token, expected one to close "
                "targets with; change `backbone` or set its `eos_token`."
            )

    @classmethod
    def from_backbone(cls, backbone: str, max_input_length: int) -> Encoder:
        """Load the tokenizer and kind of a backbone.

        Args:
            backbone: Hub id or local folder.
            max_input_length: Most tokens of an input.

        Returns:
            The encoder.
        """
        kind = load_config(backbone).is_encoder_decoder
        return cls(AutoTokenizer.from_pretrained(backbone_path(backbone)), bool(kind), max_input_length)

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
        special = (self.tokenizer.eos_token_id, self.is_encoder_decoder, self.max_input_length)
        return str(Hasher.hash([type(self.tokenizer).__name__, state, special]))

    def inputs(self, texts: list[str]) -> list[list[int]]:
        """Token ids of input texts, of any length.

        Args:
            texts: B texts.

        Returns:
            B lists of ids.
        """
        ids = self._ids(texts)
        eos = self.tokenizer.eos_token_id
        return ids if self.is_encoder_decoder else [row[:-1] if row[-1:] == [eos] else row for row in ids]

    def targets(self, texts: list[str]) -> list[list[int]]:
        """Token ids of target texts, closed by the end of sequence.

        Args:
            texts: B texts.

        Returns:
            B lists of ids.
        """
        if self.is_encoder_decoder:
            encoded = self.tokenizer(text_target=texts, verbose=False)["input_ids"]
            return [list(row) for row in encoded]
        opened = self._ids([f" {text}" for text in texts], add_special_tokens=False)
        return [[*row, self.tokenizer.eos_token_id] for row in opened]

    def _ids(self, texts: list[str], **options: Any) -> list[list[int]]:
        encoded = self.tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]
        return [list(row) for row in encoded]

    def fit(self, card: TaskCard, example: Example) -> tuple[str, list[int]]:
        """Cut the one column that may be cut until the input fits.

        Args:
            card: The task; its `truncate` names the column, else the row's longest is cut.
            example: The row.

        Returns:
            The text that fits and its ids.

        Raises:
            ValueError: If the rest of the row leaves no room for any of that column.
        """
        column = card.truncate or max(card.columns, key=lambda name: len(example.values[name]))
        ends = self._token_ends(example.values[column])
        kept = len(ends)

        def attempt() -> tuple[str, list[int]]:
            part = example.values[column][: ends[kept - 1]].rstrip() if kept else ""
            text = render(card, {**example.values, column: part})
            return text, self.inputs([text])[0]

        # Tokens merge at the borders, so the whole input is measured after each cut; one cut is mostly enough.
        text, ids = attempt()
        while len(ids) > self.max_input_length and kept:
            kept = max(0, kept - (len(ids) - self.max_input_length))
            text, ids = attempt()
        if not kept:
            raise ValueError(
                f"Task '{card.name}', row {example.row_id}: got {len(ids)} tokens without column '{column}', the one "
                f"that may be cut, expected fewer than max_input_length={self.max_input_length}; raise "
                "`max_input_length`, or change `truncate` or `input` of the card."
            )
        return text, ids

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
            ValueError: If an input has no tokens or cannot be cut to fit, or a training target is too long.
        """
        while chunk := list(islice(rows, _CHUNK)):
            texts = [render(card, example.values) for example in chunk]
            inputs = self.inputs(texts)
            targets = self.targets([example.target for example in chunk])
            for example, text, ids, target in zip(chunk, texts, inputs, targets, strict=True):
                where = f"Task '{card.name}', row {example.row_id}"
                too_long = len(ids) > self.max_input_length
                fitted = self.fit(card, example) if too_long else (text, ids)
                if not ids:
                    raise ValueError(f"{where}: got an input without tokens, expected some; change the data.")
                if split == "train" and card.max_target_length and len(target) > card.max_target_length:
                    raise ValueError(
                        f"{where}: got a target of {len(target)} tokens, expected at most "
                        f"{card.max_target_length}; raise `max_target_length` of the card or drop the row."
                    )
                yield {
                    "input_ids": fitted[1],
                    "labels": target,
                    "text": fitted[0],
                    "references": example.references,
                    "group": example.group,
                    "row_id": example.row_id,
                    "cut": too_long,
                }


def render(card: TaskCard, values: dict[str, str]) -> str:
    """Fill the card's template.

    Args:
        card: The task.
        values: Text of each column.

    Returns:
        The input text.
    """
    return "".join(literal + (values[column] if column else "") for literal, column in card.parts)


def encoded_split(
    card: TaskCard, split: Split, encoder: Encoder, draw: Draw, data_root: str | None, cache_dir: str | None
) -> Dataset:
    """The encoded rows of a split, made once and then read from the cache.

    Args:
        card: The task.
        split: Our name of the split.
        encoder: How the backbone reads text.
        draw: Which rows to use.
        data_root: Folder that stands in for the Hub, or None.
        cache_dir: Folder for cached data, or None for the `datasets` default.

    Returns:
        Rows with `input_ids`, `labels`, `text`, `references`, `group`, `row_id` and `cut`.

    Raises:
        ValueError: If the data or the card does not fit; nothing is left in the cache then.
        FileNotFoundError: If `data_root` has no file for the split.
    """
    raw = source_rows(card, split, data_root, cache_dir)
    key = Hasher.hash(
        [_FORMAT, raw._fingerprint, asdict(card), preprocess_source(card), split, encoder.identity, asdict(draw)]
    )

    def generate() -> Iterator[dict[str, Any]]:
        return encoder.encode(card, examples(card, select_rows(card, raw, split, draw)), split)

    try:
        cache: Any = cache_dir  # its annotation forgets None, its default
        return Dataset.from_generator(generate, features=_FEATURES, cache_dir=cache, fingerprint=key)
    except DatasetGenerationError as error:
        # `datasets` wraps what the generator raised; the user needs that message, not the wrapper's.
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise
