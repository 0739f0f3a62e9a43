"""How each family of models reads inputs and writes answers as token ids; a new family is one class here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import ClassVar

from tokenizers import models
from transformers import PreTrainedTokenizerBase

from mpt_lightning.backbones.base import Family
from mpt_lightning.data.template import MASK, SEPARATOR, count_slots, with_slots
from mpt_lightning.errors import MPTError

# Most answers that are cached, which bounds the memory of a task with free text.
_CACHED = 100_000


@dataclass(frozen=True)
class EncodedInput:
    """An input up to its answer: its text, and its token ids, with -1, -2, ... in the slots for a prompt's tokens.

    `gap` is what stands between the text and the answer: a space, or nothing if the tokenizer joins that space to the
    text's last word, so that the text ends with it.
    """

    text: str
    ids: list[int]
    gap: str = ""


class Format(ABC):
    """How a family of models reads inputs and writes answers; see `Encoder` for the arguments.

    By default, an answer does not depend on its input.
    """

    # Whether an answer continues its input in one sequence, so that its ids depend on the input.
    continues: ClassVar[bool] = False
    # What stands before an answer that is tokenised on its own.
    gap: ClassVar[str] = ""

    # The special token without which the family cannot answer.
    needs: ClassVar[str] = "eos_token"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, with_bos: bool = True) -> None:
        if getattr(tokenizer, self.needs) is None:
            raise MPTError(
                f"Tokenizer '{tokenizer.name_or_path}': got no {self.needs.replace('_', ' ')}, expected one to end or "
                f"place answers with; change `backbone` or set its `{self.needs}`."
            )
        self.tokenizer, self.with_bos = tokenizer, with_bos

    @property
    def reserved(self) -> tuple[str, ...]:
        """Strings that a row's own texts may not contain if its template does."""
        return ()

    @cached_property
    def special(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before a text (BOS, or none) and after it."""
        encoded = self.tokenizer("a", return_special_tokens_mask=True, verbose=False)
        ids, special = list(encoded["input_ids"]), [*encoded["special_tokens_mask"]]
        return ids[: [*special, 0].index(0)], ids[len(ids) - [*special[::-1], 0].index(0) :]

    def plain(self, texts: list[str], special: bool = False) -> list[list[int]]:
        """Return the token ids of B texts, with or without the tokenizer's special tokens around them."""
        encoded = self.tokenizer(texts, return_attention_mask=False, verbose=False, add_special_tokens=special)
        return [list(row) for row in encoded["input_ids"]]

    def inputs(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of B input texts, of any length; -1, -2, ... in slots for a prompt's tokens."""
        if any(count_slots(text) for text in texts):
            return [self._enclose(with_slots(text, lambda piece: self.plain([piece])[0])) for text in texts]
        return self._inputs(texts)

    def encode_inputs(self, texts: list[str], choices: list[str] | None) -> list[EncodedInput]:
        """Tokenise B texts up to their answers; the result may depend on all of `choices`, but not on the right one."""
        return [EncodedInput(text, ids) for text, ids in zip(texts, self.inputs(texts), strict=True)]

    def answers(self, inputs: list[EncodedInput], answers: list[str]) -> list[list[int]]:
        """Return the label ids of B answers, each after its input, closed by the end of sequence."""
        return self.targets(answers)

    def choices(self, inputs: list[EncodedInput], choices: list[str] | None) -> list[list[list[int]]]:
        """Return the label ids of each of a task's choices after B inputs [B, C]; B empty lists without choices."""
        columns = [self.answers(inputs, [choice] * len(inputs)) for choice in choices or []]
        return [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in inputs]

    def words(self, words: list[str]) -> list[list[int]]:
        """Return the token ids of B words as answers, without an end of sequence."""
        return self.plain([f"{self.gap}{word}" for word in words]) if words else []

    @abstractmethod
    def targets(self, answers: list[str]) -> list[list[int]]:
        """Return the label ids of B answers on their own, closed by the end of sequence."""

    def _inputs(self, texts: list[str]) -> list[list[int]]:
        return self.plain(texts, special=True)

    def _enclose(self, ids: list[int]) -> list[int]:
        return [*self.special[0], *ids, *self.special[1]]


class Seq2SeqFormat(Format):
    """Encoder-decoders: inputs and targets end with the tokenizer's special tokens, as in pretraining."""

    def targets(self, answers: list[str]) -> list[list[int]]:
        """See the base class."""
        encoded = self.tokenizer(text_target=answers, verbose=False)["input_ids"] if answers else []
        return [list(row) for row in encoded]


class CausalFormat(Format):
    """Decoder-only models: inputs have no end of sequence, and an answer's ids are those that it adds to its input's.

    Most tokenizers join a space to the word after it ("it was| good"), some to the word before it ("it was |good").
    An answer is tokenised together with its input, as long as the input's ids are a prefix of the ids of both; else on
    its own, after a space.
    """

    continues = True
    gap = " "

    def __init__(self, tokenizer: PreTrainedTokenizerBase, with_bos: bool = True) -> None:
        super().__init__(tokenizer, with_bos)
        model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
        # These models merge neighbouring tokens only, so that the last ones decide what an answer adds.
        self._local = isinstance(model, models.BPE | models.WordPiece | models.WordLevel)
        self._added: dict[tuple[tuple[int, ...], str], list[int] | None] = {}

    def targets(self, answers: list[str]) -> list[list[int]]:
        """See the base class."""
        return [[*row, self.tokenizer.eos_token_id] for row in self.words(answers)]

    def answers(self, inputs: list[EncodedInput], answers: list[str]) -> list[list[int]]:
        """Return the ids that each answer adds to its input; its target if the input's ids are not a prefix."""
        added = self._continuations(inputs, answers)
        alone = iter(self.targets([answer for answer, ids in zip(answers, added, strict=True) if ids is None]))
        return [next(alone) if ids is None else [*ids, self.tokenizer.eos_token_id] for ids in added]

    def encode_inputs(self, texts: list[str], choices: list[str] | None) -> list[EncodedInput]:
        """Tokenise B texts up to their answers.

        One space at a text's end is the one before the answer; other whitespace there replaces it. The space is
        tokenised with the answer, unless only the ids of the text with the space are a prefix for each of the choices.
        """
        stems = [text.removesuffix(" ") for text in texts]
        encoded = [
            EncodedInput(stem, ids, "" if text == stem and text[-1:].isspace() else " ")
            for text, stem, ids in zip(texts, stems, self.inputs(stems), strict=True)
        ]
        moved = [row for row, fits in enumerate(self._fits(encoded, choices)) if not fits and encoded[row].gap]
        if moved:
            spaced = [f"{stems[row]} " for row in moved]
            wider = [EncodedInput(text, ids) for text, ids in zip(spaced, self.inputs(spaced), strict=True)]
            for row, fits, input_ in zip(moved, self._fits(wider, choices), wider, strict=True):
                encoded[row] = input_ if fits else encoded[row]
        return encoded

    def _fits(self, inputs: list[EncodedInput], choices: list[str] | None) -> list[bool]:
        columns = [self._continuations(inputs, [choice] * len(inputs)) for choice in choices or [""]]
        return [None not in row for row in zip(*columns, strict=True)]

    def _continuations(self, inputs: list[EncodedInput], answers: list[str]) -> list[list[int] | None]:
        """Return the ids that B answers add to their inputs; None if the input's ids are not a prefix."""
        keys = [
            (tuple(input_.ids[-2:] if self._local else input_.ids), input_.gap + answer)
            for input_, answer in zip(inputs, answers, strict=True)
        ]
        found = {key: self._added[key] for key in keys if key in self._added}
        new = {key: input_ for key, input_ in zip(keys, inputs, strict=True) if key not in found}
        if new:
            joined = self.inputs([input_.text + continuation for (_, continuation), input_ in new.items()])
            for (key, input_), ids in zip(new.items(), joined, strict=True):
                size = len(input_.ids)
                found[key] = ids[size:] if ids[:size] == input_.ids else None
            if len(self._added) + len(new) > _CACHED:
                self._added.clear()
            self._added |= {key: found[key] for key in new}
        return [found[key] for key in keys]

    def _inputs(self, texts: list[str]) -> list[list[int]]:
        eos = self.tokenizer.eos_token_id
        return [row[:-1] if row[-1:] == [eos] else row for row in self.plain(texts, special=self.with_bos)]

    def _enclose(self, ids: list[int]) -> list[int]:
        return [*self.special[0], *ids] if self.with_bos else ids


class MaskedFormat(Format):
    """Masked models: the answer is one token, or several, in the place of the input's one mask.

    `[MASK]` in a text is the place, by default its end; the text after `[SEP]` is the second segment. An answer is
    written as after a space.
    """

    needs = "mask_token"
    # Whether a classifier on the first token answers: then the inputs need no mask.
    classifies = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, with_bos: bool = True) -> None:
        super().__init__(tokenizer, with_bos)
        if not self.special[0]:
            raise MPTError(
                f"Tokenizer '{tokenizer.name_or_path}': got no token before a text, expected one such as [CLS], after "
                "which a prompt stands and which a classifier reads; change `backbone` or the tokenizer's "
                "post-processor."
            )

    @property
    def reserved(self) -> tuple[str, ...]:
        """See the base class."""
        return () if self.classifies else (MASK, str(self.tokenizer.mask_token))

    @cached_property
    def _between(self) -> list[int]:
        """Ids that the tokenizer puts between two segments."""
        encoded = self.tokenizer("a", "a", return_special_tokens_mask=True, verbose=False)
        before = len(self.special[0]) + len(self.plain(["a"])[0])
        inner = slice(before, len(encoded["input_ids"]) - len(self.special[1]))
        pairs = zip(encoded["input_ids"][inner], encoded["special_tokens_mask"][inner], strict=True)
        return [token for token, special in pairs if special]

    def words(self, words: list[str]) -> list[list[int]]:
        """See the base class; a space that becomes a token by itself is left out."""
        alone = self.plain(words) if words else []
        spaced = self.plain([f" {word}" for word in words]) if words else []
        return [ids if after[1:] == ids else after for ids, after in zip(alone, spaced, strict=True)]

    def targets(self, answers: list[str]) -> list[list[int]]:
        """Return the label ids of B answers; there is no end of sequence, and one id marks a classifier's class."""
        return [ids[:1] for ids in self.words(answers)] if self.classifies else self.words(answers)

    def inputs(self, texts: list[str]) -> list[list[int]]:
        """See the base class; raise MPTError if a text has not exactly one mask."""
        token = self.tokenizer.mask_token
        segments = []
        for text in texts:
            has_place = self.classifies or MASK in text or token in text
            placed = text if has_place else f"{text.rstrip()} {MASK}"
            placed = placed.strip().removesuffix(SEPARATOR).replace(MASK, token)
            segments.append([piece.strip() for piece in placed.split(SEPARATOR)])
        tokens = iter(self.plain([piece for pieces in segments for piece in pieces]))
        rows = []
        for text, pieces in zip(texts, segments, strict=True):
            ids = [
                with_slots(piece, lambda part: self.plain([part])[0]) if count_slots(piece) else whole
                for piece, whole in zip(pieces, islice(tokens, len(pieces)), strict=True)
            ]
            rows.append(self._enclose([*ids[0], *(token for other in ids[1:] for token in [*self._between, *other])]))
            if (count := rows[-1].count(self.tokenizer.mask_token_id)) != 1 and not self.classifies:
                raise MPTError(
                    f"Got {count} masks in {text[:80]!r}, expected one; change the text, or `input` or `masked` of the "
                    "card."
                )
        return rows


FORMATS: dict[Family, type[Format]] = {"seq2seq": Seq2SeqFormat, "causal": CausalFormat, "masked": MaskedFormat}
