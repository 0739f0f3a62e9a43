"""Batches of both DataModules, alone and in a Trainer."""

from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
import yaml

from mpt_lightning.data import MultitaskDataModule, TaskDataModule, load_task


@pytest.fixture
def two_tasks(film, make_card, write_split):
    """Return arguments of a MultitaskDataModule with `film` and a numeric task."""
    rows = [{"text": "a film", "score": n % 6} for n in range(16)]
    for split in ("train", "validation", "test"):
        write_split(rows, task="stars", split=split)
    stars = make_card(
        name="stars", path="someone/stars", label="score", choices=None, value_range=(0, 5), metrics=["pearson"]
    )
    return {**{key: value for key, value in film.items() if key != "card"}, "tasks": [film["card"], stars]}


def test_training_batch(film):
    module = TaskDataModule(**film)
    assert module.tasks == ["film"]
    module.setup("fit")
    assert module.num_train_rows == 40
    batches = list(module.train_dataloader())
    assert len(batches) == 5
    rows: list[int] = []
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "labels", "task_ids", "row_ids"}
        rows += batch.pop("row_ids")
        assert all(value.dtype == torch.long for value in batch.values())
        lengths = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape == (8, lengths.max())
        assert torch.equal(batch["input_ids"] == 0, batch["attention_mask"] == 0)
        assert torch.equal(batch["input_ids"].gather(1, lengths[:, None] - 1), torch.ones(8, 1).long())
        assert batch["labels"].shape == (8, 2)
        assert batch["task_ids"].tolist() == [0] * 8
    assert sorted(rows) == list(range(40))


def test_evaluation_batch(film):
    module = TaskDataModule(**film, eval_batch_size=4)
    module.setup("validate")
    (loader,) = module.val_dataloader()
    first, last = list(loader)
    assert (first["row_ids"], last["row_ids"]) == ([0, 1, 2, 3], [4, 5, 6])
    assert last["texts"] == ["task text: 4 film film", "task text: 5 film film", "task text: 6 film film"]
    assert last["references"] == [["bad"], ["good"], ["bad"]]
    assert last["groups"] == [""] * 3
    assert last["choices"].shape == (3, 2, 2)
    assert module.tokenizer.batch_decode(last["choices"][0], skip_special_tokens=True) == ["bad", "good"]


def test_choices_of_unequal_length_are_padded(film, make_card):
    film["card"] = make_card(choices=["not good", "good"])
    module = TaskDataModule(**film)
    module.setup("validate")
    choices = next(iter(module.val_dataloader()[0]))["choices"]
    assert choices.shape == (7, 2, 3)
    assert choices[0, 1].tolist()[-1] == -100


def test_every_epoch_has_every_row_in_another_order(film):
    module = TaskDataModule(**film)
    module.setup("fit")
    loader = module.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append([int(row) for row in loader.sampler])
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))


def test_grouping_by_length_pads_less(film, write_split):
    write_split([{"text": " ".join(["film"] * (1 + n * 7 % 39)), "label": n % 2} for n in range(400)])

    def padding(**options):
        module = TaskDataModule(**film, **options)
        module.setup("fit")
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in module.train_dataloader())

    assert padding(group_by_length=True) < 0.2 * padding()


def test_batch_smaller_than_the_batch_size(film):
    module = TaskDataModule(**film, k_shot=2)
    module.setup("fit")
    assert [len(batch["labels"]) for batch in module.train_dataloader()] == [4]


def test_multitask_batches_and_loaders(two_tasks):
    module = MultitaskDataModule(**two_tasks, sampling="all")
    assert module.tasks == ["film", "stars"]
    module.setup("fit")
    assert module.num_train_rows == 56
    batches = list(module.train_dataloader())
    assert len(batches) == 7
    for batch in batches:
        assert batch["task_ids"].bincount().tolist() == [4, 4]
        decoded = module.tokenizer.batch_decode(batch["labels"].clamp(min=0), skip_special_tokens=True)
        for task, label in zip(batch["task_ids"].tolist(), decoded, strict=True):
            assert (label in ("bad", "good")) == (task == 0)
    film_batch, stars_batch = (next(iter(loader)) for loader in module.val_dataloader())
    assert "choices" in film_batch
    assert "choices" not in stars_batch
    assert set(stars_batch["task_ids"].tolist()) == {1}


def test_splits_follow_the_stage(film):
    module = TaskDataModule(**film)
    module.setup("test")
    assert len(list(module.test_dataloader()[0])) == 1
    with pytest.raises(ValueError, match="Got no 'train' rows, expected them to be loaded; call `setup` first"):
        module.train_dataloader()
    module.predict_split = "validation"
    module.setup("predict")
    assert len(module.predict_dataloader()) == 1


def test_missing_test_split_raises(film, make_card):
    film["card"] = make_card(splits={"train": "train", "validation": "validation"})
    module = TaskDataModule(**film)
    module.setup("fit")
    with pytest.raises(ValueError, match=r"'film': got no 'test' split"):
        module.setup("test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0, expected a whole number at least 1"),
        ({"k_shot": 0}, "k_shot: got 0, expected a whole number"),
        ({"max_input_length": -1}, "max_input_length: got -1"),
        ({"shots_per": "row"}, "shots_per: got 'row', expected one of class, task, balanced"),
        ({"predict_split": "dev"}, "predict_split: got 'dev'"),
    ],
)
def test_bad_option(film, options, message):
    with pytest.raises(ValueError, match=message):
        TaskDataModule(**{**film, **options})


def test_bad_multitask_options(two_tasks):
    with pytest.raises(ValueError, match=r"Got tasks \['film', 'film'\], expected one or more different names"):
        MultitaskDataModule(**{**two_tasks, "tasks": two_tasks["tasks"][:1] * 2})
    with pytest.raises(ValueError, match="Got group_by_length=True for several tasks"):
        MultitaskDataModule(**two_tasks, group_by_length=True)
    with pytest.raises(ValueError, match="kappa: got 1"):
        MultitaskDataModule(**two_tasks, kappa=1)


def test_backbone_comes_from_the_module(film):
    backbone = film.pop("backbone")
    module = TaskDataModule(**film)
    with pytest.raises(ValueError, match="Got no backbone to take the tokenizer from"):
        module.setup("fit")
    module.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(hparams={"backbone": backbone}),
        limit_val_batches=0,
        world_size=1,
        global_rank=0,
    )
    module.setup("fit")
    assert module.num_train_rows == 40


def test_hyperparameters_are_plain(two_tasks, film, tmp_path):
    for module in (MultitaskDataModule(**two_tasks, kappa=2), TaskDataModule(**film)):
        torch.save(dict(module.hparams), tmp_path / "hparams.pt")
        saved = torch.load(tmp_path / "hparams.pt", weights_only=True)
        assert type(module)(
            **{**saved, **({"card": film["card"]} if "card" in saved else {"tasks": two_tasks["tasks"]})}
        )
    assert saved["card"]["name"] == "film"


def test_load_task_reads_options_of_the_file(film, tmp_path):
    file = tmp_path / "film.yaml"
    card = {
        "name": "film",
        "path": "someone/film",
        "input": "{text}",
        "metrics": ["accuracy"],
        "choices": ["bad", "good"],
    }
    file.write_text(yaml.safe_dump({"init_args": {"card": card, "batch_size": 5, "max_input_length": 20}}))
    module = load_task(file, backbone=film["backbone"], max_input_length=30)
    assert (module.tasks, module.batch_size, module.max_input_length) == (["film"], 5, 30)
    assert TaskDataModule(str(file)).batch_size == 32


class Recorder(L.LightningModule):
    """A module without a loss that stores its batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch["input_ids"].tolist())
        return self.weight * 0

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen["val"].append((dataloader_idx, batch["row_ids"]))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen["test"].append((dataloader_idx, batch["row_ids"]))

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen["predict"].append((dataloader_idx, batch["row_ids"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path, **options):
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "max_epochs": 1,
            **options,
        }
    )


def test_all_stages_in_a_trainer(two_tasks, tmp_path):
    module, data = Recorder(), MultitaskDataModule(**two_tasks)
    run = trainer(tmp_path, num_sanity_val_steps=0)
    run.fit(module, data)
    run.test(module, data, verbose=False)
    run.predict(module, data)
    assert len(module.seen["train"]) == 7
    expected = [(0, list(range(7))), (1, list(range(8))), (1, list(range(8, 16)))]
    assert module.seen["val"] == module.seen["test"] == module.seen["predict"] == expected


def test_validation_is_not_loaded_when_disabled(film, make_card, tmp_path):
    film["card"] = make_card(splits={"train": "train"})
    trainer(tmp_path, limit_val_batches=0).fit(Recorder(), TaskDataModule(**film))
    with pytest.raises(ValueError, match="got no 'validation' split"):
        trainer(tmp_path).fit(Recorder(), TaskDataModule(**film))


def test_workers_give_the_same_batches(film):
    seen = []
    for workers in (0, 2):
        module = TaskDataModule(**film, num_workers=workers)
        module.setup("fit")
        seen.append([batch["input_ids"].tolist() for batch in module.train_dataloader()])
    assert seen[0] == seen[1]


def test_overfitting_one_batch(film, tmp_path):
    model = Recorder()
    trainer(tmp_path, overfit_batches=1, max_epochs=3, limit_val_batches=0).fit(model, TaskDataModule(**film))
    assert len(model.seen["train"]) == 3
    assert model.seen["train"][0] == model.seen["train"][2]
