"""Raw rows of a task: from the Hub, or from local files laid out like the Hub."""

from __future__ import annotations

import codecs
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from datasets.arrow_dataset import Dataset
from datasets.fingerprint import Hasher
from datasets.load import load_dataset

from mpt_lightning.data.card import TaskCard
from mpt_lightning.errors import MPTError
from mpt_lightning.io import one_line
from mpt_lightning.resources import embedded_data

# Column with the row's number in the Hub's split, for error messages and predictions.
ROW = "__row__"
_UNNAMED = "__index_level_0__"
# The branch with the Hub's own Parquet conversion of a data set that is a loading script.
CONVERTED = "refs/convert/parquet"
# Not `load_dataset`, which reports even the reading of a local file to the Hub and waits if there is no network.
_READERS: dict[str, Callable[..., Dataset]] = {
    ".parquet": Dataset.from_parquet,
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
    ".csv": Dataset.from_csv,
}

Preprocess = Callable[[dict[str, Any], str], list[dict[str, Any]]]


def load_raw(card: TaskCard, hub_split: str, data_root: str | None = None, cache_dir: str | None = None) -> Dataset:
    """Load one split of the Hub as it is stored, with the rows' numbers in column `__row__`.

    See `PromptDataModule` for `data_root` and `cache_dir`.
    """
    root = embedded_data(card.path) or data_root or os.environ.get("MPT_DATA_ROOT")
    where = f"'{card.path}'" + (f" ({card.subset})" if card.subset else "") + f", split '{hub_split}'"
    change = "change `path`, `subset`, `revision` or `splits` of the card, or set `data_root`"
    file = _local_file(card, hub_split, Path(root)) if root else None
    if file is not None:
        where, change = f"'{file}'", "change the file or `data_root`, or remove a damaged copy of it in `cache_dir`"
    try:
        raw = _from_hub(card, hub_split, cache_dir) if file is None else _read(card, file, cache_dir)
        raw.data.validate(full=True)  # the readers do not check that texts are UTF-8
    except Exception as error:
        # `datasets` reports an empty or broken file in as many ways as it has formats and readers.
        reason = error.__cause__ or error
        raise MPTError(
            f"Task '{card.name}': got {where}, which is empty or cannot be read ({type(reason).__name__}: "
            f"{one_line(reason)}), expected a data set with at least one row; {change}."
        ) from error
    if len(raw) == 0:
        raise MPTError(f"Task '{card.name}': got an empty data set {where}, expected at least one row; {change}.")
    if taken := {ROW, _UNNAMED} & set(raw.column_names):
        # A CSV file gets a column without a name if its rows have more fields than the header.
        raise MPTError(
            f"Task '{card.name}': got the column '{taken.pop()}' in {where}, expected as many columns as its first "
            f"line names, and none of that name; {change}."
        )
    return raw.add_column(ROW, np.arange(len(raw)), new_fingerprint=Hasher.hash([raw._fingerprint, ROW]))


def _read(card: TaskCard, file: Path, cache_dir: str | None) -> Dataset:
    options: dict[str, Any] = {}
    if file.suffix == ".csv":
        # Texts as they are written: otherwise "NA" becomes nothing and "007" becomes 7.
        options = {"converters": dict.fromkeys(card.columns, str), "keep_default_na": False, "na_values": [""]}
    elif file.suffix != ".parquet":
        with file.open("rb") as stream:
            start = stream.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
            stream.seek(0)
            nulls = file.suffix == ".jsonl" and any(line.strip() == b"null" for line in stream)
        # Arrow's reader crashes if the first row of a block is `null`, and reads any other as an empty row.
        if nulls:
            raise MPTError("a line is `null`, expected a JSON object")
        if start and not re.match(rb"\{|\[\s*\{" if file.suffix == ".json" else rb"\{", start):
            raise MPTError(f"it begins with {start[:20]!r}, expected a JSON object")
    return _READERS[file.suffix](str(file), cache_dir=cache_dir, **options)


def _from_hub(card: TaskCard, split: str, cache_dir: str | None) -> Dataset:
    if card.revision == CONVERTED:
        # On this branch a subset is a folder, which `datasets` does not list as a configuration.
        files = f"{card.subset or 'default'}/{split}/*.parquet"
        return load_dataset(card.path, data_files={split: files}, split=split, revision=CONVERTED, cache_dir=cache_dir)
    return load_dataset(card.path, card.subset, split=split, revision=card.revision, cache_dir=cache_dir)


def _local_file(card: TaskCard, hub_split: str, root: Path) -> Path:
    folder = root / card.path.rstrip("/").rsplit("/", 1)[-1] / (card.subset or "")
    for suffix in _READERS:
        if (file := folder / f"{hub_split}{suffix}").is_file():
            return file
    raise MPTError(
        f"Task '{card.name}': got no file for split '{hub_split}' in '{folder}', expected "
        f"{hub_split}{{{','.join(_READERS)}}}; change `data_root` or the card's `splits`."
    )


def preprocess(card: TaskCard, raw: Dataset, split: str) -> Dataset:
    """Return what the card's preprocess function, if any, makes of every row, with the raw row's `__row__`."""
    if card.preprocess is None:
        return raw
    function = import_preprocess(card)

    def apply(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        items: list[dict[str, Any]] = []
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            number = row.pop(ROW)
            try:
                made = function(row, split)
            except Exception as error:
                raise MPTError(
                    f"Task '{card.name}', row {number}: {card.preprocess} cannot use it ({type(error).__name__}: "
                    f"{one_line(error)}); change the data, or `path`, `subset` or `preprocess` of the card."
                ) from error
            if not isinstance(made, list) or any(not isinstance(item, Mapping) for item in made):
                raise MPTError(
                    f"Task '{card.name}', row {number}: got {type(made).__name__} from {card.preprocess}, "
                    "expected a list of mappings; change the function."
                )
            items += [{**item, ROW: number} for item in made]
        columns = dict.fromkeys(column for item in items for column in item)
        return {column: [item.get(column) for item in items] for column in columns} or {ROW: []}

    fingerprint = Hasher.hash([raw._fingerprint, card.preprocess, preprocess_source(card), split])
    made = raw.map(apply, batched=True, remove_columns=raw.column_names, new_fingerprint=fingerprint)
    if len(made) == 0:
        raise MPTError(
            f"Task '{card.name}': got no rows from {card.preprocess} on {len(raw)} {split} rows, expected at least "
            "one; change the function or the data."
        )
    return made


def import_preprocess(card: TaskCard) -> Preprocess:
    """Import the function that `card.preprocess` names.

    A card may come from somebody else, so the function must be one that was written for cards: outside of Python's
    standard library, defined in the module that the path names (not imported there), with the parameters `row` and
    `split`.
    """
    module, _, name = str(card.preprocess).rpartition(".")
    where = f"Task '{card.name}': got preprocess={card.preprocess!r}"
    expected = f"expected a function with the parameters `row` and `split` that is defined in the module {module}"
    if module.split(".")[0] in sys.stdlib_module_names:
        raise MPTError(f"{where}, expected a function outside of Python's standard library; change `preprocess`.")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise MPTError(f"{where}, which cannot be imported ({error}), {expected}; change `preprocess`.") from error
    own = inspect.isfunction(function) and (function.__module__, function.__qualname__) == (module, name)
    if not own or list(inspect.signature(function).parameters) != ["row", "split"]:
        raise MPTError(f"{where}, {expected}; change `preprocess`.")
    return function


def preprocess_source(card: TaskCard) -> str:
    """Return the source code of the module of the card's preprocess function, or ""; it is part of cache keys."""
    return "" if card.preprocess is None else inspect.getsource(sys.modules[import_preprocess(card).__module__])
