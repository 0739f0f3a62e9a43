"""What a tokenizer cannot write: labels that it loses, inputs that it does not know."""

from __future__ import annotations

import numpy as np
from datasets.arrow_dataset import Dataset
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from mpt_lightning.backbones.family import Family
from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.rows import Split
from mpt_lightning.data.tokenize import Encoder
from mpt_lightning.errors import MPTError

#: A larger share of unknown input tokens than this is warned of.
_MOST_UNKNOWN = 0.1


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of unknown words; None where none exists, or where it is also the end of sequence (GPT-2)."""
    unknown = tokenizer.unk_token_id
    return None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) else unknown


def check_choices(card: TaskCard, tokenizer: PreTrainedTokenizerBase, family: Family) -> None:
    """Check that a task's choices can be told apart by their tokens.

    Args:
        card: The task.
        tokenizer: The backbone's tokenizer.
        family: The backbone's; for "causal" a choice follows a space.

    Raises:
        MPTError: If a choice has no tokens or an unknown one, or if two have the same.
    """
    words = card.choices or []
    texts = words if family == "seq2seq" else [f" {word}" for word in words]
    rows = [tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]
    space = tokenizer(" ", add_special_tokens=False, verbose=False)["input_ids"]
    unknown = unknown_id(tokenizer)
    wrong = []
    for word, ids in zip(words, rows, strict=True):
        same = [other for other, own in zip(words, rows, strict=True) if own == ids and other != word]
        if not ids or list(ids) == space or unknown in ids or same:
            pieces = tokenizer.convert_ids_to_tokens(list(ids))
            wrong.append(f"{word!r}, which becomes {pieces}" + (f" like {same[0]!r}" if same else ""))
    if wrong:
        raise MPTError(
            f"Task '{card.name}': got the choices {'; '.join(wrong)}; expected words that the tokenizer "
            f"'{tokenizer.name_or_path}' can write and tell apart. Change `choices` of the card, or `backbone`."
        )


def check_targets(card: TaskCard, rows: Dataset, split: Split, encoder: Encoder) -> None:
    """Check that the tokenizer can write a split's targets of free text.

    Args:
        card: The task.
        rows: Its encoded rows.
        split: Our name of the split.
        encoder: How the backbone reads and writes text.

    Raises:
        MPTError: If a training target has no tokens, or unknown ones only.

    Warns:
        If other targets have unknown tokens or none.
    """
    if card.choices is not None:
        return
    tokenizer = encoder.tokenizer
    closing = len(encoder.targets([""])[0]) if encoder.family == "seq2seq" else 1
    lengths, unknown = _counts(rows, "labels", unknown_id(tokenizer))
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
    """Warn if more than a tenth of a split's input tokens are unknown; return whether that is so."""
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
    chunks = [chunk for chunk in rows.data.column(column).chunks if len(chunk)]
    if not chunks:
        return np.zeros(0, dtype=int), np.zeros(0, dtype=int)
    lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
    ids = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
    of_token = np.concatenate([[0], np.cumsum(ids == (-1 if unknown is None else unknown))])
    ends = np.cumsum(lengths)
    return lengths, of_token[ends] - of_token[ends - lengths]
