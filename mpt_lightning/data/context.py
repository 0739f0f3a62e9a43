"""The context of context-aware prompt tuning: training examples with their answers, as typed tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.examples import Example
from mpt_lightning.data.formats import EncodedInput
from mpt_lightning.data.template import count_slots
from mpt_lightning.data.tokenize import Encoder
from mpt_lightning.data.vocabulary import check_choices
from mpt_lightning.errors import MPTError

# Types of the tokens of the first example, PEFT's; those of example k are larger by 4k. 0 is BOS or a separator.
TEMPLATE, INPUT, PREFIX, ANSWER = 1, 2, 3, 4


@dataclass(frozen=True)
class Context:
    """K examples that precede every row, as N tokens: `[BOS] input prefix answer eos separator input ...`.

    An example's tokens up to its answer equal the `input_ids` of the same row in a batch, and its answer and end of
    sequence equal that row's `labels`.

    Args:
        token_types: Type of each token [N]. Example k, from 0: 4k + 1 the template's words, 4k + 2 the text of its
            columns, 4k + 3 the answer prefix, 4k + 4 the answer and the end of sequence. 0: BOS and separators.
        row_ids: Row of each example in the Hub's split [K].
    """

    task: str
    token_ids: list[int]
    token_types: list[int]
    row_ids: list[int]


def build_context(
    card: TaskCard, examples: Sequence[Example], encoder: Encoder, separator: str, max_length: int | None
) -> Context:
    """Build the context of K examples in this order; an input that is too long is cut like that of a row.

    `separator` is the text after every example, the last one too; empty is none. Without `max_length`, the number of
    tokens N has no limit.

    Raises:
        MPTError: If the backbone cannot have a context, if its tokenizer cannot write the separator, the answer
            prefix or a choice, or if there are more tokens than `max_length`.
    """
    if not encoder.format.continues:
        raise MPTError(
            f"Got a {encoder.family} backbone, expected a decoder-only one, because context-aware prompt tuning trains "
            "on predicting the answers in the context; change `backbone`, or leave `context_shots` unset."
        )
    if not encoder.tokenizer.is_fast:
        raise MPTError(
            f"Tokenizer '{encoder.tokenizer.name_or_path}': got a slow tokenizer, expected a fast one, which reports "
            "each token's place in the text; change `backbone`, or leave `context_shots` unset."
        )
    if count_slots(card.input + encoder.answer_prefix):
        raise MPTError(
            f"Task '{card.name}': got slots for a prompt's tokens ([prompt*N]) in a context, expected none; change "
            "`input` of the card or `answer_prefix`."
        )
    between = _tokenize(encoder, separator, "`separator`", 'set `separator` to another text, or to "" for none')
    _tokenize(encoder, encoder.answer_prefix, "`answer_prefix`", "change `answer_prefix`")
    check_choices(card, encoder.tokenizer, encoder.family)
    inside = replace(encoder, with_bos=False)
    ids = list(encoder.format.special[0])
    types, ends = [0] * len(ids), []
    for number, (fitted, encoded) in enumerate(inside.fit(card, list(examples))):
        (answer,) = inside.format.answers([encoded], [fitted.target])
        ids += [*encoded.ids, *answer, *between]
        types += [4 * number + kind for kind in _input_types(card, fitted, inside, encoded)]
        types += [4 * number + ANSWER] * len(answer) + [0] * len(between)
        ends.append(len(ids))
    if max_length is not None and len(ids) > max_length:
        fitting = sum(end <= max_length for end in ends)
        raise MPTError(
            f"Task '{card.name}': got a context of {len(ids)} tokens for {len(ends)} examples, expected at most "
            f"max_context_length={max_length}, into which the first {fitting} fit; lower `context_shots` or "
            "`max_input_length`, or raise `max_context_length`."
        )
    return Context(card.name, ids, types, [example.row_id for example in examples])


def _tokenize(encoder: Encoder, text: str, where: str, change: str) -> list[int]:
    """Return the ids of a text; raise if it has none or the unknown token."""
    (ids,) = encoder.format.plain([text]) if text else ([],)
    if text and (not ids or encoder.tokenizer.unk_token_id in ids):
        raise MPTError(
            f"Got {text!r} in {where}, which the tokenizer '{encoder.tokenizer.name_or_path}' turns into "
            f"{encoder.tokenizer.convert_ids_to_tokens(ids)}, expected a text that it can write; {change}."
        )
    return ids


def _input_types(card: TaskCard, example: Example, encoder: Encoder, encoded: EncodedInput) -> Iterator[int]:
    """Yield the type of each token of an input, from the characters that it covers."""
    characters = []
    for literal, column in card.parts:
        characters += [TEMPLATE] * len(literal) + [INPUT] * len(example.values[column] if column else "")
    # The rest is the answer prefix, and the space before the answer if it is tokenised with the text.
    rest = PREFIX if encoder.answer_prefix else TEMPLATE
    characters += [rest] * (len(encoded.text) - len(characters))
    offsets = encoder.tokenizer(encoded.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for start, end in offsets["offset_mapping"][: len(encoded.ids)]:
        # A token without characters, such as a mark of the text's start, has the type of the next one.
        here = characters[start:end] or characters[start : start + 1] or characters[-1:]
        yield next(kind for kind in (INPUT, PREFIX, TEMPLATE) if kind in here)
