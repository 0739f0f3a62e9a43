"""Several processes have disjoint training rows, evaluate each row once, and share one cache."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from processes import launch

from mpt_lightning.data import MultitaskDataModule, TaskDataModule
from mpt_lightning.data.card import TaskCard


class Recorder(L.LightningModule):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "val": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch["input_ids"].tolist())
        return self.weight * 0

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen["val"] += batch["row_ids"]

    def on_fit_end(self):
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(self.seen))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(kind, card, again, options, folder):
    """Train for an epoch on one of two ranks."""
    if kind == "task":
        data = TaskDataModule(TaskCard(**card), **options)
    else:
        data = MultitaskDataModule([TaskCard(**card), TaskCard(**again)], **options)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        num_sanity_val_steps=0,
    )
    trainer.fit(Recorder(Path(folder)), data)


@pytest.mark.parametrize("kind", ["task", "multitask"])
def test_ranks_share_the_rows(film, film_rows, make_card, write_split, tmp_path, kind):
    # Texts of up to three words with different numbers, so that no two rows have the same ids.
    digits = ["one", "two", "three", "four"]
    rows = [{"text": f"{digits[n % 4]} {digits[n // 4 % 4]} {digits[n // 16]}", "label": n % 2} for n in range(40)]
    write_split(rows)
    if kind == "multitask":
        write_split(rows, task="again")
        for split in ("validation", "test"):
            write_split(film_rows(1), task="again", split=split)
    again = make_card(name="again", path="x/again", input="again {text}")
    options = {key: value for key, value in film.items() if key != "card"} | {"batch_size": 4}
    launch(train, kind, asdict(film["card"]), asdict(again), options, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    expected = {"task": 5, "multitask": 10}[kind]
    assert len(first["train"]) == len(second["train"]) == expected
    # Rows are compared without padding, which differs between batches.
    steps = [[[i for i in row if i] for row in [*a, *b]] for a, b in zip(first["train"], second["train"], strict=True)]
    if kind == "task":
        assert len({tuple(row) for step in steps for row in step}) == 40
    for step in steps:
        assert len({tuple(row) for row in step}) == len(step) == 8
    # Seven rows, or seven and one; one rank has no row of the second task.
    whole = [*range(7), 0] if kind == "multitask" else [*range(7)]
    assert sorted(first["val"] + second["val"]) == sorted(whole)


def prepare(card, options, folder):
    """Prepare the data on one of several machines that share a cache."""
    Path(folder, f"ready{os.environ['RANK']}").touch()
    while len(list(Path(folder).glob("ready*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.001)
    data = TaskDataModule(TaskCard(**card), **options)
    data.prepare_data()
    data.setup("fit")
    rows = [batch["input_ids"].tolist() for batch in [*data.train_dataloader(), *data.val_dataloader()[0]]]
    Path(folder, f"rows{os.environ['RANK']}.json").write_text(json.dumps(rows))


def test_machines_fill_one_cache_at_once(film, tmp_path):
    options = {key: value for key, value in film.items() if key != "card"}
    launch(prepare, asdict(film["card"]), options, str(tmp_path), ranks=3)
    rows = [json.loads((tmp_path / f"rows{rank}.json").read_text()) for rank in range(3)]
    assert rows[0] == rows[1] == rows[2]
    assert sum(map(len, rows[0])) == 47
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
