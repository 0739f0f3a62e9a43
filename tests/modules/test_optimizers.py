"""Optimizers and schedules: their arguments, and runs whose number of steps is unknown."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers.optimization import Adafactor

from mpt_lightning import PEFTModule, PromptTuning
from mpt_lightning.modules.optimizers import build_optimizer
from tests.modules.checks import StopAfter
from tests.modules.conftest import AnyData, Rows

Folder = Callable[[str], str]
MakeTrainer = Callable[..., L.Trainer]
ADALORA = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2}


class Stream(AnyData):
    """Rows without a length."""

    def train_dataloader(self) -> DataLoader:
        class Endless(IterableDataset):
            def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
                return iter([Rows(3)[row] for row in range(24)])

        return DataLoader(Endless(), batch_size=8)


OPEN = {
    "max_time": (AnyData, {"max_time": {"hours": 1}, "max_epochs": None}),
    "max_epochs=-1": (AnyData, {"max_epochs": -1}),
    "max_steps=-1": (AnyData, {"max_epochs": -1, "max_steps": -1}),
    "iterable": (Stream, {"max_epochs": 1}),
}


@pytest.mark.parametrize("run", OPEN)
def test_runs_of_unknown_length(run: str, model_folder: Folder, trainer: MakeTrainer) -> None:
    data, options = OPEN[run]

    def fit(module: L.LightningModule, **more: Any) -> L.Trainer:
        found = trainer(callbacks=[StopAfter(2)], **(options | more))
        found.fit(module, datamodule=data())
        return found

    folder = model_folder("t5")
    constant = {"schedule": "constant", "warmup_steps": 4, "prompt_length": 4, "lr": 0.4}
    done = fit(PromptTuning(folder, **constant))
    assert done.global_step == 2
    assert done.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.2)  # warm-up needs no total
    with pytest.raises(ValueError, match=r"schedule='linear' needs .*Set --trainer.max_steps, or --model.schedule c"):
        fit(PromptTuning(folder, prompt_length=4))
    with pytest.raises(ValueError, match=r"AdaLoRA .* Set --trainer.max_steps or --model.peft_config.total_step"):
        fit(PEFTModule(folder, ADALORA, schedule="constant"))
    if run == "iterable":  # every schedule works if max_steps is given
        assert fit(PromptTuning(folder, prompt_length=4), max_steps=2).global_step == 2


def test_adafactor_takes_the_given_rate_whatever_the_scale() -> None:
    """The first step has the size of the learning rate and the gradient's sign, for small and large weights."""
    for scale in (1e-3, 1.0, 1e3):
        weight = torch.nn.Parameter(torch.full((4,), scale, dtype=torch.double))
        optimizer = build_optimizer("adafactor", [{"params": [weight], "lr": 0.25}], 0.0)
        assert isinstance(optimizer, Adafactor)
        weight.grad = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.double)
        optimizer.step()
        moved = weight.detach() - scale
        torch.testing.assert_close(moved, -0.25 * weight.grad)
