"""Task cards: the definition of a task in one small YAML file.

This module is light (no torch, no datasets): `mpt tasks` lists every card in a fraction of a second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from mpt_lightning.arguments import PositiveInt, check_arguments
from mpt_lightning.data.template import (
    MASK,
    SEPARATOR,
    Pattern,
    apply_pattern,
    parse_template,
    read_pattern,
    with_pattern,
    wrong_places,
)
from mpt_lightning.errors import MPTError
from mpt_lightning.io import LONGEST_NAME, can_be_path, read_yaml
from mpt_lightning.metrics.registry import METRICS
from mpt_lightning.resources import find_file, packaged_names

_SPLITS = ("train", "validation", "test")


@dataclass
class TaskCard:
    """Definition of a task: where its rows are, how they become text, what is predicted and how it is scored.

    Args:
        name: Name of the task in logs, checkpoints and exports, for example `glue/sst2`.
        path: Id of the data set on the Hugging Face Hub, for example `nyu-mll/glue`.
        input: Template of the input text over the columns, for example `sst2 sentence: {sentence}`.
        metrics: Names of metrics: accuracy, f1, macro_f1, matthews, multirc (F1a and group exact match), pearson,
            spearman, squad (exact match and F1), bleu, rouge.
        subset: Configuration of the Hub data set, for example `sst2`.
        revision: Revision of the Hub data set, for example `refs/convert/parquet`.
        label: Column of the gold answer: a class index, a number, a text or a list of texts. A dot reaches into a
            nested column (`answers.text`).
        choices: Words of class 0..C-1. Unset for regression and free text.
        label_names: Names of class 0..C-1 in the label column, if it has texts other than `choices`.
        value_range: Lowest and highest value of a regression target.
        value_step: Grid of the regression target, a multiple of 0.1: values are written with one decimal.
        splits: Our split names to the Hub's. `test` may be missing.
        split_rule: `given`: the splits as they are. `halved`: validation is cut into validation and test (seed 42,
            groups stay together). `held_out`: 1,000 training rows become validation, validation becomes test.
        truncate: The one column that may be cut to fit `max_input_length`. Unset: in each row the longest column of
            the template.
        group: Column that names the group a row belongs to (MultiRC: the question).
        preprocess: Dotted path of a function `(row, split) -> list of rows`, applied to each raw row. It must be
            defined in the module that the path names, with these two parameters; methods are not allowed.
        unlabelled: What to do with rows without a label (-1 or nothing): `error` or `drop`.
        empty_text: What to do with rows where a column of the template is empty: `error`, `drop` or `keep`.
        patterns: Other templates over the same columns, each with `choices` of its own if the words differ; the
            DataModule's `pattern` selects one.
        masked: The pattern for masked language models, with a place for the answer: `{sentence} It was [MASK].`. A
            `[SEP]` begins the second segment. A regression task has two `choices` here, for its lowest and its highest
            value. Unset: `input`, with the answer's place at its end.
        multi_mask: Accept choices of several tokens with masked models. Each choice is scored with as many masks as it
            has tokens, which tells the model the answer's length. Otherwise a choice must be one token.
        max_target_length: Longest target in tokens; a longer one is an error in training. Unset: no limit.
        language: Language of the texts (documentation).
        licence: Licence of the data (documentation).
        citation: Source of the data (documentation).
        homepage: Web page of the data (documentation).

    Raises:
        MPTError: If a field has an impossible value.
    """

    name: str
    path: str
    input: str
    metrics: list[str]
    subset: str | None = None
    revision: str | None = None
    label: str = "label"
    choices: list[str] | None = None
    label_names: list[str] | None = None
    value_range: tuple[float, float] | None = None
    value_step: float = 0.2
    splits: dict[str, str] = field(default_factory=lambda: {name: name for name in _SPLITS})
    split_rule: Literal["given", "halved", "held_out"] = "given"
    truncate: str | None = None
    group: str | None = None
    preprocess: str | None = None
    unlabelled: Literal["error", "drop"] = "error"
    empty_text: Literal["error", "drop", "keep"] = "error"
    patterns: list[Pattern] = field(default_factory=list)
    masked: Pattern | None = None
    multi_mask: bool = False
    max_target_length: PositiveInt | None = None
    language: str = ""
    licence: str = ""
    citation: str = ""
    homepage: str = ""

    def __post_init__(self) -> None:
        """Check every field, so that a mistake shows before any data is read."""
        _check_name(self.name)
        try:
            check_arguments(TaskCard, vars(self))
        except MPTError as error:
            raise MPTError(f"Task card '{self.name}': {error} Change this field.") from None
        for item in fields(self):
            value = getattr(self, item.name)
            good = not isinstance(value, str) or value == item.default or (value.strip() and "\0" not in value)
            self._require(item.name, good, "a text")
        self._require("input", self.columns, "a template that names at least one column, like 'text: {sentence}'")
        known = f"a column of the template ({', '.join(self.columns)})"
        self._require("input", self.input.count(MASK) <= 1, f"a template with {MASK} at most once")
        self._require("input", not wrong_places(self.input), f"places written as {MASK}, {SEPARATOR} and [prompt*4]")
        self._require("truncate", self.truncate is None or self.truncate in self.columns, known)
        dotted = self.preprocess is None or re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", self.preprocess, re.ASCII)
        self._require("preprocess", dotted, "a dotted path 'package.module.function'")
        self.patterns = [read_pattern(self, "patterns", item) for item in self.patterns]
        self.masked = None if self.masked is None else read_pattern(self, "masked", self.masked)
        self._check_splits()
        self._check_labels()
        self._check_metrics()
        for number in range(len(self.patterns)):
            apply_pattern(self, number)
        if self.masked is not None and self.masked.input != self.input:
            with_pattern(self, self.masked, "masked")

    def words(self, family: str) -> list[str] | None:
        """Return what a model ranks: the choices; for masked models a regression task's two words; or None."""
        if family == "masked" and self.value_range is not None and self.masked is not None:
            return self.masked.choices
        return self.choices

    def shares(self, reference: str, words: list[str] | None) -> list[float]:
        """Return the share of each of the `words` in a right answer: 1 for a choice, two parts for a value."""
        if self.value_range is not None and words:
            low, high = self.value_range
            part = (float(reference) - low) / (high - low)
            return [1 - part, part]
        return [float(word == reference) for word in words or []]

    def value(self, part: float) -> str:
        """Return the value of a regression task that has this part of the highest value's word, 0 to 1, as a text."""
        low, high = self.value_range or (0.0, 1.0)
        return f"{low + (high - low) * part:.6g}"

    def for_family(self, family: str) -> TaskCard:
        """Return the card as a family of models reads it; for masked models, with its pattern for them."""
        if family == "masked":
            return self if self.masked is None else with_pattern(self, self.masked, "masked")
        if MASK in self.input:
            raise self._error("input", f"a template without {MASK}, which is for masked language models, not {family}")
        return self

    def for_classifier(self) -> TaskCard:
        """Return the card as a classifier on [CLS] reads it: its first column, and the others as second segment."""
        first, *others = [f"{{{column}}}" for column in self.columns]
        text = f"{first} {SEPARATOR} {' '.join(others)}" if others else first
        # Of `masked`, a regression task needs the number of its words alone.
        masked = Pattern(text, ["low", "high"]) if self.value_range is not None else None
        return replace(self, input=text, patterns=[], masked=masked)

    @property
    def parts(self) -> tuple[tuple[str, str | None], ...]:
        """The template as (literal text, column that follows it or None) pairs."""
        try:
            return parse_template(self.input)
        except ValueError as error:
            raise self._error("input", str(error)) from None

    @property
    def columns(self) -> list[str]:
        """Columns of the template, in order, each once."""
        return list(dict.fromkeys(column for _, column in self.parts if column is not None))

    def _error(self, option: str, expected: str) -> MPTError:
        got = getattr(self, option)
        return MPTError(f"Task card '{self.name}': got {option}={got!r}, expected {expected}; change `{option}`.")

    def _require(self, option: str, condition: object, expected: str) -> None:
        if not condition:
            raise self._error(option, expected)

    def _check_splits(self) -> None:
        known = isinstance(self.splits, Mapping) and {"train"} <= set(self.splits) <= set(_SPLITS)
        self._require("splits", known, "a mapping of train, validation and test (train is needed)")
        inside = "names on the Hub, without '..' and without a leading '/'"  # they are parts of a local file's path
        self._require("subset", self.subset is None or _is_inside(self.subset), inside)
        self._require("splits", all(map(_is_inside, self.splits.values())), inside)
        if self.split_rule == "halved":
            self._require("splits", "validation" in self.splits, "a `validation` split to halve (split_rule: halved)")
        if self.split_rule == "held_out":
            becomes_test = "a `validation` split that becomes test (split_rule: held_out)"
            self._require("splits", {"validation", "test"} & set(self.splits), becomes_test)

    def _check_labels(self) -> None:
        if self.choices is not None:
            texts = all(isinstance(word, str) for word in self.choices)
            self._require("choices", texts, "a list of texts (in YAML, quote words such as 'yes' and '1')")
            words = {word.strip().casefold() for word in self.choices}
            differ = len(words) == len(self.choices) > 1 and all(words)
            self._require("choices", differ, "two or more non-empty words that differ by more than case")
            self._require("value_range", self.value_range is None, "either `choices` or `value_range`, not both")
        if self.label_names is not None:
            names = len(self.label_names) == len(set(self.label_names)) == len(self.choices or [])
            expected = "one name for each of `choices`" if self.choices else "`choices` too, one for each of the names"
            self._require("label_names", names, expected)
        if self.value_range is not None:
            pair = self.value_range
            numbers = isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_number, pair))
            self._require("value_range", numbers and pair[0] < pair[1], "[lowest, highest] with lowest < highest")
            self.value_range = (float(pair[0]), float(pair[1]))
            ends = ["lowest", "highest"] if self.masked is None else self.masked.choices or []
            texts = isinstance(ends, list) and all(isinstance(word, str) and word.strip() for word in ends)
            distinct = texts and len(set(ends)) == 2
            self._require("masked", distinct, "`choices` of two words, for the lowest and the highest value")
            tenths = self.value_step * 10 if _is_number(self.value_step) else 0
            on_grid = abs(round(tenths) - tenths) < 1e-6 and 0 < round(tenths) <= (pair[1] - pair[0]) * 10
            self._require("value_step", on_grid, "a multiple of 0.1, no wider than `value_range`")

    def _check_metrics(self) -> None:
        known = {metric for metric in self.metrics if isinstance(metric, str) and metric in METRICS}
        distinct = known and len(known) == len(self.metrics)
        self._require("metrics", distinct, f"one or more different names out of {', '.join(METRICS)}")
        for metric in self.metrics:
            entry = METRICS[metric]
            needed = f"because the metric '{metric}' needs"
            if entry.needs != "text":
                self._require(entry.needs, getattr(self, entry.needs) is not None, f"a value, {needed} it")
            if entry.classes is not None:
                words = f"{entry.classes} words, {needed} them"
                self._require("choices", len(self.choices or []) == entry.classes, words)
            if entry.grouped:
                self._require("group", self.group is not None, f"the column of the question id, {needed} it")


def card_names() -> list[str]:
    """Return the names of the shipped cards, sorted, without reading them."""
    return packaged_names("tasks")


def list_cards() -> dict[str, TaskCard]:
    """Return the shipped cards by name, sorted."""
    return {name: load_card(name) for name in card_names()}


def load_card(card: str | Path | TaskCard | Mapping[str, Any]) -> TaskCard:
    """Return a checked card, by the name of a shipped one (`glue/sst2`), the path of a YAML file, or a card's fields.

    Raises:
        MPTError: If there is no such card or file, or if a field is wrong.
    """
    if isinstance(card, TaskCard):
        return card
    content, source = (card, "the card") if isinstance(card, Mapping) else (read_card_file(card), f"'{card}'")
    values: Any = content
    if "init_args" in content:
        values = content["init_args"].get("card") if isinstance(content["init_args"], Mapping) else None
    if not isinstance(values, Mapping):
        raise MPTError(f"Task card {source}: got no `init_args.card`, expected the fields of the card there.")
    known = {item.name for item in fields(TaskCard)}
    if unknown := sorted(set(map(str, values)) - known):
        raise MPTError(
            f"Task card {source}: got unknown keys {', '.join(unknown)}, expected keys out of "
            f"{', '.join(sorted(known))}; remove or rename them."
        )
    if missing := [key for key in ("name", "path", "input", "metrics") if values.get(key) is None]:
        raise MPTError(f"Task card {source}: got no {', '.join(missing)}, expected these keys; add them.")
    return TaskCard(**values)


def read_card_file(card: str | Path) -> dict[str, Any]:
    """Return the content of a card's YAML file: `class_path`, and `init_args` with the `card` and other options."""
    content = read_yaml(find_file("tasks", str(card)))
    if not isinstance(content, dict):
        raise MPTError(f"Task card '{card}': got {type(content).__name__}, expected a YAML mapping; change the file.")
    return content


def _check_name(name: object) -> None:
    # Names become file names of exports and keys of logs.
    good = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9._/-]+", name) and can_be_path(name)
    if not good or ".." in str(name):
        raise MPTError(
            f"Task name: got {str(name)[:300]!r}, expected letters, digits, '.', '_', '-' and single '/', without "
            f"'..' and a leading '/', at most {LONGEST_NAME}, that can name a file on every system; change `name`."
        )


def _is_inside(name: object) -> bool:
    return isinstance(name, str) and bool(name.strip()) and not re.search(r"\0|^[/\\]|(^|[/\\])\.\.($|[/\\])", name)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
