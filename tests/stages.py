"""The four training stages on the demo's models, in float64, for tests that compare several processes with one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from mpt_lightning import CPT, MPTSource, MPTTarget, MultitaskDataModule, PromptTuning, TaskDataModule
from mpt_lightning.backbones import Backbone
from mpt_lightning.data import load_card
from mpt_lightning.data.datamodule import PromptDataModule
from mpt_lightning.modules import PromptModule

T5, LLAMA, BERT = "mpt_lightning/demo/t5", "mpt_lightning/demo/llama", "mpt_lightning/demo/bert"
TASKS = ["demo/voice", "demo/advice"]
# The same with masked models' answers of one token and of three; one of the tasks has single tokens only.
LONG = [replace(load_card(TASKS[0]), choices=["active", "passive yes no"], multi_mask=True), TASKS[1]]
STAGES = ["prompt_tuning", "source", "target", "cpt"]


def make(stage: str, folder: Path) -> PromptModule:
    """Build the module of a stage; the checkpoints of earlier stages are in `folder`."""
    if stage == "prompt_tuning":
        return PromptTuning(T5, prompt_length=4)
    if stage == "source":
        return MPTSource(T5, str(folder / "prompt_tuning.ckpt"), prompt_length=4, hidden_positions="all")
    if stage == "target":
        return MPTTarget(T5, str(folder / "source.ckpt"))
    return CPT(LLAMA, lr=0.05, epsilon=2.0, template_epsilon=1.0)


def doubled(module: PromptModule) -> PromptModule:
    """Convert a module's backbone to float64 when it is loaded, and the rest when it is built."""
    adapt, build = module.adapt, module.configure_model

    def adapt_doubled(backbone: Backbone) -> None:
        adapt(backbone)
        backbone.double()

    def configure_model() -> None:
        build()
        module.double()

    module.adapt, module.configure_model = adapt_doubled, configure_model
    return module


def ragged(module: PromptModule) -> PromptModule:
    """Remove the last label token of a third of the training rows, and all those of the task `module.unlabelled`."""
    train, unlabelled = module.training_step, getattr(module, "unlabelled", -1)

    def training_step(batch: Any, batch_idx: int) -> Any:
        labels = batch["labels"].clone()
        chosen = (batch["input_ids"].sum(dim=1) % 3 == 0).nonzero()[:, 0]
        labels[chosen, (labels[chosen] != -100).sum(dim=1) - 1] = -100
        labels[batch["task_ids"] == unlabelled] = -100
        return train(batch | {"labels": labels}, batch_idx)

    module.training_step = training_step
    return module


def data(stage: str, batch_size: int, folder: Path, **options: Any) -> PromptDataModule:
    """Build the data of a stage; two ranks cannot share the 5 evaluation rows of a task evenly."""
    options = {"batch_size": batch_size, "max_eval_rows": 5, "cache_dir": str(folder / "cache")} | options
    if stage == "cpt":
        return TaskDataModule("demo/voice", context_shots=8, answer_prefix="label :", separator="", **options)
    return MultitaskDataModule(**({"tasks": TASKS, "sampling": "all", "max_train_rows": 8} | options))


def trainer(devices: int, strategy: Any = "ddp", **options: Any) -> L.Trainer:
    """Build a quiet Trainer; the strategy is used for several processes only."""
    defaults = {
        "accelerator": "cpu", "devices": devices, "strategy": strategy if devices > 1 else "auto", "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return L.Trainer(**(defaults | options))


class FirstGradient(L.Callback):
    """Stores the gradients of the first step, as the optimizer gets them."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if not self.values:
            trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
            self.values = {f"gradient/{name}": p.grad.clone() for name, p in trained.items()}
