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
    """Which of a split's rows are used; see `PromptDataModule` for `k_shot` and `shots_per`.

    A larger draw with the same seed contains the smaller one.

    Args:
        beside: Another draw, whose rows are removed before this one. Training rows only.
        options: Names of the user's options behind `k_shot` and `shots_per`, for error messages.
    """

    k_shot: int | None = None
    shots_per: ShotsPer = "class"
    max_rows: int | None = None
    seed: int = 42
    beside: Draw | None = None
    options: tuple[str, str] = ("k_shot", "shots_per")


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


def select_rows(card: TaskCard, raw: Dataset, split: Split, draw: Draw) -> Dataset:
    """Return the drawn rows of those of `source_rows`, in their order; labels and texts of all rows are checked."""
    rows = preprocess(card, raw, split)
    examples = enumerate(read_examples(card, rows))
    found = [(number, example.group, example.target) for number, example in examples if example is not None]
    if not found:
        raise MPTError(
            f"Task '{card.name}': got no labelled {split} row with text out of {len(rows)}, expected at least one; "
            "change the data, or `unlabelled` and `empty_text` of the card."
        )
    numbers, groups, classes = (np.array(column, dtype=object) for column in zip(*found, strict=True))
    positions = np.arange(len(found))
    if card.split_rule == "halved" and split != "train":
        halves = _cut(positions, groups, len(positions) // 2, SPLIT_SEED)
        positions = halves[0 if split == "validation" else 1]
        if len(positions) == 0:
            raise MPTError(
                f"Task '{card.name}': got {len(found)} validation rows, which leave the {split} half empty, expected "
                "two or more rows (or groups); change the data or `split_rule`."
            )
    if draw.beside is not None:
        positions = np.setdiff1d(positions, _draw_shots(card, positions, classes, draw.beside))
        if len(positions) == 0:
            raise MPTError(
                f"Task '{card.name}': got {draw.beside.options[0]}={draw.beside.k_shot}, which takes all {len(found)} "
                f"training rows, expected some beside them; lower `{draw.beside.options[0]}`."
            )
    if draw.k_shot is not None:
        positions = _draw_shots(card, positions, classes, draw)
    if draw.max_rows is not None and draw.max_rows < len(positions):
        positions, _ = _cut(positions, groups if split != "train" else None, draw.max_rows, draw.seed)
    return rows.select(numbers[positions].astype(int))


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
            left = f"{len(pool)}" + (" beside the context" if draw.beside else "")
            raise MPTError(
                f"Task '{card.name}': got {option}={shots}, which needs {wanted} training rows, but {what} has only "
                f"{left}; lower `{option}`" + (f" or set `{per}: task`." if per_class else ".")
            )
        drawn.append(pool[:wanted])
    return np.sort(np.concatenate(drawn))
