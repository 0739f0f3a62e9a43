"""Rows for masked models, and transformers alone on one row at a time."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mpt_lightning.backbones import MaskedBackbone
from mpt_lightning.backbones.load import wrap_model
from mpt_lightning.objectives import IGNORE
from tests.backbones.architectures import build_tiny
from tests.conftest import VOCABULARY

PAD, SEP, CLS, MASK = 0, 2, 4, 111
# Position ids begin after the padding id; MPNet's is always 1.
FIRST_POSITION = {"mpnet": 2} | dict.fromkeys(
    "camembert data2vec-text luke roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod".split(), 1
)
# Some layers attend to neighbours only, so that the prompt stands beside the mask.
LOCAL = {"modernbert", "ultrabert"}


def build_tokenizer(second_type: int = 1) -> PreTrainedTokenizerFast:
    """Build a tokenizer of the words "0" to "119" that encodes pairs as BERT's does."""
    names = {PAD: "[PAD]", SEP: "[SEP]", CLS: "[CLS]", MASK: "[MASK]"}
    tokenizer = Tokenizer(models.WordLevel({names.get(i, str(i)): i for i in range(VOCABULARY)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=f"[CLS] $A [SEP] $B:{second_type} [SEP]:{second_type}",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )  # fmt: skip
    special = {"pad_token": "[PAD]", "sep_token": "[SEP]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def wrap(kind: str, **changes: Any) -> MaskedBackbone:
    """Wrap a tiny model with the tokenizer."""
    backbone = wrap_model(build_tiny(kind, "masked", **changes), kind).eval()
    assert isinstance(backbone, MaskedBackbone)
    backbone.tokenizer = build_tokenizer()
    return backbone


def text(length: int, place: int, separator: int, seed: int) -> Tensor:
    """Return ids `[L]` with a mask and two segments."""
    ids = torch.randint(5, 110, (length,), generator=torch.Generator().manual_seed(seed))
    ids[0], ids[separator], ids[-1], ids[place] = CLS, SEP, SEP, MASK
    return ids


# Mixed tasks, answers of one token and of two, the mask at the start, in the middle and at the end.
TEXTS = [text(8, 6, 3, 0), text(40, 20, 30, 1), text(88, 86, 50, 2), text(88, 1, 40, 3), text(3, 1, 2, 4)]
ROWS = torch.tensor([0, 1, 0, 1, 1])
ANSWERS = [torch.tensor(answer) for answer in ([7, 9], [50], [12], [30, 31], [5])]
PROMPTS = torch.tensor([[11, 60, 13, 99], [70, 80, 15, 12]])
LABELS = pad_sequence(ANSWERS, batch_first=True, padding_value=IGNORE)
IDS = pad_sequence(TEXTS, batch_first=True)
ATTENTION = pad_sequence([torch.ones_like(ids) for ids in TEXTS], batch_first=True)


@dataclass
class ByHand:
    """Transformers alone, on one row without padding, with explicit positions and token types."""

    model: PreTrainedModel
    kind: str

    def logits(self, prompt: Tensor, ids: Tensor, answer: Tensor) -> Tensor:
        """Return the logits `[M, V]` of an answer; the prompt is token ids `[P]` or embeddings `[P, H]`."""
        place = int((ids == MASK).nonzero())
        at = place if self.kind in LOCAL else 1
        ids = torch.cat([ids[:place], torch.full_like(answer, MASK), ids[place + 1 :]])
        if prompt.dim() == 1:
            given = {"input_ids": torch.cat([ids[:at], prompt, ids[at:]])[None]}
        else:
            embeddings = self.model.get_input_embeddings()(ids)
            given = {"inputs_embeds": torch.cat([embeddings[:at], prompt, embeddings[at:]])[None]}
        size, accepted = len(ids) + len(prompt), inspect.signature(self.model.forward).parameters
        if "position_ids" in accepted:
            given["position_ids"] = FIRST_POSITION.get(self.kind, 0) + torch.arange(size)[None]
        if getattr(self.model.config, "type_vocab_size", 0) > 1:
            length = int((ids == SEP).nonzero()[0]) + 1 + len(prompt)
            given["token_type_ids"] = (torch.arange(size) >= length).long()[None]
        result = self.model(**given, attention_mask=torch.ones(1, size, dtype=torch.long)).logits[0]
        first_mask = place + len(prompt)
        return result[first_mask : first_mask + len(answer)]

    def all(self, prompts: Tensor, rows: Tensor) -> Tensor:
        """Return the logits of all label tokens of the batch."""
        triples = zip(rows.tolist(), TEXTS, ANSWERS, strict=True)
        return torch.cat([self.logits(prompts[row], ids, answer) for row, ids, answer in triples])


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
