"""Labels and inputs with unknown tokens are reported before training."""

import warnings

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mpt_lightning.data import MultitaskDataModule, TaskDataModule
from mpt_lightning.data.vocabulary import check_choices


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of lower-case letters without an unknown token, which drops other characters."""
    core = Tokenizer(models.BPE({token: number for number, token in enumerate(["</s>", "▁", *"abcdef"])}, []))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


@pytest.mark.parametrize("family", ["seq2seq", "causal"])
@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["bad", "xyz"], r"'x': got the choices 'xyz', which becomes \['▁'\]; expected words that the tokenizer"),
        (["bad", "xb axd"], None),
        (["bad", "xbad"], r"choices 'bad', which becomes \['▁', 'b', 'a', 'd'\] like 'xbad'; 'xbad', which becomes"),
    ],
)
def test_indistinguishable_choices_raise(make_card, tokenizer, family, choices, message):
    card = make_card(name="x", choices=choices)
    if message is None:
        check_choices(card, tokenizer, family)
    else:
        with pytest.raises(ValueError, match=message):
            check_choices(card, tokenizer, family)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_unknown_choices_raise_before_any_row(film, make_card, backbones, kind):
    options = {**film, "backbone": backbones[kind], "data_root": "nowhere"}
    del options["card"]
    card = make_card(choices=["bad", "great", "very good"])
    message = (
        r"'film': got the choices 'great', which becomes \['<unk>'\]; 'very good', which becomes .*Change `choices`"
    )
    with pytest.raises(ValueError, match=message):
        TaskDataModule(card, **options).setup("fit")
    with pytest.raises(ValueError, match=message):
        MultitaskDataModule([make_card(name="other"), card], **options).setup("test")


@pytest.fixture
def free_text(film, make_card, write_split):
    """Return a function that builds a free-text task: one of ten targets has an unknown word, `lost` have no other."""

    def make(lost: int, split: str = "train") -> TaskDataModule:
        targets = ["good film"] * (9 - lost) + ["good zebra"] + ["zebra"] * lost
        rows = [{"text": "a film", "label": target} for target in targets]
        for name in ("train", "validation"):
            write_split(rows if name == split else rows[:1], task="free", split=name)
        card = make_card(name="free", path="someone/free", choices=None, metrics=["squad"])
        return TaskDataModule(**{**film, "card": card})

    return make


def test_training_targets_that_cannot_be_written(free_text):
    with pytest.raises(
        ValueError,
        match=r"'free', row 8: got the target 'zebra', which the tokenizer .* turns into \['<unk>', '</s>'\], expected "
        r"a text that it can write; so are 2 of 10 targets\. Change or drop these rows, or change `backbone`",
    ):
        free_text(lost=2).setup("fit")


def test_other_targets_with_unknown_words_warn(free_text):
    with pytest.warns(UserWarning, match="'free': 3 of 10 validation targets have tokens that the tokenizer"):
        free_text(lost=2, split="validation").setup("fit")
    with pytest.warns(UserWarning, match="'free': 1 of 10 train targets have tokens"):
        free_text(lost=0).setup("fit")


def test_many_unknown_input_tokens_warn_once(film, write_split):
    for split in ("train", "validation"):
        # "task text : a zebra": one of five tokens is unknown, or one of six with the end of the sequence.
        write_split([{"text": "a zebra", "label": n % 2} for n in range(10)], split=split)
    with pytest.warns(
        UserWarning, match=r"'film': 16\.7% of the train inputs' tokens are unknown to the token"
    ) as caught:
        TaskDataModule(**film).setup("fit")
    assert len([warning for warning in caught if "unknown" in str(warning.message)]) == 1


def test_few_unknown_input_tokens_do_not_warn(film, write_split):
    write_split([{"text": "a film film film film zebra", "label": n % 2} for n in range(10)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TaskDataModule(**film).setup("fit")
