"""Rows of a task on disk: drawn and tokenised once, then read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from datasets.arrow_dataset import Dataset
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError
from datasets.features import Features, List, Value
from datasets.fingerprint import Hasher

from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.examples import Example
from mpt_lightning.data.rows import Draw, Split, examples, select_rows, source_rows
from mpt_lightning.data.source import preprocess_source
from mpt_lightning.data.tokenize import Encoder
from mpt_lightning.errors import MPTError
from mpt_lightning.io import one_line

#: Part of the cache key: raise it when the same input would give other rows.
_FORMAT = 2
_ENCODED = Features(
    input_ids=List(Value("int32")),
    labels=List(Value("int32")),
    choices=List(List(Value("int32"))),
    text=Value("string"),
    references=List(Value("string")),
    group=Value("string"),
    row_id=Value("int64"),
    cut=Value("bool"),
)


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
        Rows with `input_ids`, `labels`, `choices` (token ids of each of the task's, for decoder-only models, whose
        tokenizers may cut them differently after each text; else empty), `text`, `references`, `group`, `row_id` and
        `cut`.

    Raises:
        MPTError: If the data or the card does not fit; nothing is left in the cache then.
        MPTError: If `data_root` has no file for the split.
    """

    def encode(drawn: Iterator[Example]) -> Iterator[dict[str, Any]]:
        return encoder.encode(card, drawn, split)

    return _cached(card, split, draw, data_root, cache_dir, encode, _ENCODED, encoder.identity)


def drawn_examples(
    card: TaskCard, split: Split, draw: Draw, data_root: str | None, cache_dir: str | None
) -> list[Example]:
    """The rows of a split as texts, in the order of `encoded_split`, drawn once and then read from the cache.

    Args:
        card: The task.
        split: Our name of the split.
        draw: Which rows to use; they all go into memory.
        data_root: Folder that stands in for the Hub, or None.
        cache_dir: Folder for cached data, or None for the `datasets` default.

    Returns:
        The examples.

    Raises:
        MPTError: If the data or the card does not fit; nothing is left in the cache then.
        MPTError: If `data_root` has no file for the split.
    """
    features = Features(
        row_id=Value("int64"),
        values={column: Value("string") for column in card.columns},
        target=Value("string"),
        references=List(Value("string")),
        group=Value("string"),
    )
    table = _cached(card, split, draw, data_root, cache_dir, lambda drawn: map(asdict, drawn), features, "examples")
    return [Example(**row) for row in table.to_list()]


def _cached(
    card: TaskCard,
    split: Split,
    draw: Draw,
    data_root: str | None,
    cache_dir: str | None,
    to_rows: Callable[[Iterator[Example]], Iterator[dict[str, Any]]],
    features: Features,
    kind: str,
) -> Dataset:
    """A table of the drawn rows; `kind` tells apart what `to_rows` may make of the same draw."""
    raw = source_rows(card, split, data_root, cache_dir)
    key = Hasher.hash([_FORMAT, raw._fingerprint, asdict(card), preprocess_source(card), split, kind, asdict(draw)])

    def generate() -> Iterator[dict[str, Any]]:
        return to_rows(examples(card, select_rows(card, raw, split, draw)))

    try:
        cache: Any = cache_dir  # its annotation forgets None, its default
        return Dataset.from_generator(generate, features=features, cache_dir=cache, fingerprint=key)
    except DatasetGenerationError as error:
        # `datasets` wraps what the generator raised; the user needs that message, not the wrapper's.
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        raise
    except Exception as error:  # Arrow's errors, where a file of the cache is not as it was written
        raise MPTError(
            f"Task '{card.name}': got cached {split} rows that cannot be read ({type(error).__name__}: "
            f"{one_line(error)}), expected them as they were written; remove the folder `cache_dir` "
            f"({cache_dir or HF_DATASETS_CACHE}), and they are made anew."
        ) from error
