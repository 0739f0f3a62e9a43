"""Every architecture equals its bare model in forward, ranking and generation, or is refused with a message."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from mpt_lightning.backbones import Backbone
from mpt_lightning.backbones.base import Family, align
from mpt_lightning.backbones.load import wrap_model
from mpt_lightning.objectives import IGNORE, log_likelihood
from tests.backbones.architectures import EXACT, NO_GRADIENTS, REFUSED, build_tiny, table

# Masked models have an own test.
GENERATING: list[tuple[str, Family]] = [(kind, family) for family in ("causal", "seq2seq") for kind in EXACT[family]]


def tokens(*sizes: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 110, (size,), generator=generator) for size in sizes]


PROMPTS, TEXTS, ANSWERS = torch.stack(tokens(4, 4, seed=1)), tokens(7, 3, 5, seed=2), tokens(2, 3, 1, seed=3)
LABELS = pad_sequence(ANSWERS, batch_first=True, padding_value=IGNORE)


@dataclass
class Bare:
    """The bare model, on one row without padding."""

    model: PreTrainedModel
    family: Family

    def logits(self, before: dict[str, Tensor], answer: Tensor, embed: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Return the logits `[M, V]` of an answer after ids or embeddings `[1, S]`."""
        if self.family == "seq2seq":
            read = self.model.prepare_decoder_input_ids_from_labels(answer[None])
            return self.model(**before, decoder_input_ids=read, use_cache=False).logits[0]
        behind = answer[None] if embed is None else embed(answer[None])
        whole = {name: torch.cat([value, behind], dim=1) for name, value in before.items()}
        return self.model(**whole, use_cache=False).logits[0, -len(answer) - 1 : -1]

    def of_ids(self, prompt: Tensor, text: Tensor, answer: Tensor) -> Tensor:
        return self.logits({"input_ids": torch.cat([prompt, text])[None]}, answer, None)

    def of_embeddings(self, prompt: Tensor, text: Tensor, answer: Tensor, embed: Any) -> Tensor:
        return self.logits({"inputs_embeds": torch.cat([prompt, embed(text)])[None]}, answer, embed)

    def greedy(self, prompt: Tensor, text: Tensor, steps: int) -> Tensor:
        written = torch.zeros(0, dtype=torch.long)
        seq2seq = self.family == "seq2seq"
        start = torch.tensor([self.model.config.decoder_start_token_id or 0]) if seq2seq else None
        for _ in range(steps):
            before = torch.cat([prompt, text] if seq2seq else [prompt, text, written])[None]
            decoder = {"decoder_input_ids": torch.cat([start, written])[None]} if start is not None else {}
            last = self.model(input_ids=before, use_cache=False, **decoder).logits[0, -1]
            written = torch.cat([written, last.argmax()[None]])
        return written


def largest_error(logits: Tensor, expected: Sequence[Tensor]) -> float:
    """Return the largest difference at label tokens, in standard deviations of the expected logits."""
    differences = [(row[: len(e)] - e).abs().max() for row, e in zip(logits, expected, strict=True)]
    return float(torch.stack(differences).max() / torch.cat(expected).std())


# By prompt and row: the logits of the row's answer after the prompt, and two tokens of greedy decoding.
Expected = dict[tuple[int, int], tuple[Tensor, list[int]]]


def check(backbone: Backbone, known: Expected, side: str, count: int) -> None:
    """Compare evaluation, ranking and generation of rows that have `count` prompts, padded on a side."""
    rows = torch.arange(3) % count
    expected, decoded = zip(*(known[int(prompt), row] for row, prompt in enumerate(rows)), strict=True)
    ids = pad_sequence(TEXTS, batch_first=True)
    mask = pad_sequence([torch.ones_like(text) for text in TEXTS], batch_first=True)
    inputs = (backbone.embed(PROMPTS[:count]), rows, *align(ids, mask, side))
    assert largest_error(backbone(*inputs, LABELS).logits, expected) < 1e-5
    scores = backbone.score(*inputs, LABELS[:, None])[:, 0]
    likelihoods = [log_likelihood(logits[None], answer[None]) for logits, answer in zip(expected, ANSWERS, strict=True)]
    torch.testing.assert_close(scores.double(), torch.cat(likelihoods).double(), rtol=1e-5, atol=1e-4)
    written = backbone.generate(*inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert written.tolist() == [*decoded]


@pytest.mark.parametrize(("kind", "family"), GENERATING)
def test_results_equal_the_bare_models(kind: str, family: Family) -> None:
    """A prompt made of tokens' embeddings gives the same results as these tokens' ids."""
    model = build_tiny(kind, family)
    bare = Bare(model, family)
    backbone = wrap_model(model, kind).eval()
    with torch.no_grad():
        expected = {
            (prompt, row): (
                bare.of_ids(PROMPTS[prompt], TEXTS[row], ANSWERS[row]),
                bare.greedy(PROMPTS[prompt], TEXTS[row], 2).tolist(),
            )
            for prompt, row in ((0, 0), (0, 1), (0, 2), (1, 1))
        }
        check(backbone, expected, "right", count=2)
        check(backbone, expected, "left", count=1)
        torch.testing.assert_close(backbone.embeddings[PROMPTS], backbone.embed(PROMPTS))
    if kind in NO_GRADIENTS:
        return
    ours, theirs = (backbone.embeddings.detach()[PROMPTS].clone().requires_grad_() for _ in range(2))
    ids = pad_sequence(TEXTS, batch_first=True)
    mask = pad_sequence([torch.ones_like(text) for text in TEXTS], batch_first=True)
    logits = backbone(ours, torch.tensor([0, 1, 0]), ids, mask, LABELS).logits
    assert largest_error(logits.detach(), [expected[pair][0] for pair in ((0, 0), (1, 1), (0, 2))]) < 1e-5
    logits[LABELS != IGNORE].square().sum().backward()
    for row, prompt in enumerate((0, 1, 0)):
        bare.of_embeddings(theirs[prompt], TEXTS[row], ANSWERS[row], backbone.embed).square().sum().backward()
    assert (ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max() < 1e-4


@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family, kinds in REFUSED.items() for kind in kinds])
def test_refused_architectures(family: Family, kind: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[family][kind]):
        wrap_model(build_tiny(kind, family), kind)


def test_the_documented_table_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "architectures.md"
    assert page.read_text().endswith(table())
