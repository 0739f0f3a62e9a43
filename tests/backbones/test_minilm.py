"""A pretrained English model answers as in plain transformers: by hard prompts, in a Trainer and a Predictor."""

import lightning.pytorch as L
import pytest
import torch
from torch.nn.functional import softplus
from torch.utils.data import DataLoader
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mpt_lightning import HardPrompt, Predictor, load_backbone
from mpt_lightning.backbones import Backbone
from mpt_lightning.data import TaskCard
from mpt_lightning.data.template import Pattern
from mpt_lightning.prompts import EmptyPrompt

LIKE = "I like disney films very much. [SEP] It was [MASK]. [SEP]"
HATE = "I hate disney films very much. [SEP] It was [MASK]. [SEP]"
BORING = "The plot was boring and the acting wooden. It was [MASK]."
WORDS = ["terrible", "great"]


def card(name: str, pattern: str) -> TaskCard:
    shared = {"path": "films", "input": "{text}", "label": "label", "choices": WORDS, "metrics": ["accuracy"]}
    return TaskCard(name=name, masked=Pattern(pattern), **shared)


CARDS = {
    "segments": card("segments", "{text} [SEP] It was [MASK]. [SEP]"),
    "plain": card("plain", "{text} It was [MASK]."),
}
TASKS = ["segments", "segments", "plain"]
TEXTS = [
    "I like disney films very much.", "I hate disney films very much.", "The plot was boring and the acting wooden.",
]  # fmt: skip


@pytest.fixture(scope="module")
def backbone(minilm: str) -> Backbone:
    return load_backbone(minilm).eval()


@pytest.fixture(scope="module")
def expected(minilm: str) -> dict[str, float]:
    """Return plain transformers' log-odds of "great" against "terrible", with the second segment's token types."""
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(minilm).eval(), AutoTokenizer.from_pretrained(minilm)
    found = {}
    for text in (LIKE, HATE, BORING):
        first, *second = text.removesuffix(" [SEP]").split(" [SEP] ")
        encoded = tokenizer(first, *second, return_tensors="pt", return_token_type_ids=True)
        place = int((encoded["input_ids"][0] == tokenizer.mask_token_id).nonzero())
        with torch.no_grad():
            logits = model(**encoded).logits[0, place]
        bad, good = logits[tokenizer.convert_tokens_to_ids(WORDS)].tolist()
        found[text] = good - bad
    return found


def log_odds(probabilities: dict[str, float]) -> float:
    return float(torch.tensor(probabilities["great"]).log() - torch.tensor(probabilities["terrible"]).log())


@pytest.fixture(scope="module")
def predictor(backbone: Backbone) -> Predictor:
    return Predictor(backbone, EmptyPrompt(2, backbone.dim, list(CARDS)), CARDS)


def test_the_example_of_the_documentation(predictor: Predictor, expected: dict[str, float]) -> None:
    answers = predictor.predict(TEXTS, TASKS)
    assert [answer.text for answer in answers] == [LIKE, HATE, BORING]
    assert [answer.prediction for answer in answers] == ["great", "great", "terrible"]
    assert {answer.text: log_odds(answer.probabilities) for answer in answers} == pytest.approx(expected, abs=1e-4)
    assert expected[LIKE] == pytest.approx(1.3, abs=0.05)
    assert 0 < expected[HATE] < 0.6
    assert expected[BORING] == pytest.approx(-0.64, abs=0.05)


def test_the_backbone_with_a_prompt_of_words(minilm: str, backbone: Backbone) -> None:
    """The prompt's embeddings stand after [CLS]."""
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(minilm).eval(), backbone.tokenizer
    whole = tokenizer(f"a film review : {BORING}", return_tensors="pt")["input_ids"][0]
    words = tokenizer("a film review :", add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([whole[:1], whole[1 + words.shape[1] :]])[None]
    label = torch.tensor([[tokenizer.convert_tokens_to_ids("great")]])
    with torch.no_grad():
        inputs = (backbone.embed(words), torch.tensor([0]), ids, torch.ones_like(ids))
        logits = backbone(*inputs, label).logits[0, 0]
        alone = model(input_ids=whole[None]).logits[0, whole == tokenizer.mask_token_id][0]
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


def test_a_hard_prompt_in_a_trainer(minilm: str, predictor: Predictor, expected: dict[str, float]) -> None:
    """The loss of three rows of any DataModule, whose padding is on the left."""
    ids = predictor.encoder.format.inputs([LIKE, HATE, BORING])
    pad, size = predictor.encoder.pad_id, max(map(len, ids))
    bad, good = ([word] for word in predictor.encoder.tokenizer.convert_tokens_to_ids(WORDS))
    batch = {
        "input_ids": torch.tensor([[pad] * (size - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (size - len(row)) + [1] * len(row) for row in ids]),
        "labels": torch.tensor([good] * 3),
        "choices": torch.tensor([[bad, good]] * 3),
        "task_ids": torch.tensor([0, 0, 0]),
    }
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False)
    loader = DataLoader([batch], batch_size=None)
    (scores,) = trainer.validate(HardPrompt(minilm, tasks=["films"]), dataloaders=loader, verbose=False)
    losses = softplus(-torch.tensor([expected[text] for text in (LIKE, HATE, BORING)]))
    assert scores["val/films/loss"] == pytest.approx(float(losses.mean()), abs=1e-4)
