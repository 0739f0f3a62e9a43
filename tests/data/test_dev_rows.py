"""Rows of the training split that replace the validation rows (`dev_shot`)."""

from collections import Counter
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
import yaml

from mpt_lightning.data import MultitaskDataModule, TaskDataModule
from mpt_lightning.resources import packaged, packaged_names

SPLITS = ("train", "validation")


def rows_of(module, split, column="row_id"):
    """Return a column of each task's rows."""
    return [rows[column][:] for rows in module._rows(split)]


def both(module):
    """Return the ids of the training and of the dev rows of a DataModule with one task."""
    return [rows_of(module, split)[0] for split in SPLITS]


@pytest.fixture
def make(film):
    """Return a function that builds a DataModule of one task and runs its setup."""

    def make(stage="fit", **options):
        module = TaskDataModule(**{**film, **options})
        module.setup(stage)
        return module

    return make


def test_exact_rows(make):
    train, dev = both(make(k_shot=4, dev_shot=3, seed=1))
    assert train == [0, 6, 7, 9, 17, 22, 23, 28]
    assert dev == [2, 11, 15, 34, 36, 37]


@pytest.mark.parametrize(("shots_per", "counts"), [("class", {0: 6, 1: 6}), ("balanced", {0: 3, 1: 3}), ("task", None)])
def test_dev_rows_are_other_rows_than_those_of_k_shot(make, shots_per, counts):
    module = make(k_shot=5, shots_per=shots_per, dev_shot=6)
    train, dev = both(module)
    assert train == rows_of(make(k_shot=5, shots_per=shots_per), "train")[0]
    assert not set(train) & set(dev)
    assert len(set(dev)) == len(dev) == (12 if shots_per == "class" else 6)
    if counts:
        assert Counter(row % 2 for row in dev) == counts
    evaluated = [row for batch in module.val_dataloader()[0] for row in batch["row_ids"]]
    trained = [row for batch in module.train_dataloader() for row in batch["row_ids"]]
    assert (evaluated, sorted(trained)) == (dev, train)


def test_draws_follow_the_seed_and_grow(make):
    first, same, other = (both(make(k_shot=4, dev_shot=4, seed=seed)) for seed in (1, 1, 2))
    assert first == same
    assert all(a != b for a, b in zip(first, other, strict=True))
    train, more = both(make(k_shot=4, dev_shot=8, seed=1))
    assert train == first[0]
    assert set(first[1]) < set(more)


@pytest.mark.parametrize("most", [None, 9])
def test_without_k_shot_training_has_the_other_rows(make, most):
    train, dev = both(make(dev_shot=4, max_train_rows=most, seed=3))
    assert Counter(row % 2 for row in dev) == {0: 4, 1: 4}
    assert dev == both(make(dev_shot=4, seed=3))[1]
    others = set(range(40)) - set(dev)
    assert set(train) <= others
    assert len(train) == (most or len(others))


@pytest.mark.parametrize("options", [{}, {"k_shot": 5}, {"max_train_rows": 7}, {"context_rows": "train"}])
def test_beside_a_context(make, backbones, options):
    context = {"backbone": backbones["causal"], "separator": ".", "context_shots": 4, "context_rows": "apart"}
    module = make(**{**context, **options}, dev_shot=3)
    train, dev = both(module)
    shots = sorted(module.context.row_ids)
    plain = make(**{**context, **options})
    assert module.context == plain.context
    assert Counter(row % 2 for row in dev) == {0: 3, 1: 3}
    assert not set(dev) & {*shots, *train}
    if options == {"context_rows": "train"}:
        assert train == shots
    elif "k_shot" in options:
        assert train == rows_of(plain, "train")[0]
    else:
        assert set(train) <= set(range(40)) - {*shots, *dev}
        assert len(train) == options.get("max_train_rows", 26)
    assert not set(train) & set(shots) or "context_rows" in options


@pytest.mark.parametrize("per", ["class", "task", "balanced"])
def test_training_on_a_context_has_the_rows_of_k_shot(make, backbones, per):
    context = {"backbone": backbones["causal"], "separator": ".", "context_shots": 5, "context_per": per}
    assert both(make(**context, dev_shot=4)) == both(make(k_shot=5, shots_per=per, dev_shot=4))


@pytest.mark.parametrize("k_shot", [4, None])
def test_each_of_several_tasks_has_its_own(film, make_card, write_split, k_shot):
    write_split([{"text": "a film", "score": n % 6} for n in range(16)], task="stars")
    stars = make_card(
        name="stars", path="someone/stars", label="score", choices=None, value_range=(0, 5), metrics=["pearson"]
    )
    rest = {key: value for key, value in film.items() if key != "card"}
    module = MultitaskDataModule([film["card"], stars], **rest, k_shot=k_shot, dev_shot=3)
    module.setup("fit")
    sizes = {split: [len(rows) for rows in rows_of(module, split)] for split in SPLITS}
    assert sizes == {"train": [8, 4] if k_shot else [34, 13], "validation": [6, 3]}
    for train, dev in zip(*(rows_of(module, split) for split in SPLITS), strict=True):
        assert not set(train) & set(dev)
    first, second = (next(iter(loader)) for loader in module.val_dataloader())
    assert [set(batch["task_ids"].tolist()) for batch in (first, second)] == [{0}, {1}]


@pytest.mark.parametrize("k_shot", [4, None])
@pytest.mark.parametrize("shots_per", ["class", "task"])
def test_groups_are_not_in_both(make, make_card, write_split, k_shot, shots_per):
    write_split([{"text": "a", "label": n % 2, "question": f"q{n // 5}"} for n in range(60)])
    module = make(card=make_card(group="question", metrics=["multirc"]), k_shot=k_shot, shots_per=shots_per, dev_shot=4)
    train, dev = (set(rows_of(module, split, "group")[0]) for split in SPLITS)
    assert not train & dev
    assert k_shot or len(train) == 12 - len(dev)


def answers(row, split):
    """Make one training row of each answer, but one evaluation row of all."""
    texts = row["text"].split()
    return [{**row, "answer": text} for text in texts] if split == "train" else [{**row, "answer": texts}]


@pytest.mark.parametrize("k_shot", [4, None])
def test_dev_rows_have_all_references_and_own_raw_rows(make, make_card, write_split, k_shot):
    write_split([{"text": "one two three"}] * 12)
    card = make_card(choices=None, metrics=["squad"], label="answer", preprocess=f"{__name__}.answers")
    module = make(card=card, k_shot=k_shot, dev_shot=4)
    train, dev = both(module)
    assert not set(train) & set(dev)
    assert len(set(dev)) == 4
    assert len(train) == (k_shot or 3 * 8)
    assert rows_of(module, "validation", "references")[0] == [["one", "two", "three"]] * 4


def test_held_out_rows_are_not_dev_rows(make, make_card):
    card = make_card(split_rule="held_out")
    (held_out,) = rows_of(make("validate", card=card), "validation")
    train, dev = both(make(card=card, dev_shot=5))
    assert len(held_out) == 4
    assert sorted([*train, *dev, *held_out]) == list(range(40))


@pytest.mark.parametrize("k_shot", [4, None])
@pytest.mark.parametrize("rule", ["given", "halved", "held_out"])
def test_validation_file_is_not_opened(film, make_card, make, tmp_path, rule, k_shot):
    (tmp_path / "data" / "film" / "validation.jsonl").unlink()
    for stage in ("fit", "validate"):
        module = make(stage, card=make_card(split_rule=rule), k_shot=k_shot, dev_shot=4)
        assert len(rows_of(module, "validation")[0]) == 8
    with pytest.raises(ValueError, match=r"no file for split 'validation'"):
        make(card=make_card(split_rule="given"), k_shot=k_shot)


def test_card_without_a_validation_split(make, make_card):
    assert len(both(make(card=make_card(splits={"train": "train"}), k_shot=4, dev_shot=4))[1]) == 8


def test_test_rows_stay(make, make_card):
    card = make_card(split_rule="halved")
    options = {"card": card, "max_eval_rows": 3}
    plain = rows_of(make("test", **options), "test")
    assert rows_of(make("test", **options, k_shot=4, dev_shot=4), "test") == plain
    # `max_eval_rows` is the most of the test rows, not of the dev rows.
    assert len(rows_of(make("validate", **options, dev_shot=4), "validation")[0]) == 8


def test_predictions_on_the_validation_split_are_of_dev_rows(make):
    options = {"k_shot": 4, "dev_shot": 4}
    module = make("predict", **options, predict_split="validation")
    assert rows_of(module, "validation")[0] == both(make(**options))[1]


def test_a_cache_with_the_validation_rows_is_not_used(make):
    plain = rows_of(make(k_shot=4), "validation")
    first = both(make(k_shot=4, dev_shot=4))
    assert both(make(k_shot=4, dev_shot=4)) == first
    assert rows_of(make(k_shot=4), "validation") == plain == [list(range(7))]
    assert both(make(k_shot=4, dev_shot=3))[1] != first[1]


# Invalid input


def test_too_few_rows(make, write_split, backbones):
    write_split([{"text": "a", "label": 1}] * 8 + [{"text": "b", "label": 0}] * 5)
    with pytest.raises(
        ValueError,
        match=r"'film': got dev_shot=2, which needs 2 training rows, but class 'bad' has only 1 beside the rows of "
        r"k_shot; lower `dev_shot` or set `shots_per: task`",
    ):
        make(k_shot=4, dev_shot=2)
    with pytest.raises(ValueError, match=r"got dev_shot=6, .*class 'bad' has only 5; lower `dev_shot` or set"):
        make(dev_shot=6)
    with pytest.raises(
        ValueError, match=r"got dev_shot=13, after which none of the 13 training rows is left, expected"
    ):
        make(dev_shot=13, shots_per="task")
    options = {"backbone": backbones["causal"], "separator": ".", "context_shots": 2, "context_rows": "apart"}
    with pytest.raises(
        ValueError, match=r"dev_shot=3, .*'bad' has only 2 beside the rows of context_shots and k_shot;"
    ):
        make(**options, k_shot=1, dev_shot=3)
    with pytest.raises(
        ValueError, match=r"got context_shots=2 and dev_shot=9, after which .* lower `context_shots` or `dev_shot`"
    ):
        make(**options, dev_shot=9, shots_per="task")


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4"])
def test_bad_value(make, value):
    with pytest.raises(ValueError, match=r"dev_shot: got .*, expected a whole number at least 1 or null"):
        make(dev_shot=value)


def test_option_is_saved(make):
    assert make(k_shot=4, dev_shot=3).hparams["dev_shot"] == 3


# In a Trainer


class Recorder(L.LightningModule):
    """A module without a loss that stores the row ids of its batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "val": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch["row_ids"])
        return self.weight * 0

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen["val"] += batch["row_ids"]

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen["test"] += batch["row_ids"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("k_shot", [6, None])
def test_fit_resume_and_test_without_a_validation_file(film, tmp_path, k_shot):
    (tmp_path / "data" / "film" / "validation.jsonl").unlink()

    def run(steps, path=None):
        data, model = TaskDataModule(**film, k_shot=k_shot, dev_shot=3), Recorder()
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, num_sanity_val_steps=0, max_steps=steps, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, data, ckpt_path=path)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return trainer, data, model

    trainer, data, model = run(6)
    train, dev = both(data)
    assert {row for rows in model.seen["train"] for row in rows} == set(train)
    assert set(model.seen["val"]) == set(dev)
    *_, first = run(1)
    *_, resumed = run(6, tmp_path / "1.ckpt")
    assert first.seen["train"] + resumed.seen["train"] == model.seen["train"]
    assert set(resumed.seen["val"]) == set(dev)
    again = Recorder()
    trainer.validate(again, data, verbose=False)
    trainer.test(again, data, verbose=False)
    assert again.seen["val"] == dev
    assert again.seen["test"] == list(range(7))


def test_ranks_share_the_dev_rows(film):
    seen = {split: [] for split in SPLITS}
    for rank in range(2):
        module = TaskDataModule(**film, k_shot=6, dev_shot=3)
        module.trainer = SimpleNamespace(
            lightning_module=None, limit_val_batches=1, world_size=2, global_rank=rank, strategy=None
        )
        module.setup("fit")
        for split, loader in (("train", module.train_dataloader()), ("validation", module.val_dataloader()[0])):
            seen[split] += [row for batch in loader for row in batch["row_ids"]]
    assert {split: sorted(rows) for split, rows in seen.items()} == dict(zip(SPLITS, both(module), strict=True))


# Recipes


def data_of(recipe):
    return (yaml.safe_load(packaged("configs", recipe).read_text()).get("data") or {}).get("init_args", {})


RECIPES = [name for name in packaged_names("configs") if not name.startswith(("demo/", "compare/"))]
SHOTS = {name: data.get("k_shot") or data.get("context_shots") for name in RECIPES if (data := data_of(name))}


def test_every_few_shot_recipe_has_as_many_dev_rows():
    few = {name: shots for name, shots in SHOTS.items() if shots}
    assert len(few) >= 20
    assert {name: data_of(name).get("dev_shot") for name in few} == few
    assert not any("dev_shot" in data_of(name) for name in SHOTS if name not in few)
