"""Two processes with half a batch each are one process with the whole batch."""

from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import launch

from mpt_lightning import CPT, MPTSource, MPTTarget, MultitaskDataModule, PromptTuning, TaskDataModule
from mpt_lightning.modules import PromptModule

T5, LLAMA = "mpt_lightning/demo/t5", "mpt_lightning/demo/llama"
TASKS = ["demo/voice", "demo/advice"]  # answers of one word each, so that ranks have equally many label tokens
STAGES = ["prompt_tuning", "source", "target", "cpt"]


def make(stage: str, folder: Path) -> PromptModule:
    """The module of a stage, from the checkpoints of the stages before it (the same ones for every run)."""
    if stage == "prompt_tuning":
        return PromptTuning(T5, prompt_length=4)
    if stage == "source":
        # Prompts are equally long on every rank; texts are not, and a mean over each rank's tokens would differ.
        return MPTSource(T5, str(folder / "prompt_tuning.ckpt"), prompt_length=4, hidden_positions="prompt")
    if stage == "target":
        return MPTTarget(T5, str(folder / "source.ckpt"))
    return CPT(LLAMA, lr=0.05, epsilon=2.0, template_epsilon=1.0)


class FirstGradient(L.Callback):
    """Keeps the gradients of the first step, as the optimizer gets them."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, module: PromptModule, *_: object) -> None:
        if not self.values:
            trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
            self.values = {f"gradient/{name}": p.grad.clone() for name, p in trained.items()}


def train(folder: str, devices: int) -> None:
    """Train each stage for two epochs; leaves `<stage>.ckpt`, and gradients and metrics in `<stage>.pt`."""
    target = Path(folder, str(devices))
    for stage in STAGES:
        L.seed_everything(0)
        options = {"batch_size": 8 // devices, "max_eval_rows": 9, "cache_dir": str(Path(folder, "cache"))}
        if stage == "cpt":
            data = TaskDataModule("demo/voice", context_shots=8, answer_prefix="label :", separator="", **options)
        else:
            data = MultitaskDataModule(TASKS, sampling="all", max_train_rows=16, **options)
        gradient = FirstGradient()
        trainer = L.Trainer(
            accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=2,
            logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            callbacks=[ModelCheckpoint(dirpath=target, filename=stage), gradient],
        )  # fmt: skip
        trainer.fit(make(stage, Path(folder, "1")), datamodule=data)
        if trainer.is_global_zero:
            metrics = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            torch.save(metrics | gradient.values, target / f"{stage}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    train(str(folder), 1)
    launch(train, str(folder), 2)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_one(stage: str, runs: Path) -> None:
    one, two = (torch.load(runs / devices / f"{stage}.pt", weights_only=True) for devices in ("1", "2"))
    assert one.keys() == two.keys()
    assert {"val/average", "val/demo/voice/accuracy"} <= one.keys()
    gradients = [name for name in one if name.startswith("gradient/")]
    assert gradients
    for name in gradients:
        assert one[name].norm() > 0
        assert (two[name] - one[name]).norm() <= 5e-6 * one[name].norm(), name  # fp32
    # Adam magnifies the rounding of gradients near zero: after four steps only results are alike.
    torch.testing.assert_close(two["val/loss"], one["val/loss"], rtol=1e-3, atol=0)
    weights = [torch.load(runs / d / f"{stage}.ckpt", weights_only=True)["state_dict"] for d in ("1", "2")]
    for name, value in weights[0].items():
        assert (weights[1][name] - value).norm() <= 0.02 * value.norm(), name
