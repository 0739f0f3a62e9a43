"""Two processes with half a batch each are one process with the whole batch."""

from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mpt_lightning import MPTSource, MultitaskDataModule, PromptTuning

DEMO = "mpt_lightning/demo/t5"
TASKS = ["demo/voice", "demo/advice"]  # answers of one word each, so that ranks have equally many label tokens


def train(folder: Path, name: str, devices: int, teachers: str | None) -> dict[str, torch.Tensor]:
    L.seed_everything(0)
    data = MultitaskDataModule(
        TASKS, sampling="all", batch_size=8 // devices, max_train_rows=16, max_eval_rows=9, cache_dir=str(folder)
    )
    if teachers:
        # Prompts are equally long on every rank; texts are not, and a mean over each rank's tokens would differ.
        module = MPTSource(DEMO, teachers, prompt_length=4, hidden_positions="prompt")
    else:
        module = PromptTuning(DEMO, prompt_length=4)
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto", max_epochs=2,
        logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint(dirpath=folder, filename=name)],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    metrics = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return torch.load(folder / f"{name}.ckpt", weights_only=True)["state_dict"] | metrics


@pytest.mark.parametrize("stage", ["prompt_tuning", "source"])
def test_two_ranks_equal_one(stage: str, tmp_path: Path) -> None:
    teachers = None
    if stage == "source":
        train(tmp_path, "teachers", 1, None)
        teachers = str(tmp_path / "teachers.ckpt")
    one, two = (train(tmp_path, f"{stage}{devices}", devices, teachers) for devices in (1, 2))
    assert one.keys() == two.keys()
    assert {"val/average", "val/demo/voice/accuracy"} <= one.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
