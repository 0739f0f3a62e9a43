"""Runs limited by epochs resume exactly, also with modules that depend on the run's number of steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mpt_lightning import PEFTModule, PromptTuning, load_task
from mpt_lightning.modules import PromptModule

DEMO, BERT = "mpt_lightning/demo/t5", "mpt_lightning/demo/bert"
SAVERS = {
    "mid-epoch": {"every_n_train_steps": 2},
    "last batch": {"every_n_train_steps": 5},
    "validation": {"save_on_train_epoch_end": False},
    "epoch": {"save_on_train_epoch_end": True},
}


def make(method: str) -> PromptModule:
    if method in ("prompt_tuning", "masked"):
        return PromptTuning(BERT if method == "masked" else DEMO, prompt_length=4)
    adalora = peft.AdaLoraConfig(init_r=4, target_r=2, tinit=2, tfinal=4, deltaT=1, total_step=15)
    return PEFTModule(DEMO, adalora)


class Rows(L.Callback):
    """Stores the row ids of each step."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, _: int) -> None:
        self.seen.append(batch["row_ids"])


@pytest.mark.parametrize(
    ("method", "when"),
    [*(("prompt_tuning", when) for when in SAVERS), ("adalora", "mid-epoch"), ("masked", "mid-epoch")],
)
def test_resuming_is_exact(method: str, when: str, trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    def fit(ckpt_path: Path | None = None) -> tuple[PromptModule, list[list[int]]]:
        L.seed_everything(1)
        rows = Rows()
        saver = ModelCheckpoint(tmp_path / "saved", "{step}", save_top_k=-1, **SAVERS[when])
        data = load_task("demo/voice", batch_size=8, max_train_rows=40, max_eval_rows=4, cache_dir=str(tmp_path))
        module = make(method)
        run = trainer(
            max_epochs=3, limit_val_batches=1.0, val_check_interval=3, check_val_every_n_epoch=None,
            callbacks=[rows] if ckpt_path else [rows, saver], enable_checkpointing=ckpt_path is None,
        )  # fmt: skip
        run.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return module, rows.seen

    whole, rows = fit()
    assert len(rows) == 15
    saved = sorted((tmp_path / "saved").glob("*.ckpt"))
    assert len(saved) > 2
    for path in (saved[1], saved[-2]):
        resumed, rest = fit(path)
        assert rest == rows[int(path.stem.split("=")[1]) :], path.name
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (path.name, name)
