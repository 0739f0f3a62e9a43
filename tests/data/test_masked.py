"""Masked models' inputs and words: the shipped cards, the place of the mask, segments, cuts, regression, refusals."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, PreTrainedTokenizerFast

from mpt_lightning.backbones.pretrained import load_tokenizer
from mpt_lightning.data import TaskCard, TaskDataModule
from mpt_lightning.data.card import card_names, load_card
from mpt_lightning.data.examples import Example, read_examples
from mpt_lightning.data.formats import MaskedFormat
from mpt_lightning.data.prediction import encode_rows
from mpt_lightning.data.rows import Draw, select_rows, source_rows
from mpt_lightning.data.tokenize import Encoder
from mpt_lightning.data.vocabulary import check_choices
from mpt_lightning.errors import MPTError
from mpt_lightning.resources import backbone_path

FIXTURES = Path(__file__).parent / "fixtures"
CARDS = [name for name in card_names() if load_card(name).masked is not None]
KINDS = ["words", "bytes", "unigram"]
TEXTS = ["it was a good film .", "the bad film was not very good .", "a film ? yes , the film", "good or bad it was"]
# The word of each class, by the card's own word for it.
WORDS = {
    "negative": "terrible", "positive": "great", "unacceptable": "incorrect", "acceptable": "correct",
    "entailment": "Yes", "neutral": "Maybe", "contradiction": "No", "not entailment": "No", "False": "No",
    "True": "Yes", "different": "No", "equivalent": "Yes", "duplicate": "Yes", "objective": "objective",
    "subjective": "subjective", "abbreviation": "Expression", "entity": "Entity", "description": "Description",
    "human": "Human", "location": "Location", "number": "Number", "world": "World", "sports": "Sports",
    "business": "Business", "technology": "Tech", "choice1": "first", "choice2": "second", "option1": "first",
    "option2": "second",
}  # fmt: skip


def word_level(texts: list[str]) -> PreTrainedTokenizerFast:
    """Build a lower-casing word-level tokenizer with BERT's special tokens."""
    words = {word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *sorted(words)])}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


@cache
def build(kind: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer like BERT's (words), RoBERTa's (bytes) or XLM-R's (unigram)."""
    if kind == "words":
        return word_level(TEXTS)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    if kind == "bytes":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        core.train_from_iterator(TEXTS * 50, trainer)
    else:
        words = sorted({f"▁{word}" for text in TEXTS for word in text.split()})
        pieces = [*((token, 0.0) for token in special), *((word, -2.0) for word in words)]
        known = {piece for piece, _ in pieces}
        letters = sorted({letter for word in words for letter in word} - known)
        core = Tokenizer(models.Unigram([*pieces, *((letter, -9.0) for letter in letters)], unk_id=3))
        core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>", bos_token="<s>",
        eos_token="</s>", mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )  # fmt: skip


@pytest.fixture(params=KINDS)
def reader(request) -> MaskedFormat:
    return MaskedFormat(build(request.param))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Callable[[TaskCard], list[Example]]:
    """Return a function that returns some rows of a shipped card's task."""
    folder = str(tmp_path_factory.mktemp("cache"))

    def read(card: TaskCard) -> list[Example]:
        root = None if card.name.startswith("demo/") else str(FIXTURES)
        raw = source_rows(card, "train", root, folder)
        return [row for row in read_examples(card, select_rows(card, raw, Draw(max_rows=20))) if row]

    return read


@pytest.fixture(scope="module", params=["words", "minilm"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of the shipped cards' templates and words, or the MiniLM's."""
    if request.param == "minilm":
        return load_tokenizer(request.getfixturevalue("minilm"))
    cards = [load_card(name).for_family("masked") for name in CARDS]
    literals = [text for card in cards for text, _ in card.parts]
    return word_level([*literals, *(word for card in cards for word in card.words("masked") or [])])


def ids_of(tokenizer: PreTrainedTokenizerFast, *segments: str) -> list[int]:
    return list(tokenizer(*segments)["input_ids"])


def row_of(number: int = 0, label: str = "good", **values: str) -> Example:
    return Example(number, values, label, [label], "")


# The shipped cards


@pytest.mark.parametrize("name", CARDS)
def test_shipped_card_encodes(name, tokenizer, rows):
    card, own = load_card(name).for_family("masked"), load_card(name)
    check_choices(card, tokenizer, "masked")
    words = card.words("masked")
    encoder = Encoder(tokenizer, "masked", 200)
    word_ids = encoder.format.words(words)
    examples = rows(card)
    literal = [text for part, _ in card.parts for text in part.replace("[SEP]", "").split("[MASK]")]
    assert tokenizer.unk_token_id not in tokenizer(" ".join(literal))["input_ids"]
    for before, row, encoded in zip(rows(own), examples, encoder.encode(card, iter(examples), "train"), strict=True):
        ids = encoded["input_ids"]
        assert ids.count(tokenizer.mask_token_id) == 1
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert ids.count(tokenizer.sep_token_id) == 1 + card.input.count("[SEP]")
        assert sum(encoded["shares"]) == pytest.approx(1)
        assert encoded["labels"] == word_ids[encoded["shares"].index(max(encoded["shares"]))]
        if card.choices:
            # Class by class, also where the data names its classes in words.
            assert card.choices.index(row.target) == own.choices.index(before.target)
            assert encoded["shares"][card.choices.index(row.target)] == 1


def test_every_class_has_the_word_that_means_it():
    for name in CARDS:
        card = load_card(name)
        if card.choices and card.masked.choices:
            expected = [WORDS[choice] for choice in card.choices]
            assert card.masked.choices == (["Yes", "No"] if name == "scitail" else expected), name
    assert load_card("glue/stsb").masked.choices == ["No", "Yes"]
    assert load_card("demo/similarity").masked.choices == ["none", "five"]


def test_demo_cards_use_the_words_of_the_demo():
    known = load_tokenizer(backbone_path("mpt_lightning/demo/t5")).get_vocab()
    for card in (load_card(name).for_family("masked") for name in CARDS if name.startswith("demo/")):
        literal = " ".join(text for text, _ in card.parts).replace("[MASK]", "")
        assert not {*literal.split(), *card.words("masked")} - known.keys()


def test_only_free_text_has_no_masked_pattern():
    others = set(card_names()) - set(CARDS)
    assert {"squad", "super_glue/record", "e2e_nlg", "mrqa/nq"} <= others
    for name in others:
        card = load_card(name)
        assert card.choices is card.value_range is None
        with pytest.raises(MPTError, match=f"Task '{name}': got neither `choices` nor a `value_range`"):
            check_choices(card, build("words"), "masked")


# The mask, segments and words


def test_mask_stands_at_the_end_by_default(reader):
    bare, placed = reader.inputs(["it was", "it was [MASK]"])
    assert bare == placed == ids_of(reader.tokenizer, f"it was {reader.tokenizer.mask_token}")


def test_separator_gives_the_tokenizers_segments(reader):
    mask = reader.tokenizer.mask_token
    texts = ["a film [SEP] it was [MASK].", "a film [SEP] it was [MASK]. [SEP]"]
    expected = ids_of(reader.tokenizer, "a film", f"it was {mask}.")
    assert reader.inputs(texts) == [expected, expected]
    (three,) = reader.inputs(["a film [SEP] it was [MASK] [SEP] good"])
    last = ids_of(reader.tokenizer, f"it was {mask}", "good")
    place = expected.index(reader.tokenizer.mask_token_id), last.index(reader.tokenizer.mask_token_id)
    assert three == [*expected[: place[0]], *last[place[1] :]]


def test_words_are_written_as_after_a_space(reader):
    tokenizer = reader.tokenizer
    (word,) = reader.words(["good"])
    assert len(word) == 1
    for text in ("it was [MASK] .", "a film ? [MASK] , the film", "it was [MASK]"):
        (ids,) = reader.inputs([text])
        place = ids.index(tokenizer.mask_token_id)
        assert ids_of(tokenizer, text.replace("[MASK]", "good")) == [*ids[:place], *word, *ids[place + 1 :]]


def test_slots_and_mask(reader):
    (ids,) = reader.inputs(["[prompt*2] a film [prompt*1] it was [MASK]"])
    assert [token for token in ids if token < 0] == [-1, -2, -3]
    assert ids[1:3] == [-1, -2]
    assert ids.count(reader.tokenizer.mask_token_id) == 1


def test_two_masks_in_a_raw_text_raise(reader):
    with pytest.raises(MPTError, match=r"Got 2 masks in 'a \[MASK\] film \[MASK\]', expected one; change the text"):
        reader.inputs(["a [MASK] film [MASK]"])


@pytest.mark.parametrize("kind", KINDS)
def test_mask_in_a_row_raises(kind, make_card):
    encoder = Encoder(build(kind), "masked", 40)
    card = make_card(masked={"input": "{text} it was [MASK]."}).for_family("masked")
    for text in ("a [MASK] film", f"a {encoder.tokenizer.mask_token} film"):
        message = rf"Task 'film', row 3: got {re.escape(text.split()[1])} in column 'text', expected it in the card's"
        with pytest.raises(MPTError, match=message):
            list(encoder.encode(card, iter([row_of(text="a film"), row_of(3, text=text)]), "train"))
        with pytest.raises(MPTError, match=r"row 0: got .* in column 'text'"):
            encode_rows(encoder, {"film": card}, [text], ["film"], raw=False)
        (raw,) = encode_rows(encoder, {"film": card}, [text], ["film"], raw=True)
        assert raw.ids.count(encoder.tokenizer.mask_token_id) == 1


def test_rows_may_place_the_mask_if_the_template_does_not(make_card):
    encoder, card = Encoder(build("words"), "masked", 40), make_card(input="a {text}")
    rows = [row_of(text="film it was [MASK] ."), row_of(text="film")]
    found = [row["input_ids"] for row in encoder.encode(card, iter(rows), "train")]
    assert found == [ids_of(encoder.tokenizer, text) for text in ("a film it was [MASK] .", "a film [MASK]")]


@pytest.mark.parametrize("kind", KINDS)
def test_cut_keeps_mask_separator_and_template(kind, make_card):
    encoder = Encoder(build(kind), "masked", 24)
    card = make_card(masked={"input": "a {text} [SEP] it was [MASK] ."}).for_family("masked")
    long = row_of(text=" ".join(["film was good"] * 30))
    ((cut, encoded),) = encoder.fit(card, [long])
    assert 20 <= len(encoded.ids) <= 24
    assert long.values["text"].startswith(cut.values["text"])
    pair = f"a {cut.values['text']}", f"it was {encoder.tokenizer.mask_token} ."
    assert encoded.ids == ids_of(encoder.tokenizer, *pair)


def test_a_row_of_a_template_has_no_places_for_the_prompt(reader, make_card):
    encoder, row = Encoder(reader.tokenizer, "masked", 24), row_of(text="a [prompt*4] film")
    with pytest.raises(MPTError, match=r"got \[prompt\* in column 'text', expected it in the card's template only"):
        encoder.fit(make_card(input="film : {text}"), [row])
    ((_, encoded),) = encoder.fit(make_card(input="{text}"), [row])  # the row is the whole input
    assert sum(number < 0 for number in encoded.ids) == 4


def test_a_row_is_not_cut_if_it_places_the_mask(reader, make_card):
    encoder, card = Encoder(reader.tokenizer, "masked", 12), make_card(input="{text}")
    text = " ".join([*["film was good"] * 5, "it was [MASK] ."])
    with pytest.raises(MPTError, match=r"place of the answer in column 'text', which would be cut, .*raise `max_input"):
        encoder.fit(card, [row_of(text=text)])
    # A classifier needs no mask.
    encoder = Encoder(reader.tokenizer, "masked", 12, classifies=True)
    ((cut, _),) = encoder.fit(card, [row_of(text=text)])
    assert text.startswith(cut.values["text"])


def test_a_tokenizer_without_cls_raises():
    tokenizer = word_level(TEXTS)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    with pytest.raises(MPTError, match=r"got no token before a text, expected one such as \[CLS\]"):
        MaskedFormat(tokenizer)


# Choices and values


def test_choices_of_several_tokens(make_card):
    tokenizer, encoder = build("words"), Encoder(build("words"), "masked", 40)
    fields = {"choices": ["bad", "very good"], "input": "{text} it was [MASK]."}
    card = make_card(**fields)
    with pytest.raises(MPTError, match=r"several tokens, 'very good' \['very', 'good'\], .*`multi_mask: true`"):
        check_choices(card, tokenizer, "masked")
    card = make_card(**fields, multi_mask=True)
    check_choices(card, tokenizer, "masked")
    (row,) = encoder.encode(card, iter([row_of(text="a film", label="very good")]), "train")
    assert row["labels"] == tokenizer.convert_tokens_to_ids(["very", "good"])
    assert row["input_ids"].count(tokenizer.mask_token_id) == 1


@pytest.mark.parametrize(("value", "shares", "word"), [("2", [0.6, 0.4], "bad"), ("4.5", [0.1, 0.9], "good")])
def test_value_becomes_shares_of_two_words(make_card, value, shares, word):
    masked = {"input": "a film ? [MASK] , {text}", "choices": ["bad", "good"]}
    card = make_card(choices=None, value_range=[0, 5], metrics=["pearson"], masked=masked).for_family("masked")
    assert card.for_family("masked") == card
    encoder = Encoder(build("words"), "masked", 40)
    (row,) = encoder.encode(card, iter([row_of(text="it was", label=value)]), "train")
    assert row["shares"] == pytest.approx(shares)
    assert encoder.tokenizer.convert_ids_to_tokens(row["labels"]) == [word]
    assert float(card.value(row["shares"][1])) == pytest.approx(float(value))


def test_data_module_reads_the_masked_pattern(film, make_card, tmp_path):
    folder = tmp_path / "bert"
    word_level([*TEXTS, " ".join(map(str, range(40)))]).save_pretrained(folder)
    BertConfig().save_pretrained(folder)
    patterns = [{"input": "{text} it was", "choices": ["not", "very"]}]
    card = make_card(masked={"input": "a {text} ? it was [MASK]", "choices": ["bad", "good"]}, patterns=patterns)
    for pattern, template, words in [
        (None, "a {} ? it was [MASK]", ["bad", "good"]),
        (0, "{} it was [MASK]", ["not", "very"]),
    ]:
        module = TaskDataModule(**{**film, "card": card, "backbone": str(folder), "pattern": pattern})
        module.setup("validate")
        (batch,) = next(iter(module.val_dataloader()))
        ids = module.tokenizer.convert_tokens_to_ids(words)
        assert batch["choices"].tolist() == [[[word] for word in ids]] * len(batch["texts"])
        for number, row in enumerate(batch["input_ids"].tolist()):
            expected = ids_of(module.tokenizer, template.format(f"{number} film film"))
            assert row[: len(expected)] == expected
            assert batch["shares"][number].tolist() == [1 - number % 2, number % 2]


def test_mask_in_the_input_of_another_family_raises(film, make_card):
    module = TaskDataModule(**{**film, "card": make_card(input="{text} it was [MASK]")})
    with pytest.raises(MPTError, match=r"expected a template without \[MASK\], which is for masked .*, not seq2seq"):
        module.setup("fit")


# Cards


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": "{text} [MASK] or [MASK]"}, r"got input=.*, expected a template with \[MASK\] at most once"),
        ({"masked": {"input": "{text} [MASK] [MASK]"}}, r"'film', masked: .* expected a template with \[MASK\] at mo"),
        ({"masked": {"input": "{other} [MASK]"}}, r"'film', masked: got the column 'other', .*change `masked`"),
        ({"masked": {"input": "{text}", "choices": ["a"]}}, r"masked: got 1 choices, expected 2, .*change `masked`"),
        ({"masked": {"input": "{text}", "choices": ["a", "A"]}}, r"masked: .*non-empty words that differ"),
        ({"masked": {"text": "{text}"}}, r"got {'text': '{text}'} in masked, expected a mapping with `input`"),
        ({"label_names": ["a"]}, r"got label_names=\['a'\], expected one name for each of `choices`"),
        ({"label_names": ["a", "b"], "choices": None}, r"expected `choices` too, one for each of the names"),
        *(
            (
                {"masked": {"input": f"{{text}} {place}"}},
                r"'film', masked: got input=.*, expected places written as \[M",
            )
            for place in ("[mask]", "<mask>", "[Sep] [MASK]", "[prompt]", "[prompt 4] [MASK]", "[PROMPT*4] [MASK]")
        ),
    ],
)
def test_bad_masked_pattern(make_card, fields, message):
    with pytest.raises(MPTError, match=message):
        make_card(**fields)


@pytest.mark.parametrize("words", [None, ["no"], ["no", "no"], ["no", " "], ["no", "so", "yes"]])
def test_value_needs_two_words(make_card, words):
    with pytest.raises(MPTError, match="expected `choices` of two words, for the lowest and the highest value"):
        make_card(
            choices=None, value_range=[0, 5], metrics=["pearson"], masked={"input": "{text} [MASK]", "choices": words}
        )


def test_labels_in_words(make_card, write_split, film):
    card = make_card(
        label_names=["thumbs down", "thumbs up"], masked={"input": "{text} [MASK]", "choices": ["a", "film"]}
    )
    root = write_split([{"text": "a film", "label": name} for name in (*card.label_names, 1)])
    for family, words in [("seq2seq", ["bad", "good", "good"]), ("masked", ["a", "film", "film"])]:
        chosen = card.for_family(family)
        raw = source_rows(chosen, "train", root, film["cache_dir"])
        assert [row.target for row in read_examples(chosen, raw)] == words
