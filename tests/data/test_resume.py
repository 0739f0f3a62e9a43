"""A run that is stopped and resumed equals a whole run bit for bit, wherever its checkpoint was saved."""

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mpt_lightning.data import MultitaskDataModule, TaskDataModule


class Learner(L.LightningModule):
    """A module whose weight depends on every row and on their order."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        rows = batch["input_ids"].double()
        self.seen.append((self.trainer.current_epoch, batch_idx, batch["input_ids"].tolist()))
        return (self.weight * rows.mean() - batch["task_ids"].double().mean()) ** 2

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def on_validation_epoch_end(self):
        self.log("val", 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


@pytest.fixture
def fit(film, make_card, write_split, tmp_path):
    def fit(kind, workers=0, ckpt_path=None, callbacks=(), **options):
        if kind == "task":
            data = TaskDataModule(**film, num_workers=workers, group_by_length=True)
        else:
            rest = {key: value for key, value in film.items() if key != "card"}
            cards = [film["card"], make_card(name="again")]
            data = MultitaskDataModule(cards, **{**rest, "batch_size": 16}, num_workers=workers)
        model = Learner()
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=list(callbacks),
            enable_checkpointing=bool(callbacks),
            **options,
        )
        trainer.fit(model, data, ckpt_path=ckpt_path)
        return model

    return fit


def saver(tmp_path, when):
    return ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, **CHECKPOINTS[when])


def steps_done(path):
    return int(path.stem.split("=")[1].split("-")[0])


def check_resume(path, whole, resumed):
    assert [rows for _, _, rows in resumed.seen] == [rows for _, _, rows in whole.seen[steps_done(path) :]]
    assert [epoch for epoch, _, _ in resumed.seen] == [epoch for epoch, _, _ in whole.seen[steps_done(path) :]]
    assert torch.equal(resumed.weight, whole.weight)


CHECKPOINTS = {
    "mid-epoch": {"every_n_train_steps": 3},
    "last batch of an epoch": {"every_n_train_steps": 5},
    "end of an epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "validation": {"monitor": "val", "save_on_train_epoch_end": False},
}


@pytest.mark.parametrize("kind", ["task", "multitask"])
@pytest.mark.parametrize("when", CHECKPOINTS)
@pytest.mark.parametrize("interval", [None, 2])
def test_resume_is_exact(fit, tmp_path, kind, when, interval):
    options = {"max_epochs": 3, "val_check_interval": interval}
    whole = fit(kind, callbacks=[saver(tmp_path, when)], **options)
    assert len(whole.seen) == 15
    saved = sorted((tmp_path / "saved").glob("*.ckpt"))
    assert len(saved) >= 2
    for path in saved:
        check_resume(path, whole, fit(kind, ckpt_path=path, **options))


@pytest.mark.parametrize("when", ["mid-epoch", "end of an epoch"])
def test_resume_is_exact_with_workers_that_read_ahead(fit, tmp_path, when):
    whole = fit("task", 2, callbacks=[saver(tmp_path, when)], max_epochs=3)
    path = min((tmp_path / "saved").glob("*.ckpt"), key=steps_done)
    check_resume(path, whole, fit("task", 2, ckpt_path=path, max_epochs=3))


def test_resume_in_mid_epoch_needs_the_same_batches(fit, film, tmp_path):
    fit("task", callbacks=[saver(tmp_path, "mid-epoch")], max_epochs=1)
    film["batch_size"] = 4
    with pytest.raises(ValueError, match=r"Got batches of 4 rows over all devices, expected 8 as in the checkpoint"):
        fit("task", ckpt_path=tmp_path / "saved" / "step=3.ckpt", max_epochs=1)


def test_resume_after_epochs_that_a_limit_cut_short(fit, tmp_path):
    options = {"max_epochs": 3, "limit_train_batches": 3}
    whole = fit("task", callbacks=[saver(tmp_path, "end of an epoch")], **options)
    saved = list((tmp_path / "saved").glob("*.ckpt"))
    assert len(saved) == 3
    for path in saved:
        check_resume(path, whole, fit("task", ckpt_path=path, **options))
