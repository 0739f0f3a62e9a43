"""Rows of a task on disk: drawn and tokenised once, then read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from datasets.arrow_dataset import Dataset
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError
from datasets.features import Features, List, Value
from datasets.fingerprint import Hasher

from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.examples import Example, read_examples
from mpt_lightning.data.rows import Draw, select_rows, source_rows
from mpt_lightning.data.source import preprocess_source
from mpt_lightning.data.tokenize import Encoder
from mpt_lightning.errors import MPTError
from mpt_lightning.io import one_line

# Part of the cache key: raise it when the same input would give other rows.
_FORMAT = 3
ToRows = Callable[[Iterator[Example]], Iterator[dict[str, Any]]]
_ENCODED = Features(
    input_ids=List(Value("int32")),
    labels=List(Value("int32")),
    choices=List(List(Value("int32"))),
    shares=List(Value("float32")),
    text=Value("string"),
    references=List(Value("string")),
    group=Value("string"),
    row_id=Value("int64"),
    cut=Value("bool"),
)


@dataclass(frozen=True)
class RowCache:
    """The drawn rows of tasks' splits, made once and then read from files; see `PromptDataModule` for the arguments."""

    data_root: str | None = None
    cache_dir: str | None = None

    def encoded(self, card: TaskCard, draw: Draw, encoder: Encoder) -> Dataset:
        """Return the encoded rows of a draw; `choices` is empty if the choices' ids do not depend on the input."""
        to_rows = partial(encoder.encode, card, split=draw.split)
        return self._read(card, draw, to_rows, _ENCODED, encoder.identity)

    def examples(self, card: TaskCard, draw: Draw) -> list[Example]:
        """Return the rows of a draw as texts, in the order of `encoded`; they all go into memory."""
        features = Features(
            row_id=Value("int64"),
            values={column: Value("string") for column in card.columns},
            target=Value("string"),
            references=List(Value("string")),
            group=Value("string"),
        )
        table = self._read(card, draw, lambda drawn: map(asdict, drawn), features, "examples")
        return [Example(**row) for row in table.to_list()]

    def _read(self, card: TaskCard, draw: Draw, to_rows: ToRows, features: Features, kind: str) -> Dataset:
        """Return a table of what `to_rows` makes of the drawn rows; `kind` is its part of the cache key."""
        raw = source_rows(card, draw.source, self.data_root, self.cache_dir)
        key = Hasher.hash([_FORMAT, raw._fingerprint, asdict(card), preprocess_source(card), kind, asdict(draw)])

        def generate() -> Iterator[dict[str, Any]]:
            return to_rows(filter(None, read_examples(card, select_rows(card, raw, draw))))

        try:
            cache: Any = self.cache_dir  # the annotation of `from_generator` lacks None, its default
            return Dataset.from_generator(generate, features=features, cache_dir=cache, fingerprint=key)
        except DatasetGenerationError as error:
            # `datasets` wraps what the generator raised; the user needs that message, not the wrapper's.
            if isinstance(error.__cause__, ValueError | OSError):
                raise error.__cause__ from None
            raise
        except Exception as error:  # Arrow's errors, if a file of the cache was changed after it was written
            raise MPTError(
                f"Task '{card.name}': got cached {draw.split} rows that cannot be read ({type(error).__name__}: "
                f"{one_line(error)}), expected them as they were written; remove the folder `cache_dir` "
                f"({cache or HF_DATASETS_CACHE}), and they are written again."
            ) from error
