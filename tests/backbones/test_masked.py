"""Masked models equal transformers alone, row by row: on every architecture, at any length, padding and batch."""

import pytest
import torch

from mpt_lightning.backbones.base import align
from mpt_lightning.objectives import IGNORE, token_cross_entropy
from tests.backbones.architectures import EXACT
from tests.backbones.masked import ANSWERS, ATTENTION, IDS, LABELS, PROMPTS, ROWS, ByHand, assert_equal, wrap


@pytest.mark.parametrize("kind", EXACT["masked"])
def test_results_equal_transformers_alone(kind: str) -> None:
    backbone, counted = wrap(kind), LABELS != IGNORE
    by_hand = ByHand(backbone.model, kind)
    ours, theirs = (backbone.embeddings.detach()[PROMPTS].clone().requires_grad_() for _ in range(2))
    logits = backbone(ours, ROWS, IDS, ATTENTION, LABELS).logits
    expected = by_hand.all(theirs, ROWS)
    assert expected.std() > 0.1
    assert_equal(logits[counted], expected)
    loss, reference = token_cross_entropy(logits, LABELS), -expected.log_softmax(1).gather(1, LABELS[counted][:, None])
    assert_equal(loss, reference.mean())
    loss.backward()
    reference.mean().backward()
    assert_equal(ours.grad / theirs.grad.std(), theirs.grad / theirs.grad.std())
    with torch.no_grad():
        assert_equal(by_hand.all(PROMPTS, ROWS), expected)  # token ids
        left = align(IDS, ATTENTION, "left")
        assert_equal(backbone(ours, ROWS, *left, LABELS).logits[counted], expected)
        order = torch.tensor([3, 0, 4, 1, 2])
        permuted = backbone(ours.flip(0), 1 - ROWS[order], *(t[order] for t in (IDS, ATTENTION, LABELS))).logits
        assert_equal(permuted[order.argsort()][counted], expected)
        shared = backbone(ours[1:], torch.zeros_like(ROWS), *left, LABELS).logits
        assert_equal(shared[counted], by_hand.all(PROMPTS, torch.ones_like(ROWS)))
        none = backbone(ours[:, :0], ROWS, IDS, ATTENTION, LABELS).logits
        assert_equal(none[counted], by_hand.all(PROMPTS[:, :0], ROWS))
        likelihoods = -torch.stack([part.sum() for part in reference.split([len(answer) for answer in ANSWERS])])
        choices = torch.stack([LABELS, torch.full_like(LABELS, IGNORE), LABELS.flip(0)], dim=1)
        scores = backbone.score(ours, ROWS, *left, choices)
        assert_equal(scores[:, 0], likelihoods)
        assert (scores[:, 1] == float("-inf")).all()
