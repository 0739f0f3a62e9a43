"""Checks that a tokenizer can write a task's choices and targets, and that it knows the words of its inputs."""

from __future__ import annotations

import numpy as np
from datasets.arrow_dataset import Dataset
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from mpt_lightning.backbones.base import Family
from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.formats import FORMATS
from mpt_lightning.data.rows import Split
from mpt_lightning.data.tokenize import Encoder
from mpt_lightning.errors import MPTError

# A larger share of unknown input tokens ends in a warning.
_MOST_UNKNOWN = 0.1


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of unknown words; None if there is none, or if it is also the end of sequence (GPT-2)."""
    unknown = tokenizer.unk_token_id
    return None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) else unknown


def check_choices(card: TaskCard, tokenizer: PreTrainedTokenizerBase, family: Family, classifies: bool = False) -> None:
    """Raise MPTError if the family cannot rank a task's choices, or the tokenizer not write them or tell them apart.

    A classifier (`classifies`) knows classes by their numbers, and writes no words.
    """
    if family == "masked" and card.words(family) is None:
        raise MPTError(
            f"Task '{card.name}': got neither `choices` nor a `value_range` with two words in `masked`, expected words "
            "that a masked language model can rank; change the card, or `backbone`."
        )
    choices = [] if classifies else card.words(family) or []
    rows = FORMATS[family](tokenizer).words(choices)
    space = tokenizer(" ", add_special_tokens=False, verbose=False)["input_ids"]
    unknown = unknown_id(tokenizer)
    wrong = []
    for choice, ids in zip(choices, rows, strict=True):
        same = [other for other, own in zip(choices, rows, strict=True) if own == ids and other != choice]
        if not ids or ids == space or unknown in ids or same:
            pieces = tokenizer.convert_ids_to_tokens(ids)
            wrong.append(f"{choice!r}, which becomes {pieces}" + (f" like {same[0]!r}" if same else ""))
    pieces = [f"{w!r} {tokenizer.convert_ids_to_tokens(i)}" for w, i in zip(choices, rows, strict=True) if len(i) > 1]
    if family == "masked" and not card.multi_mask and not wrong and pieces:
        raise MPTError(
            f"Task '{card.name}': got choices of several tokens, {', '.join(pieces)}, expected words of one token of "
            f"'{tokenizer.name_or_path}'. Change `choices` of the card's `masked`, or set `multi_mask: true` "
            "of the card, beside `masked` (then each choice has as many masks as tokens, which tells the model its "
            "length)."
        )
    if wrong:
        raise MPTError(
            f"Task '{card.name}': got the choices {'; '.join(wrong)}; expected words that the tokenizer "
            f"'{tokenizer.name_or_path}' can write and tell apart. Change `choices` of the card, or `backbone`."
        )


def check_targets(card: TaskCard, rows: Dataset, split: Split, encoder: Encoder) -> None:
    """Raise MPTError if a free-text training target has no known token; warn if other targets have unknown ones."""
    if card.words(encoder.family) is not None:
        return
    tokenizer = encoder.tokenizer
    lengths, unknown = _counts(rows, "labels", unknown_id(tokenizer))
    closing = len(encoder.format.targets([""])[0]) - len(encoder.format.plain([encoder.format.gap])[0])
    empty = unknown >= lengths - closing
    if split == "train" and empty.any():
        row = rows[int(empty.argmax())]
        raise MPTError(
            f"Task '{card.name}', row {row['row_id']}: got the target {row['references'][0]!r}, which the tokenizer "
            f"'{tokenizer.name_or_path}' turns into {tokenizer.convert_ids_to_tokens(row['labels'])}, expected a text "
            f"that it can write; so are {int(empty.sum()):,} of {len(rows):,} targets. Change or drop these rows, or "
            "change `backbone`."
        )
    if lost := int((empty | (unknown > 0)).sum()):
        rank_zero_warn(
            f"Task '{card.name}': {lost:,} of {len(rows):,} {split} targets have tokens that the tokenizer "
            f"'{tokenizer.name_or_path}' does not know. The model cannot write these answers; change `backbone`."
        )


def warn_of_unknown_inputs(card: TaskCard, rows: Dataset, split: Split, encoder: Encoder) -> bool:
    """Warn if more than a tenth of a split's input tokens are unknown; return whether they are."""
    tokenizer = encoder.tokenizer
    lengths, unknown = _counts(rows, "input_ids", unknown_id(tokenizer))
    share = unknown.sum() / max(1, lengths.sum())
    if share > _MOST_UNKNOWN:
        rank_zero_warn(
            f"Task '{card.name}': {share:.1%} of the {split} inputs' tokens are unknown to the tokenizer "
            f"'{tokenizer.name_or_path}', which hides these words from the model. Change `backbone`, or `input` of the "
            "card."
        )
    return bool(share > _MOST_UNKNOWN)


def _counts(rows: Dataset, column: str, unknown: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the length of each row's tokens and how many of them are unknown, [N] each."""
    lists = rows.data.column(column).combine_chunks()
    lengths, ids = lists.value_lengths().to_numpy(), lists.flatten().to_numpy()
    before = np.concatenate([[0], np.cumsum(ids == (-1 if unknown is None else unknown))])
    ends = np.cumsum(lengths)
    return lengths, before[ends] - before[ends - lengths]
