from dataclasses import replace

import pytest

from mpt_lightning.data.cache import RowCache
from mpt_lightning.data.examples import Example
from mpt_lightning.data.rows import Draw
from mpt_lightning.data.template import render
from mpt_lightning.data.tokenize import Encoder

DRAW = Draw()


@pytest.fixture(params=["seq2seq", "causal"])
def encoder(request, backbones):
    return Encoder.from_backbone(backbones[request.param], 12)


@pytest.fixture
def seq2seq(backbones):
    return Encoder.from_backbone(backbones["seq2seq"], 12)


def example(row_id=0, **values):
    return Example(row_id, values, "good", ["good"], "")


def test_inputs_and_targets(encoder):
    ids = encoder.tokenizer.convert_tokens_to_ids
    (inputs,), (target,) = encoder.format.inputs(["a good film"]), encoder.format.targets(["good"])
    assert target == ids(["good", "</s>"])
    plain = ids(["a", "good", "film"])
    assert inputs == ([*plain, 1] if encoder.family == "seq2seq" else [3, *plain])


def test_causal_input_loses_its_end_of_sequence(backbones):
    encoder = replace(Encoder.from_backbone(backbones["seq2seq"], 12), family="causal")
    assert encoder.format.inputs(["a film"]) == [encoder.tokenizer.convert_tokens_to_ids(["a", "film"])]
    assert encoder.format.targets(["good"])[0][-2:] == encoder.tokenizer.convert_tokens_to_ids(["good", "</s>"])


def test_padding_falls_back_to_the_end_of_sequence(backbones):
    assert [Encoder.from_backbone(backbones[kind], 12).pad_id for kind in ("seq2seq", "causal")] == [0, 1]


@pytest.mark.parametrize("truncate", ["context", None])
def test_only_the_one_column_is_cut(make_card, encoder, truncate):
    card = make_card(input="question: {question} context: {context} : yes", truncate=truncate)
    row = example(question="one two three", context="film " * 50)
    ((fitted, placed),) = encoder.fit(card, [row])
    ids = placed.ids
    text = encoder.text(card, fitted.values)
    assert text.startswith("question: one two three context: film")
    assert text.endswith(" : yes")
    assert len(placed.ids) == 12
    assert ids == encoder.format.inputs([text])[0]


def test_as_many_tokens_as_fit_are_kept(make_card, seq2seq):
    card = make_card(input="task {text}")
    ((fitted, placed),) = seq2seq.fit(card, [example(text="one two three four five six seven eight nine ten 0 1 2")])
    assert fitted.values == {"text": "one two three four five six seven eight nine ten"}
    assert len(placed.ids) == 12


def test_inputs_that_fit_are_unchanged(make_card, seq2seq):
    row = example(text="one ")
    assert seq2seq.fit(make_card(input="task {text}"), [row])[0][0] is row


@pytest.mark.parametrize(
    ("prefix", "template", "text", "expected"),
    [
        ("yes:", "task {text}", "a film", "task a film yes:"),
        ("\nyes:", "task {text}", "a film", "task a film\nyes:"),
        ("yes:", "task {text}", "a film ", "task a film yes:"),
        ("yes:", "{text}", "", "yes:"),
        ("", "task {text}", "a film ", "task a film "),
    ],
)
def test_answer_prefix_is_joined_with_one_space(make_card, seq2seq, prefix, template, text, expected):
    assert replace(seq2seq, answer_prefix=prefix).text(make_card(input=template), {"text": text}) == expected


def test_answer_prefix_is_never_cut(make_card, encoder):
    encoder = replace(encoder, answer_prefix="yes no:")
    (row,) = encoder.encode(make_card(input="task {text}"), iter([example(text="film " * 50)]), "train")
    assert row["text"].startswith("task film film")
    assert row["text"].endswith("film yes no:")
    assert row["cut"]
    assert len(row["input_ids"]) == 12


@pytest.mark.parametrize(("kind", "bos"), [("causal", [3]), ("bytes", [2]), ("seq2seq", [])])
def test_inputs_without_bos(backbones, kind, bos):
    encoder = replace(Encoder.from_backbone(backbones[kind], 12), family="causal")
    assert encoder.format.special[0] == bos
    (ids,) = replace(encoder, with_bos=False).format.inputs(["a film"])
    assert [*bos, *ids] == encoder.format.inputs(["a film"])[0]
    assert not set(ids) & {encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id}


def test_no_room_for_the_column(make_card, seq2seq):
    card = make_card(input="{question} {context}", truncate="context")
    row = example(7, question="one " * 30, context="film")
    with pytest.raises(
        ValueError,
        match=r"'film', row 7: got 31 tokens without column 'context'.*max_input_length=12; raise `max_input_length`",
    ):
        seq2seq.fit(card, [row])


def test_slow_tokenizers_are_cut_by_characters(make_card, seq2seq, monkeypatch):
    monkeypatch.setattr(type(seq2seq.tokenizer), "is_fast", False)
    ((fitted, placed),) = seq2seq.fit(make_card(input="task {text}"), [example(text="one " * 40)])
    assert len(placed.ids) == 12
    assert fitted.values["text"].startswith("one one")


def test_target_limit_is_for_training_only(make_card, seq2seq):
    card = make_card(max_target_length=3, choices=None, metrics=["squad"])
    row = Example(5, {"text": "a"}, "one two three", ["one two three"], "")
    with pytest.raises(
        ValueError, match=r"row 5: got a target of 4 tokens, expected at most 3; raise `max_target_length`"
    ):
        list(seq2seq.encode(card, iter([row]), "train"))
    assert len(next(seq2seq.encode(card, iter([row]), "validation"))["labels"]) == 4


def test_input_without_tokens(make_card, backbones):
    encoder = replace(Encoder.from_backbone(backbones["seq2seq"], 12), family="causal")
    with pytest.raises(ValueError, match="row 0: got an input without tokens"):
        list(encoder.encode(make_card(input="{text}", empty_text="keep"), iter([example(text="")]), "train"))


def test_render_keeps_braces_in_texts(make_card):
    assert render(make_card(input="a {text} {{b}}"), {"text": "{text}"}) == "a {text} {b}"


def test_tokenizer_without_end_of_sequence(backbones):
    encoder = Encoder.from_backbone(backbones["seq2seq"], 12)
    encoder.tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"got no eos token, expected one"):
        Encoder(encoder.tokenizer, "seq2seq", 12)


# The cache


@pytest.fixture
def encode_calls(monkeypatch):
    calls = []
    original = Encoder.encode

    def counting(self, card, rows, split):
        calls.append(card.name)
        return original(self, card, rows, split)

    monkeypatch.setattr(Encoder, "encode", counting)
    return calls


def test_second_run_reads_the_cache(make_card, write_split, film_rows, seq2seq, tmp_path, encode_calls):
    root, cache = write_split(film_rows(20)), str(tmp_path / "cache")
    first = RowCache(root, cache).encoded(make_card(), DRAW, seq2seq)
    second = RowCache(root, cache).encoded(make_card(), DRAW, seq2seq)
    assert encode_calls == ["film"]
    assert first.to_list() == second.to_list()
    assert len(second) == 20


@pytest.mark.parametrize("change", ["card", "draw", "length", "kind", "prefix", "bos", "data"])
def test_any_change_creates_a_new_cache(make_card, write_split, film_rows, backbones, tmp_path, encode_calls, change):
    root, cache = write_split(film_rows(20)), str(tmp_path / "cache")

    def run(card=None, draw=DRAW, kind="seq2seq", length=12, **options):
        encoder = Encoder.from_backbone(backbones[kind], length, **options)
        return RowCache(root, cache).encoded(card or make_card(), draw, encoder)

    run()
    if change == "data":
        write_split([*film_rows(20), {"text": "a", "label": 1}])
        assert len(run()) == 21
    else:
        run(
            **{
                "card": {"card": make_card(input="text: {text}")},
                "draw": {"draw": Draw(k_shot=2)},
                "length": {"length": 11},
                "kind": {"kind": "causal"},
                "prefix": {"answer_prefix": "yes"},
                "bos": {"with_bos": False},
            }[change]
        )
    assert len(encode_calls) == 2


def test_an_error_leaves_nothing_in_the_cache(make_card, write_split, film_rows, seq2seq, tmp_path):
    root, cache = write_split([*film_rows(1500), {"text": "a", "label": 9}]), tmp_path / "cache"
    with pytest.raises(ValueError, match="row 1500: got label 9"):
        RowCache(root, str(cache)).encoded(make_card(), DRAW, seq2seq)
    assert not list((cache / "generator").rglob("*.arrow"))
