"""Patterns: other templates over the same columns."""

from dataclasses import asdict

import pytest

from mpt_lightning.data import MultitaskDataModule, TaskCard, list_cards, load_card, load_task

FIELDS = {"name": "one", "path": "some/where", "input": "{a} and {b}", "metrics": ["accuracy"]}
PATTERNS = [{"input": "{b} after {a}"}, {"input": "is {a} so ?", "choices": ["sure", "never"]}]


def card(**changes: object) -> TaskCard:
    return TaskCard(**{**FIELDS, "choices": ["yes", "no"], "patterns": PATTERNS, **changes})


def test_pattern_replaces_the_input() -> None:
    module = load_task(card(), backbone="mpt_lightning/demo/t5", pattern=1)
    chosen = module.cards["one"]
    assert (chosen.input, chosen.choices, chosen.patterns) == ("is {a} so ?", ["sure", "never"], [])
    assert module.hparams["pattern"] == 1
    assert load_task(card(), pattern=0).cards["one"].choices == ["yes", "no"]
    assert load_task(card()).cards["one"] == card()
    assert TaskCard(**asdict(card())) == card()


def test_rows_are_rendered_with_the_pattern(tmp_path) -> None:
    module = load_task(
        "demo/sentiment", backbone="mpt_lightning/demo/t5", pattern=0, max_eval_rows=5, cache_dir=str(tmp_path)
    )
    module.setup("validate")
    (loader,) = module.val_dataloader()
    batch = next(iter(loader))
    assert all(text.startswith("how did the speaker feel ? sentence : ") for text in batch["texts"])
    assert {gold for golds in batch["references"] for gold in golds} <= {"upset", "pleased"}
    assert batch["choices"].shape[1] == 2


@pytest.mark.parametrize("number", [-1, 2])
def test_pattern_number_out_of_range(number: int) -> None:
    with pytest.raises(ValueError, match=f"Task 'one': got pattern={number}, expected 0 to 1; change `pattern`"):
        load_task(card(), pattern=number)


def test_card_without_patterns() -> None:
    with pytest.raises(ValueError, match="'demo/similarity': got pattern=0, expected none, since the card has no"):
        MultitaskDataModule(["demo/topic", "demo/similarity"], pattern=0)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            [{"input": "{a} and {c}"}],
            r"patterns\[0\]: got the column 'c', expected columns of the card's `input` \(a, b",
        ),
        ([PATTERNS[0], {"input": "no column"}], r"patterns\[1\]: .*a template that names at least one column"),
        ([{"input": "{a}", "choices": ["x", "y", "z"]}], "got 3 choices, expected 2, one for each"),
        ([{"input": "{a}", "choices": ["x", "X"]}], "two or more non-empty words that differ"),
        ([{"text": "{a}"}], "got {'text': '{a}'} in patterns, expected a mapping with `input`"),
        ({"input": "{a}"}, "patterns: got {'input': '{a}'}, expected a list"),
    ],
)
def test_bad_pattern(patterns: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        card(patterns=patterns)


def test_demo_vocabulary_covers_all_patterns() -> None:
    from transformers import AutoTokenizer

    from mpt_lightning.resources import backbone_path

    known = AutoTokenizer.from_pretrained(backbone_path("mpt_lightning/demo/t5")).get_vocab()
    cards = {name: card for name, card in list_cards().items() if card.patterns}
    assert {"glue/sst2", "glue/rte", "glue/mrpc", "rotten_tomatoes", "ag_news"} <= cards.keys()
    for name, found in cards.items():
        assert len(found.patterns) >= 2
        for number in range(len(found.patterns)) if name.startswith("demo/") else ():
            chosen = load_task(load_card(name), pattern=number).cards[name]
            words = " ".join(text for text, _ in chosen.parts).split() + (chosen.choices or [])
            assert not set(words) - known.keys(), name
