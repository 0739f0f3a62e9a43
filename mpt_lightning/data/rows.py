"""Which rows a split has: the card's split rule, few-shot draws, caps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets.arrow_dataset import Dataset

from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.examples import read_examples
from mpt_lightning.data.source import load_raw, preprocess
from mpt_lightning.errors import MPTError

Split = Literal["train", "validation", "test"]
ShotsPer = Literal["class", "task", "balanced"]
# Seed of the cuts that make a validation or test split; part of the task's definition, so not an option.
SPLIT_SEED = 42
HELD_OUT_ROWS = 1000


@dataclass(frozen=True)
class Draw:
    """Which rows of a split are used; see `PromptDataModule` for `k_shot` and `shots_per`.

    A larger draw with the same seed contains the smaller one.

    Args:
        split: How the rows are read: as training rows, or as evaluation rows, which have all their references.
        k_shot: Number of training rows. If `split` is an evaluation split, they replace its rows.
        beside: A draw of training rows that is made before this one. Its rows and those of its own `beside` are
            excluded, and so are rows of the same groups and rows made of the same raw rows.
        options: Names of the user's options behind `k_shot` and `shots_per`, for error messages.
    """

    split: Split = "train"
    k_shot: int | None = None
    shots_per: ShotsPer = "class"
    max_rows: int | None = None
    seed: int = 42
    beside: Draw | None = None
    options: tuple[str, str] = ("k_shot", "shots_per")

    @property
    def source(self) -> Split:
        """The split that contains the rows."""
        return self.split if self.k_shot is None else "train"

    @property
    def earlier(self) -> list[Draw]:
        """The draws whose rows are excluded, in the order in which they are drawn."""
        return [] if self.beside is None else [*self.beside.earlier, self.beside]


@dataclass(frozen=True)
class _Labelled:
    """The rows of a table that have a label and text: their positions in it, and what draws depend on [N]."""

    table: Dataset
    positions: np.ndarray
    raw_rows: np.ndarray
    groups: np.ndarray
    classes: np.ndarray


def source_rows(card: TaskCard, split: Split, data_root: str | None, cache_dir: str | None) -> Dataset:
    """Return the raw rows that a split is drawn from, as `load_raw` reads them.

    With `split_rule: held_out`, validation is min(1,000, a tenth) of the training rows, at least one;
    rows of one group stay together.
    """
    hub = dict(card.splits)
    if card.split_rule == "halved":
        hub["test"] = hub["validation"]
    elif card.split_rule == "held_out":
        hub |= {"validation": hub["train"], "test": hub.get("validation") or hub["test"]}
    if split not in hub:
        raise MPTError(
            f"Task '{card.name}': got no '{split}' split (its `splits` are {', '.join(hub)}), expected one; add it "
            "to `splits`, or set `split_rule: halved` or `held_out`."
        )
    raw = load_raw(card, hub[split], data_root, cache_dir)
    if card.split_rule == "held_out" and split != "test":
        groups = np.array(raw[:][card.group], dtype=str) if card.group in raw.column_names else None
        held_out, rest = _cut(np.arange(len(raw)), groups, max(1, min(HELD_OUT_ROWS, len(raw) // 10)), SPLIT_SEED)
        raw = raw.select(rest if split == "train" else held_out)
    return raw


def select_rows(card: TaskCard, raw: Dataset, draw: Draw) -> Dataset:
    """Return the drawn rows of those of `source_rows`, in their order; labels and texts of all rows are checked."""
    tables: dict[Split, _Labelled] = {}
    taken: set[int | str] = set()
    for part in [*draw.earlier, draw]:
        split = part.split if card.preprocess else draw.split
        if split not in tables:
            tables[split] = _read_labelled(card, raw, split, draw.source)
        rows = tables[split]
        numbers = _draw_rows(card, rows, part, taken)
        taken.update(rows.raw_rows[numbers], filter(None, rows.groups[numbers]))
    return rows.table.select(rows.positions[numbers].astype(int))


def _read_labelled(card: TaskCard, raw: Dataset, split: Split, source: Split) -> _Labelled:
    table = preprocess(card, raw, split)
    examples = enumerate(read_examples(card, table))
    found = [(place, row.row_id, row.group, row.target) for place, row in examples if row is not None]
    if not found:
        raise MPTError(
            f"Task '{card.name}': got no labelled {source} row with text out of {len(table)}, expected at least one; "
            "change the data, or `unlabelled` and `empty_text` of the card."
        )
    return _Labelled(table, *(np.array(column, dtype=object) for column in zip(*found, strict=True)))


def _draw_rows(card: TaskCard, rows: _Labelled, draw: Draw, taken: set[int | str]) -> np.ndarray:
    """Return the numbers of the drawn rows, sorted; `taken` are the raw rows and groups of earlier draws."""
    numbers = np.arange(len(rows.classes))
    if card.split_rule == "halved" and draw.source != "train":
        halves = _cut(numbers, rows.groups, len(numbers) // 2, SPLIT_SEED)
        numbers = halves[0 if draw.split == "validation" else 1]
        if len(numbers) == 0:
            raise MPTError(
                f"Task '{card.name}': got {len(rows.classes)} validation rows, which leave the {draw.split} half "
                "empty, expected two or more rows (or groups); change the data or `split_rule`."
            )
    if taken:
        free = [taken.isdisjoint(keys) for keys in zip(rows.raw_rows, rows.groups, strict=True)]
        numbers = np.flatnonzero(free)
    if draw.k_shot is not None:
        numbers = _draw_shots(card, numbers, rows.classes, draw)
    elif len(numbers) == 0:
        options = {earlier.options[0]: earlier.k_shot for earlier in draw.earlier}
        raise MPTError(
            f"Task '{card.name}': got {' and '.join(f'{name}={k}' for name, k in options.items())}, after which none "
            f"of the {len(rows.classes)} training rows is left, expected at least one; lower "
            f"{' or '.join(f'`{name}`' for name in options)}."
        )
    if draw.max_rows is not None and draw.max_rows < len(numbers):
        numbers, _ = _cut(numbers, rows.groups if draw.split != "train" else None, draw.max_rows, draw.seed)
    return numbers


def _cut(positions: np.ndarray, groups: np.ndarray | None, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut positions [N] at random into `size` of them (or less, so that groups stay whole) and the rest, sorted."""
    order = np.random.default_rng(seed).permutation(positions)
    if groups is None or not any(groups[order]):
        return np.sort(order[:size]), np.sort(order[size:])
    members: dict[Any, list[int]] = {}
    for position in order:
        members.setdefault(groups[position] or int(position), []).append(int(position))
    first: list[int] = []
    for group in members.values():
        if len(first) + len(group) <= size:
            first += group
    return np.array(sorted(first), dtype=int), np.setdiff1d(positions, first)


def _draw_shots(card: TaskCard, positions: np.ndarray, classes: np.ndarray, draw: Draw) -> np.ndarray:
    order = np.random.default_rng(draw.seed).permutation(positions)
    per_class = draw.shots_per != "task" and card.choices is not None
    shots, (option, per) = int(draw.k_shot or 0), draw.options
    pools = {word: order[classes[order] == word] for word in card.choices or []} if per_class else {"": order}
    drawn = []
    for place, (word, pool) in enumerate(pools.items()):
        # k rows over C classes: the first classes get one more if k is not a multiple of C.
        wanted = shots if draw.shots_per != "balanced" else (shots + len(pools) - 1 - place) // len(pools)
        if len(pool) < wanted:
            what = f"class '{word}'" if per_class else "the task"
            others = " and ".join(earlier.options[0] for earlier in draw.earlier)
            left = f"{len(pool)}" + (f" beside the rows of {others}" if others else "")
            raise MPTError(
                f"Task '{card.name}': got {option}={shots}, which needs {wanted} training rows, but {what} has only "
                f"{left}; lower `{option}`" + (f" or set `{per}: task`." if per_class else ".")
            )
        drawn.append(pool[:wanted])
    return np.sort(np.concatenate(drawn))
