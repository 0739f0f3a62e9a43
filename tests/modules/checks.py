"""Assertions about resuming and loading a module, for the tests of the baselines."""

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as L
import torch

from mpt_lightning.modules.base import PromptModule
from tests.modules.conftest import AnyData


def weights(module: PromptModule) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


class StopAfter(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def assert_resumes_exactly(
    make: Callable[[], PromptModule], trainer: Callable[..., L.Trainer], folder: Path
) -> PromptModule:
    """Assert that two epochs, and two epochs resumed after the first, give equal weights; return the resumed module."""

    def module() -> PromptModule:
        L.seed_everything(3)
        return make()

    whole = module()
    trainer(max_epochs=2).fit(whole, datamodule=AnyData())
    half = trainer(max_epochs=2, callbacks=[StopAfter(3)])
    half.fit(module(), datamodule=AnyData())
    assert half.global_step == 3
    half.save_checkpoint(folder / "half.ckpt")
    resumed = module()
    L.seed_everything(3)
    for _ in range(3):
        torch.rand(7)  # the state of the random numbers differs from that at the start of the first run
    trainer(max_epochs=2).fit(resumed, datamodule=AnyData(), ckpt_path=str(folder / "half.ckpt"))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    return resumed


def assert_loads_equal(module: PromptModule, trainer: L.Trainer, path: Path) -> PromptModule:
    """Assert that a saved and loaded module returns the same logits and generated tokens; return the loaded one."""
    trainer.save_checkpoint(path)
    loaded = type(module).load_from_checkpoint(str(path)).eval()
    module.eval()
    batch = next(iter(AnyData().train_dataloader()))
    with torch.no_grad():
        assert torch.equal(module(batch), loaded(batch))
        rows = batch["task_ids"]
        tokens = [
            m.backbone.generate(
                m.prompt(torch.arange(3)), rows, batch["input_ids"], batch["attention_mask"],
                max_new_tokens=4, do_sample=False, pad_token_id=0,
            )
            for m in (module, loaded)
        ]  # fmt: skip
    assert torch.equal(*tokens)
    return loaded
