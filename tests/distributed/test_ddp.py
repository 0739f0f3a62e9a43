"""Two processes with half a batch each give the results of one process with the whole batch."""

import os
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from processes import launch
from stages import BERT, LONG, STAGES, T5, FirstGradient, data, doubled, make, ragged, trainer

from mpt_lightning import PEFTModule, PromptTuning
from mpt_lightning.modules import PromptModule

METHODS = [*STAGES, "lora", "p_tuning", "masked", "rank without labels"]


def build(method: str, folder: Path) -> PromptModule:
    """Build the module of a stage or of another method."""
    if method == "lora":
        return PEFTModule(T5, LoraConfig(r=2))
    if method == "p_tuning":
        return PromptTuning(T5, prompt_length=4, reparameterization="mlp", network_width=8)
    if method == "masked":
        return PromptTuning(BERT, prompt_length=4)
    if method == "rank without labels":
        module = PromptTuning(T5, prompt_length=4)
        module.unlabelled = 1
        return module
    return make(method, folder)


def train(folder: str, devices: int) -> None:
    """Train with each method for two epochs; write `<method>.ckpt`, and gradients and metrics to `<method>.pt`."""
    target = Path(folder, str(devices))
    for stage in METHODS:
        L.seed_everything(0)
        gradient, saving = FirstGradient(), ModelCheckpoint(dirpath=target, filename=stage)
        run = trainer(devices, max_epochs=2, callbacks=[saving, gradient])
        # P-tuning's tasks have networks of their own: with one row per rank, each rank has one task and one network.
        size = 2 if stage in ("p_tuning", "rank without labels") else 8
        module = ragged(doubled(build(stage, Path(folder, "1"))))
        options = {"tasks": LONG} if stage == "masked" else {}
        run.fit(module, datamodule=data(stage, size // devices, Path(folder), **options))
        if run.is_global_zero:
            metrics = dict(run.callback_metrics)
            metrics.pop("train/row", None)  # its denominator is not that of CPT's loss
            torch.save(metrics | gradient.values, target / f"{stage}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    train(str(folder), 1)
    launch(train, str(folder), 2)
    return folder


@pytest.mark.parametrize("stage", METHODS)
def test_two_ranks_equal_one(stage: str, runs: Path) -> None:
    one, two = (torch.load(runs / devices / f"{stage}.pt", weights_only=True) for devices in ("1", "2"))
    assert one.keys() == two.keys()
    assert {"train/loss", "val/loss", "val/average", "val/demo/voice/accuracy"} <= one.keys()
    gradients = [name for name in one if name.startswith("gradient/")]
    assert gradients
    assert any(one[name].norm() > 0 for name in gradients)  # LoRA's A has none in the first step, since B is 0
    for name in gradients:
        assert one[name].dtype == torch.float64
        assert (two[name] - one[name]).norm() <= 1e-6 * one[name].norm(), name
    for name in one.keys() - set(gradients):
        # After two epochs, of weights that differ by as much as is allowed below.
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=0, msg=lambda text, n=name: f"{n}: {text}")
    weights = [torch.load(runs / d / f"{stage}.ckpt", weights_only=True)["state_dict"] for d in ("1", "2")]
    for name, value in weights[0].items():
        # Adam magnifies the rounding of gradients near zero, and Llama's norms are in fp32 whatever the rest is in.
        assert (weights[1][name] - value).norm() <= 1e-5 * value.norm(), name


class Faulty(PromptTuning):
    """A module whose loss is not finite at the third step on one rank, while its gradients are."""

    rank = 0

    def losses(self, batch):
        terms = super().losses(batch)
        if (self.global_step, self.global_rank) == (2, self.rank):
            terms["loss"] = terms["loss"] + float("inf")
        return terms


def stop(folder: str) -> None:
    """Train with a loss that is not finite, on either rank; write the messages to files."""
    for faulty in (0, 1):
        module = Faulty(T5, prompt_length=4)
        module.rank = faulty
        run = trainer(2, max_epochs=2, enable_checkpointing=False, limit_val_batches=0)
        with pytest.raises(ValueError, match="not finite") as error:
            run.fit(module, datamodule=data("prompt_tuning", 4, Path(folder), max_train_rows=16))
        Path(folder, f"{faulty}.on_rank{os.environ['RANK']}").write_text(f"{run.global_step} {error.value}")


def test_a_loss_that_is_not_finite_on_one_rank_stops_both(tmp_path: Path) -> None:
    launch(stop, str(tmp_path), seconds=120)
    for faulty in (0, 1):
        messages = [(tmp_path / f"{faulty}.on_rank{rank}").read_text() for rank in (0, 1)]
        assert messages[0] == messages[1]
        assert messages[0].startswith(f"2 Rank {faulty}: The loss is not finite at step 2, batch 2 (loss inf)")
        assert "demo/voice" in messages[0]
