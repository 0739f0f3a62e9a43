"""Batches of any DataModule are checked before they are used."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from mpt_lightning import PromptTuning
from mpt_lightning.data.card import TaskCard
from mpt_lightning.modules.batch import check_batch, task_of_loader
from tests.conftest import make_batch
from tests.modules.conftest import TASKS, AnyData

MakeTrainer = Callable[..., L.Trainer]


def test_a_valid_batch_is_unchanged() -> None:
    batch = make_batch() | {"choices": torch.ones(5, 2, 3, dtype=torch.long), "texts": ["a"] * 5}
    checked = check_batch(batch, TASKS)
    assert checked.keys() == batch.keys()
    assert all(checked[key] is value for key, value in batch.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_ids": None}, r"got no task_ids, expected input_ids, .*task_ids \(there are 3 tasks: one, two, three\)"),
        (
            {"labels": None, "input_ids": None},
            "got no input_ids, labels, expected input_ids, attention_mask",
        ),
        ({"input_ids": [[1, 2]]}, r"got input_ids as a list, expected a tensor input_ids \[B, L\]"),
        ({"labels": torch.ones(5, 2)}, r"got labels of torch.float32, expected integers labels \[B, M\]"),
        ({"labels": torch.ones(5, dtype=int)}, r"got labels \[5\], expected labels \[B, M\] with B=5"),
        ({"labels": torch.ones(4, 2, dtype=int)}, r"got labels \[4, 2\], expected labels \[B, M\] with B=5"),
        ({"attention_mask": torch.ones(5, 6)}, r"got attention_mask \[5, 6\], .* \[B, L\] with B=5, L=7"),
        ({"task_ids": torch.zeros(5, 1, dtype=int)}, r"got task_ids \[5, 1\], expected task_ids \[B\] with B=5"),
        ({"task_ids": torch.tensor([0, 1, 2, 3, 0])}, "got the task id 3, expected 0 to 2, places in one, two, three"),
        ({"task_ids": torch.tensor([0, -1, 2, 0, 0])}, "got the task id -1, expected 0 to 2"),
        ({"choices": torch.ones(5, 2, dtype=int)}, r"got choices \[5, 2\], expected choices \[B, C, K\] with B=5"),
    ],
)
def test_wrong_batches_raise(change: dict[str, Any], message: str) -> None:
    batch = {key: value for key, value in (make_batch() | change).items() if value is not None}
    with pytest.raises(ValueError, match=rf"The batch: {message}.* Change the DataModule; .*check_batch. describes"):
        check_batch(batch, TASKS)


def test_objects_other_than_batches_raise() -> None:
    with pytest.raises(ValueError, match="The batch: got a list, expected a mapping"):
        check_batch([make_batch()], TASKS)


def test_a_single_task_needs_no_task_ids() -> None:
    batch = make_batch()
    del batch["task_ids"]
    assert check_batch(batch, ["one"])["task_ids"].tolist() == [0] * 5
    assert "task_ids" not in batch


def test_more_loaders_than_tasks_raise() -> None:
    with pytest.raises(ValueError, match=r"Got evaluation loader 3, expected one per task \(one, two\)"):
        task_of_loader(["one", "two"], 2)


class WithoutTaskIds(AnyData):
    """Batches without `task_ids`."""

    def train_dataloader(self) -> DataLoader:
        rows = super().train_dataloader().dataset
        kept = [{key: value for key, value in row.items() if key != "task_ids"} for row in rows]
        return DataLoader(kept, batch_size=8)


def test_task_ids_in_a_trainer(model_folder: Callable[[str], str], trainer: MakeTrainer) -> None:
    def fit(data: L.LightningDataModule) -> torch.Tensor:
        L.seed_everything(0, verbose=False)
        module = PromptTuning(model_folder("t5"), prompt_length=3)
        trainer(max_steps=2, max_epochs=-1).fit(module, datamodule=data)
        return module.prompt.fold("one")

    with pytest.raises(ValueError, match="got no task_ids"):
        fit(WithoutTaskIds())
    torch.testing.assert_close(fit(WithoutTaskIds(["one"])), fit(AnyData(["one"])))


def test_a_module_without_a_trainer_checks_its_batch(model_folder: Callable[[str], str], trainer: MakeTrainer) -> None:
    module = PromptTuning(model_folder("t5"), prompt_length=3)
    trainer(max_steps=1, max_epochs=-1).fit(module, datamodule=AnyData())
    batch = make_batch()
    del batch["task_ids"]
    with pytest.raises(ValueError, match="got no task_ids"):
        module(batch)


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_choices_from_any_datamodule_are_checked(
    stage: str, model_folder: Callable[[str], str], trainer: MakeTrainer
) -> None:
    data = AnyData(["one"])
    card = {"name": "one", "path": "any", "input": "{text}", "metrics": ["accuracy"], "choices": ["good", "terrific"]}
    module = PromptTuning(model_folder("t5"), prompt_length=3)
    run = trainer(max_steps=1, max_epochs=-1, limit_val_batches=1, num_sanity_val_steps=0)
    if stage == "validate":
        trainer(max_steps=1).fit(module, datamodule=data)
    data.cards = {"one": TaskCard(**card)}
    with pytest.raises(ValueError, match=r"Task 'one': got the choices 'terrific', which becomes \['<unk>'\]"):
        getattr(run, stage)(module, datamodule=data)
