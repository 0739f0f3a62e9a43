"""From raw rows to labelled texts: labels, split rule, few-shot draws."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets.arrow_dataset import Dataset

from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.source import ROW, load_raw, preprocess

Split = Literal["train", "validation", "test"]
#: Seed of the cuts that make a validation or test split; part of the task's definition, so not an option.
SPLIT_SEED = 42
HELD_OUT_ROWS = 1000


@dataclass(frozen=True)
class Draw:
    """Which of a split's rows are used.

    Args:
        k_shot: Rows per class or per task. Unset: all.
        shots_per: Whether `k_shot` counts per `class` or per `task`; a task without classes counts per task.
        max_rows: Most rows to use. Unset: all.
        seed: Seed of the draw; a larger draw with the same seed contains the smaller one.
    """

    k_shot: int | None = None
    shots_per: Literal["class", "task"] = "class"
    max_rows: int | None = None
    seed: int = 42


@dataclass(frozen=True)
class Example:
    """One row as text.

    Args:
        row_id: Number of the row in the Hub's split.
        values: Text of each column of the template.
        target: Text the model learns to write.
        references: Texts that count as right.
        group: Id of the group of rows that are scored together, or "".
    """

    row_id: int
    values: dict[str, str]
    target: str
    references: list[str]
    group: str


def source_rows(card: TaskCard, split: Split, data_root: str | None, cache_dir: str | None) -> Dataset:
    """The raw rows that a split is made from, before labels are looked at.

    With `split_rule: held_out`, validation is min(1,000, a tenth) of the training rows, at least one.

    Args:
        card: The task.
        split: Our name of the split.
        data_root: See `load_raw`.
        cache_dir: See `load_raw`.

    Returns:
        Rows with a `__row__` column.

    Raises:
        ValueError: If the card has no such split, or if the data cannot be read.
    """
    hub = dict(card.splits)
    if card.split_rule == "halved":
        hub["test"] = hub["validation"]
    elif card.split_rule == "held_out":
        hub |= {"validation": hub["train"], "test": hub.get("validation") or hub["test"]}
    if split not in hub:
        raise ValueError(
            f"Task '{card.name}': got no '{split}' split (its `splits` are {', '.join(hub)}), expected one; add it "
            "to `splits`, or set `split_rule: halved` or `held_out`."
        )
    raw = load_raw(card, hub[split], data_root, cache_dir)
    if card.split_rule == "held_out" and split != "test":
        held_out, rest = cut(np.arange(len(raw)), None, max(1, min(HELD_OUT_ROWS, len(raw) // 10)), SPLIT_SEED)
        raw = raw.select(rest if split == "train" else held_out)
    return raw


def select_rows(card: TaskCard, raw: Dataset, split: Split, draw: Draw) -> Dataset:
    """Check labels and texts, apply the split rule and draw.

    Args:
        card: The task.
        raw: What `source_rows` gave.
        split: Our name of the split.
        draw: Which rows to use.

    Returns:
        The rows of the split, in the order of the source.

    Raises:
        ValueError: If a column is missing, a label or text is unusable, or there are fewer rows than drawn.
    """
    rows = preprocess(card, raw, split)
    check_columns(card, rows)
    keep, groups, classes = [], [], []
    for number, row in enumerate(_iterate(card, rows)):
        example = to_example(card, row)
        if example is not None:
            keep.append(number)
            groups.append(example.group)
            classes.append(example.target)
    if not keep:
        raise ValueError(
            f"Task '{card.name}': got no labelled {split} row with text out of {len(rows)}, expected at least one; "
            "change the data, or `unlabelled` and `empty_text` of the card."
        )
    chosen = np.array(keep)
    group_of, class_of = np.array(groups, dtype=object), np.array(classes, dtype=object)
    positions = np.arange(len(chosen))
    if card.split_rule == "halved" and split != "train":
        halves = cut(positions, group_of, len(positions) // 2, SPLIT_SEED)
        positions = halves[0 if split == "validation" else 1]
        if len(positions) == 0:
            raise ValueError(
                f"Task '{card.name}': got {len(chosen)} validation rows, which leave the {split} half empty, expected "
                "two or more rows (or groups); change the data or `split_rule`."
            )
    if draw.k_shot is not None:
        positions = _draw_shots(card, positions, class_of, draw)
    if draw.max_rows is not None and draw.max_rows < len(positions):
        positions, _ = cut(positions, group_of if split != "train" else None, draw.max_rows, draw.seed)
    return rows.select(chosen[positions])


def cut(positions: np.ndarray, groups: np.ndarray | None, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut positions at random in a part of about `size` and the rest; rows of one group stay together.

    Args:
        positions: Positions [N].
        groups: Group id by position; "" is no group. Unset: no groups.
        size: Rows of the first part; with groups, the most.
        seed: Seed of the shuffle.

    Returns:
        Both parts, sorted.
    """
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
    per_class = draw.shots_per == "class" and card.choices is not None
    wanted = int(draw.k_shot or 0)
    pools = {word: order[classes[order] == word] for word in card.choices or []} if per_class else {"": order}
    for word, pool in pools.items():
        if len(pool) < wanted:
            what = f"class '{word}'" if per_class else "the task"
            raise ValueError(
                f"Task '{card.name}': got k_shot={wanted}, but {what} has only {len(pool)} training rows; lower "
                "`k_shot`" + (" or set `shots_per: task`." if per_class else ".")
            )
    return np.sort(np.concatenate([pool[:wanted] for pool in pools.values()]))


def examples(card: TaskCard, rows: Dataset) -> Iterator[Example]:
    """The rows of a split as texts.

    Args:
        card: The task.
        rows: What `select_rows` gave.

    Yields:
        One example per row.
    """
    for row in _iterate(card, rows):
        if (example := to_example(card, row)) is not None:
            yield example


def _iterate(card: TaskCard, rows: Dataset) -> Iterator[dict[str, Any]]:
    needed = [*card.columns, card.label.split(".")[0], ROW, *([card.group.split(".")[0]] if card.group else [])]
    yield from rows.select_columns(list(dict.fromkeys(needed)))


def check_columns(card: TaskCard, rows: Dataset) -> None:
    """Check that the columns a card names exist.

    Args:
        card: The task.
        rows: Rows of any split.

    Raises:
        ValueError: If one is missing; the message lists those there are.
    """
    named = {"input": card.columns, "label": [card.label], "group": [card.group] if card.group else []}
    there = [column for column in rows.column_names if column != ROW]
    for option, columns in named.items():
        for column in columns:
            if column.split(".")[0] not in there:
                raise ValueError(
                    f"Task '{card.name}': got no column '{column}', expected one of {', '.join(there)}; change "
                    f"`{option}` of the card."
                )


def to_example(card: TaskCard, row: dict[str, Any]) -> Example | None:
    """Turn a row into texts, or drop it where the card says so.

    Args:
        card: The task.
        row: The columns of the row.

    Returns:
        The example, or None for a row to drop.

    Raises:
        ValueError: If a text is empty or a label is missing or out of range, and the card does not drop such rows.
    """
    where = f"Task '{card.name}', row {row[ROW]}"
    values = {column: _text(row[column], column, where) for column in card.columns}
    if card.empty_text != "keep" and (empty := [column for column, text in values.items() if not text.strip()]):
        if card.empty_text == "drop":
            return None
        raise ValueError(
            f"{where}: got an empty text in column '{empty[0]}', expected some text; change the data, or set "
            "`empty_text: drop` or `keep` on the card."
        )
    label = _column(row, card.label)
    if _is_unlabelled(card, label):
        if card.unlabelled == "drop":
            return None
        raise ValueError(
            f"{where}: got no label ({label!r}) in column '{card.label}', expected a label; change `splits`, or set "
            "`unlabelled: drop` on the card."
        )
    target, references = _label_texts(card, label, where)
    group = str(_column(row, card.group)) if card.group else ""
    return Example(int(row[ROW]), values, target, references, group)


def _column(row: dict[str, Any], name: str) -> Any:
    value: Any = row
    for part in name.split("."):
        value = value[part]
    return value


def _text(value: Any, column: str, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(
        f"{where}: got {type(value).__name__} in column '{column}', expected text; change `input` or add a "
        "`preprocess` function to the card."
    )


def _is_unlabelled(card: TaskCard, label: Any) -> bool:
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return True
    if isinstance(label, str):
        return not label.strip()
    if isinstance(label, Sequence):
        return not any(str(answer).strip() for answer in label)
    below = card.choices is not None or (card.value_range is not None and card.value_range[0] > -1)
    return bool(below and label == -1)


def _label_texts(card: TaskCard, label: Any, where: str) -> tuple[str, list[str]]:
    if card.choices is not None:
        if isinstance(label, str) and label in card.choices:
            return label, [label]
        if not isinstance(label, str) and label in range(len(card.choices)):
            word = card.choices[int(label)]
            return word, [word]
        raise ValueError(
            f"{where}: got label {label!r}, expected 0 to {len(card.choices) - 1} or one of "
            f"{', '.join(card.choices)}; change the data, `label` or `choices` of the card."
        )
    if card.value_range is not None:
        low, high = card.value_range
        try:
            value = float(label)
        except (TypeError, ValueError):
            value = math.nan
        if not low <= value <= high:
            raise ValueError(
                f"{where}: got label {label!r}, expected a number from {low:g} to {high:g}; change the data, `label` "
                "or `value_range` of the card."
            )
        # The model writes the grid; metrics compare with the value as it was annotated.
        grid = min(high, low + round((value - low) / card.value_step) * card.value_step)
        return f"{grid:.1f}", [f"{value:.6g}"]
    answers = [label] if isinstance(label, str) else label
    if not isinstance(answers, Sequence):
        answers = [str(label)]
    texts = [str(answer) for answer in answers if str(answer).strip()]
    return texts[0], texts
