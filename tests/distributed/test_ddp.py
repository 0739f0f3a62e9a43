"""Two processes with half a batch each are one process with the whole batch."""

from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import launch

from mpt_lightning import MPTSource, MultitaskDataModule, PromptTuning

DEMO = "mpt_lightning/demo/t5"
TASKS = ["demo/voice", "demo/advice"]  # answers of one word each, so that ranks have equally many label tokens


def train(folder: str, devices: int) -> None:
    """Train each stage for two epochs; leaves `<stage>.ckpt` and the metrics in `<stage>.pt`."""
    target = Path(folder, str(devices))
    teachers = Path(folder, "1", "prompt_tuning.ckpt")  # the same for both runs
    for stage in ("prompt_tuning", "source"):
        L.seed_everything(0)
        data = MultitaskDataModule(
            TASKS, sampling="all", batch_size=8 // devices, max_train_rows=16, max_eval_rows=9,
            cache_dir=str(Path(folder, "cache")),
        )  # fmt: skip
        if stage == "source":
            # Prompts are equally long on every rank; texts are not, and a mean over each rank's tokens would differ.
            module = MPTSource(DEMO, str(teachers), prompt_length=4, hidden_positions="prompt")
        else:
            module = PromptTuning(DEMO, prompt_length=4)
        trainer = L.Trainer(
            accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=2,
            logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            callbacks=[ModelCheckpoint(dirpath=target, filename=stage)],
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        if trainer.is_global_zero:
            metrics = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            torch.save(metrics, target / f"{stage}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    train(str(folder), 1)
    launch(train, str(folder), 2)
    return folder


@pytest.mark.parametrize("stage", ["prompt_tuning", "source"])
def test_two_ranks_equal_one(stage: str, runs: Path) -> None:
    one, two = (
        torch.load(runs / devices / f"{stage}.ckpt", weights_only=True)["state_dict"]
        | torch.load(runs / devices / f"{stage}.pt", weights_only=True)
        for devices in ("1", "2")
    )
    assert one.keys() == two.keys()
    assert {"val/average", "val/demo/voice/accuracy"} <= one.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
