"""Contexts of examples with token types, and the rows that follow them."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import lightning.pytorch as L
import pytest
import torch

from mpt_lightning.data import Context, MultitaskDataModule, TaskDataModule, build_context, load_task
from mpt_lightning.data.examples import Example
from mpt_lightning.data.tokenize import Encoder


@pytest.fixture
def words(backbones):
    """Return a word-level encoder: words and punctuation marks are tokens, whitespace is dropped."""
    return Encoder.from_backbone(backbones["causal"], 20, with_bos=False)


@pytest.fixture
def letters(backbones):
    """Return a byte-level encoder: " good", " film" and single characters are tokens."""
    return Encoder.from_backbone(backbones["bytes"], 60, with_bos=False)


def example(target="good", row_id=0, **values):
    return Example(row_id, values, target, [target], "")


def tokens(context, encoder):
    return encoder.tokenizer.convert_ids_to_tokens(context.token_ids)


def pairs(context, encoder):
    return list(zip(tokens(context, encoder), context.token_types, strict=True))


def spans(context, encoder):
    """Return the token ids and kinds (1 to 4) of each example, without separators."""
    found = {}
    for token, kind in zip(context.token_ids, context.token_types, strict=True):
        if kind:
            found.setdefault((kind - 1) // 4, []).append((token, (kind - 1) % 4 + 1))
    assert list(found) == list(range(len(context.row_ids)))
    return [tuple(map(list, zip(*span, strict=True))) for span in found.values()]


# The layout


def test_two_examples_have_the_expected_tokens(make_card, words):
    card = make_card(input="task: {text} . {more} question")
    rows = [example("good", 7, text="a film", more="one"), example("bad", 5, text="the", more="two 3")]
    encoder = replace(words, answer_prefix="yes no:")
    assert pairs(build_context(card, rows, encoder, " . ", None), encoder) == [
        ("<s>", 0),
        *[("task", 1), (":", 1), ("a", 2), ("film", 2), (".", 1), ("one", 2), ("question", 1)],
        *[("yes", 3), ("no", 3), (":", 3), ("good", 4), ("</s>", 4), (".", 0)],
        *[("task", 5), (":", 5), ("the", 6), (".", 5), ("two", 6), ("3", 6), ("question", 5)],
        *[("yes", 7), ("no", 7), (":", 7), ("bad", 8), ("</s>", 8), (".", 0)],
    ]
    assert build_context(card, rows, encoder, "", None).row_ids == [7, 5]


def test_byte_level_tokens_have_the_expected_types(make_card, letters):
    rows = [example("good", text="a film"), example("b", 1, text="é")]
    encoder = replace(letters, answer_prefix="\nT:")
    context = build_context(make_card(input="i {text} o", choices=["good", "b"]), rows, encoder, "\n", None)
    assert pairs(context, encoder) == [
        ("<s>", 0),
        *[("i", 1), ("Ġ", 1), ("a", 2), ("Ġfilm", 2), ("Ġ", 1), ("o", 1), ("Ċ", 3), ("T", 3), (":", 3)],
        *[("Ġgood", 4), ("</s>", 4), ("Ċ", 0)],
        *[("i", 5), ("Ġ", 5), ("Ã", 6), ("©", 6), ("Ġ", 5), ("o", 5), ("Ċ", 7), ("T", 7), (":", 7)],
        *[("Ġ", 8), ("b", 8), ("</s>", 8), ("Ċ", 0)],
    ]
    assert encoder.tokenizer.decode(context.token_ids) == "<s>i a film o\nT: good</s>\ni é o\nT: b</s>\n"


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        # A token that overlaps the column is input, also if it starts in the template or ends in the prefix's space.
        ("task o{text}", "ne", [("task", 1), ("one", 2), (":", 3)]),
        ("{text}e task", "on", [("one", 2), ("task", 1), (":", 3)]),
        # An empty column does not change the types around it.
        ("task: {text}", "", [("task", 1), (":", 1), (":", 3)]),
        ("{text} task", "", [("task", 1), (":", 3)]),
        # The column contains words of the template.
        ("task {text}", "task : yes", [("task", 1), ("task", 2), (":", 2), ("yes", 2), (":", 3)]),
        ("{text} a {text}", "a", [("a", 2), ("a", 1), ("a", 2), (":", 3)]),
    ],
)
def test_types_at_the_borders(make_card, words, template, text, expected):
    card = make_card(input=template, empty_text="keep")
    encoder = replace(words, answer_prefix=":")
    context = build_context(card, [example(text=text)], encoder, "", None)
    assert pairs(context, encoder) == [("<s>", 0), *expected, ("good", 4), ("</s>", 4)]


def test_token_of_a_space_and_a_column_is_input(make_card, letters):
    context = build_context(make_card(input="i {text}"), [example(text="film a")], letters, "", None)
    assert pairs(context, letters)[1:5] == [("i", 1), ("Ġfilm", 2), ("Ġ", 2), ("a", 2)]


def test_answers_of_several_tokens(make_card, words):
    card = make_card(choices=["no good", "good"])
    context = build_context(card, [example("no good", text="a")], words, "", None)
    assert pairs(context, words)[-3:] == [("no", 4), ("good", 4), ("</s>", 4)]


def test_an_encoder_with_bos_gives_the_same_context(make_card, words):
    rows = [example(text="a film"), example(text="one")]
    assert build_context(make_card(), rows, replace(words, with_bos=True), "", None) == build_context(
        make_card(), rows, words, "", None
    )


def test_no_bos_where_the_tokenizer_adds_none(make_card, backbones):
    # The tokenizer only appends </s>, which is removed from inputs.
    encoder = replace(Encoder.from_backbone(backbones["seq2seq"], 20), family="causal")
    context = build_context(make_card(input="{text}"), [example(text="a film")], encoder, "", None)
    assert pairs(context, encoder) == [("a", 2), ("film", 2), ("good", 4), ("</s>", 4)]


def test_long_inputs_are_cut_like_rows(make_card, words):
    encoder, card = replace(words, max_input_length=6, answer_prefix="yes"), make_card(input="task {text} .")
    row = example(text="one two three four five six")
    context = build_context(card, [row], encoder, "", None)
    assert pairs(context, encoder)[1:7] == [
        *[("task", 1), ("one", 2), ("two", 2), ("three", 2), (".", 1), ("yes", 3)],
    ]
    assert context.token_ids[1:7] == next(encoder.encode(card, iter([row]), "train"))["input_ids"]


# Invalid input raises before training.


def test_budget(make_card, words):
    rows = [example(text="a film", row_id=n) for n in range(5)]  # task text : a film good </s>, and a separator
    card, length = make_card(), 1 + 5 * 8
    assert len(build_context(card, rows, words, ".", length).token_ids) == length
    with pytest.raises(
        ValueError,
        match=r"'film': got a context of 41 tokens for 5 examples, expected at most max_context_length=24, into which "
        r"the first 2 fit; lower `context_shots` or `max_input_length`, or raise `max_context_length`",
    ):
        build_context(card, rows, words, ".", 24)
    with pytest.raises(ValueError, match="the first 3 fit"):
        build_context(card, rows, words, ".", 25)


@pytest.mark.parametrize(("separator", "became"), [("\n", r"\[\]"), (" # ", r"\['<unk>'\]")])
def test_separator_that_cannot_be_written(make_card, words, separator, became):
    with pytest.raises(ValueError, match=rf"in `separator`, .*turns into {became}, .*set `separator` to .*\"\""):
        build_context(make_card(), [example(text="a")], words, separator, None)


def test_answer_prefix_that_cannot_be_written(make_card, words):
    with pytest.raises(ValueError, match=r"Got 'label:' in `answer_prefix`.*change `answer_prefix`"):
        build_context(make_card(), [example(text="a")], replace(words, answer_prefix="label:"), "", None)


def test_choice_that_cannot_be_written(make_card, words):
    # The context has no example of that class, but evaluation has its rows.
    with pytest.raises(ValueError, match=r"'film': got the choices 'very good', which becomes \['<unk>', 'good'\];"):
        build_context(make_card(choices=["good", "very good"]), [example(text="a")], words, "", None)


def test_slow_tokenizer(make_card, words, monkeypatch):
    monkeypatch.setattr(type(words.tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="got a slow tokenizer, expected a fast one"):
        build_context(make_card(), [example(text="a")], words, "", None)


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_encoder_decoder(film, stage):
    module = TaskDataModule(**film, context_shots=1)
    with pytest.raises(ValueError, match=r"expected a decoder-only one.*change `backbone`, or leave `context_shots`"):
        module.setup(stage)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_shots": 0}, "context_shots: got 0, expected a whole number at least 1 or null"),
        ({"context_shots": 1, "max_context_length": 0}, "max_context_length: got 0"),
        ({"context_shots": 1, "context_per": "row"}, "context_per: got 'row', expected one of class, task, balanced"),
        ({"context_shots": 1, "context_rows": "all"}, "context_rows: got 'all', expected one of train, apart"),
        (
            {"context_shots": 1, "k_shot": 2},
            "Got k_shot=2 with context_rows='train'.*unset `k_shot`, or set `context_r",
        ),
        ({"context_shots": 1, "max_train_rows": 2}, "Got max_train_rows=2 with context_rows='train'"),
    ],
)
def test_bad_options(film, options, message):
    with pytest.raises(ValueError, match=message):
        TaskDataModule(**film, **options)


# The DataModule


@pytest.fixture(params=["causal", "bytes"])
def kind(request):
    return request.param


@pytest.fixture
def make(film, backbones):
    """Return a function that builds a DataModule and runs its setup."""

    def make(kind="causal", stage="fit", **options):
        separator = "\n" if kind == "bytes" else "."
        arguments = {**film, "backbone": backbones[kind], "separator": separator, "answer_prefix": "yes:", **options}
        module = TaskDataModule(**arguments)
        module.setup(stage)
        return module

    return make


def train_rows(module):
    """Return `(input_ids, labels, context_examples)` of every training row, in the order of the batches."""
    rows = []
    for batch in module.train_dataloader():
        assert batch["context_examples"].dtype == torch.long
        assert batch["context_examples"].shape == batch["task_ids"].shape
        for number, place in enumerate(batch["context_examples"].tolist()):
            ids = batch["input_ids"][number][batch["attention_mask"][number].bool()].tolist()
            rows.append((ids, [label for label in batch["labels"][number].tolist() if label != -100], place))
    return rows


@pytest.mark.parametrize("group_by_length", [False, True])
def test_training_rows_are_the_examples_token_by_token(make, kind, group_by_length):
    module = make(kind, context_shots=5, batch_size=4, group_by_length=group_by_length, max_input_length=30)
    context, rows = module.context, train_rows(module)
    assert isinstance(context, Context)
    assert context.task == "film"
    assert module.num_train_rows == len(rows) == 10
    assert sorted(place for *_, place in rows) == list(range(10))
    found = spans(context, module.encoder)
    for ids, labels, place in rows:
        span, types = found[place]
        assert span == ids + labels
        assert types[len(ids) :] == [4] * len(labels)
        assert types[0] == 1
        assert types[len(ids) - 1] == 3
        assert 2 in types
        assert 4 not in types[: len(ids)]


def test_context_begins_with_bos_and_rows_do_not(make, kind):
    module = make(kind, context_shots=2)
    bos = module.tokenizer.bos_token_id
    assert module.context.token_ids[0] == bos
    assert module.context.token_ids.count(bos) == 1
    assert module.context.token_types[0] == 0
    evaluated = next(iter(module.val_dataloader()[0]))
    assert not (evaluated["input_ids"] == bos).any()
    assert not any(bos in ids for ids, *_ in train_rows(module))
    plain = make(kind)
    assert plain.context is None
    assert (next(iter(plain.val_dataloader()[0]))["input_ids"][:, 0] == bos).all()


def test_rows_end_with_the_answer_prefix(make):
    module = make("bytes", context_shots=2)
    batch = next(iter(module.val_dataloader()[0]))
    assert batch["texts"][0] == "task text: 0 film film yes:"
    assert module.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == batch["texts"]


def test_context_reads_as_its_rows(make):
    module = make("bytes", context_shots=2, seed=3)
    words = ["bad", "good"]
    digits = {n: " ".join(str(n)) for n in module.context.row_ids}
    text = "".join(f"task text: {digits[n]} film film yes: {words[n % 2]}</s>\n" for n in module.context.row_ids)
    assert module.tokenizer.decode(module.context.token_ids) == "<s>" + text


@pytest.mark.parametrize(("shots", "per", "counts"), [(3, "class", (3, 3)), (4, "balanced", (2, 2)), (5, "task", None)])
def test_draws(make, shots, per, counts):
    rows = make(context_shots=shots, context_per=per).context.row_ids
    classes = Counter(row % 2 for row in rows)
    assert len(set(rows)) == len(rows)
    assert len(rows) == 5 if counts is None else (classes[0], classes[1]) == counts


def test_order_follows_the_seed(make):
    first, again, other = (make(context_shots=4, seed=seed).context for seed in (1, 1, 2))
    assert first == again
    assert set(first.row_ids) != set(other.row_ids)
    # With the whole split, both seeds draw the same rows in another order.
    whole = [make(context_shots=20, seed=seed).context.row_ids for seed in range(4)]
    assert all(sorted(rows) == list(range(40)) for rows in whole)
    assert len({tuple(rows) for rows in whole}) == 4
    assert whole[0] != sorted(whole[0])


def test_classes_are_shuffled(make):
    changes = []
    for seed in range(5):
        classes = [row % 2 for row in make(context_shots=6, seed=seed).context.row_ids]
        changes.append(sum(a != b for a, b in pairwise(classes)))
    assert 1 < sum(changes) / 5 < 11
    assert len(set(changes)) > 1


@pytest.mark.parametrize("options", [{}, {"k_shot": 6}, {"max_train_rows": 9}, {"k_shot": 8, "max_train_rows": 5}])
def test_rows_apart_from_the_context(make, options):
    module = make(context_shots=5, context_rows="apart", **options)
    trained = module._rows("train")[0]["row_id"][:]
    assert not set(trained) & set(module.context.row_ids)
    classes = Counter(row % 2 for row in trained)
    expected = {(): 30, ("k_shot",): 12, ("max_train_rows",): 9, ("k_shot", "max_train_rows"): 5}[tuple(options)]
    assert len(set(trained)) == expected
    if options == {"k_shot": 6}:
        assert classes == {0: 6, 1: 6}
    rows = train_rows(module)
    assert [place for *_, place in rows] == [-1] * expected
    assert module.context == make(context_shots=5).context


def test_too_few_rows(make, write_split):
    write_split([{"text": "a", "label": 1}] * 6 + [{"text": "b", "label": 0}] * 3)
    with pytest.raises(
        ValueError,
        match=r"got context_shots=4, which needs 4 .*'bad' has only 3; lower `context_shots` or set `context_p",
    ):
        make(context_shots=4)
    with pytest.raises(
        ValueError, match=r"got k_shot=2, .*'bad' has only 1 beside the rows of context_shots; lower `k_shot`"
    ):
        make(context_shots=2, context_rows="apart", k_shot=2)
    with pytest.raises(
        ValueError, match=r"got context_shots=9, after which none of the 9 training rows is left, expected"
    ):
        make(context_shots=9, context_per="task", context_rows="apart")


def test_empty_class(make, write_split):
    write_split([{"text": "a", "label": 1}] * 6)
    with pytest.raises(ValueError, match=r"context_shots=1, which needs 1 .*class 'bad' has only 0"):
        make(context_shots=1)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_context_in_every_stage(make, stage):
    module = make(stage=stage, context_shots=3)
    assert module.context == make(context_shots=3).context
    with pytest.raises(ValueError, match="Got no 'train' rows"):
        module.train_dataloader()


def test_context_needs_setup(film):
    with pytest.raises(ValueError, match=r"Got no context yet.*call `setup` first"):
        _ = TaskDataModule(**film, context_shots=1).context


def test_several_tasks_have_no_context(film):
    film.pop("card")
    module = MultitaskDataModule(["glue/sst2", "sick"], **film, answer_prefix="yes:")
    assert module.context is None
    assert module.encoder.answer_prefix == "yes:"


def test_rows_that_share_a_row_id(make, make_card):
    # One raw row may become several rows, so `context_examples` are positions and not row ids.
    card = make_card(preprocess=f"{__name__}.twice")
    module = make(card=card, context_shots=2, seed=1)
    found = spans(module.context, module.encoder)
    rows = train_rows(module)
    assert sorted(place for *_, place in rows) == list(range(4))
    assert all(found[place][0] == ids + labels for ids, labels, place in rows)


def twice(row, split):
    return [row, {**row, "label": 1 - row["label"]}]


def test_no_key_without_a_context(make):
    assert "context_examples" not in next(iter(make().train_dataloader()))
    module = make(context_shots=2, predict_split="train", stage="predict")
    assert "context_examples" not in next(iter(module.predict_dataloader()[0]))


def test_options_are_saved(film):
    options = {"context_shots": 2, "context_rows": "apart", "separator": "", "answer_prefix": "yes", "k_shot": 3}
    saved = dict(load_task(film.pop("card"), **film, **options).hparams)
    assert options.items() <= saved.items()


class Nothing(L.LightningModule):
    """A module without a loss that stores its batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["input_ids"].tolist(), batch["context_examples"].tolist()))
        return self.weight * 0

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.context = self.trainer.datamodule.context

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_trainer_and_resumed(film, backbones, tmp_path, workers):
    def run(limit, ckpt_path=None):
        data = TaskDataModule(
            **{**film, "backbone": backbones["causal"]}, context_shots=10, separator=".", num_workers=workers
        )
        model = Nothing()
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, max_steps=limit, enable_checkpointing=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(model, data, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{limit}.ckpt")
        trainer.validate(model, data, verbose=False)
        assert len(model.context.row_ids) == 20
        return model.seen

    whole = run(5)
    assert run(2) == whole[:2]
    assert run(5, tmp_path / "2.ckpt") == whole[2:]
    assert sorted(place for _, places in whole[:3] for place in places) == list(range(20))
