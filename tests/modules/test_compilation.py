"""Modules with a compiled backbone train like those without, and their checkpoints are interchangeable."""

from collections.abc import Callable, Iterator

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from mpt_lightning import Adapters, FineTuning, PEFTModule, PromptTuning
from tests.modules.conftest import AnyData

# While torch traces, it reads the gradient of every tensor, which causes its own warning.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace without generating machine code, which takes most of the time."""
    torch._dynamo.reset()
    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_with(self, backend="eager", **options))
    monkeypatch.setattr("mpt_lightning.backbones.load.check_compiler", lambda device: None)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("first", [True, False])
def test_checkpoints_pass_between_compiled_and_plain_modules(
    first: bool, model_folder: Callable[..., str], trainer: Callable[..., L.Trainer], data: AnyData, tmp_path
) -> None:
    folder = model_folder("llama", layers=1)
    L.seed_everything(0)
    module = PromptTuning(folder, prompt_length=4, backbone_compile=first, lr=0.05)
    fitted = trainer(max_epochs=1)
    fitted.fit(module, datamodule=data)
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    assert set(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]) == {"prompt.prompt_embeddings"}
    loaded = PromptTuning.load_from_checkpoint(str(tmp_path / "a.ckpt"), backbone_compile=not first)
    batch = next(iter(data.train_dataloader()))
    torch.testing.assert_close(loaded.eval()(batch), module.eval()(batch), rtol=1e-5, atol=1e-5)
    again = PromptTuning(folder, prompt_length=4, backbone_compile=not first, lr=0.05)
    trainer(max_epochs=2).fit(again, datamodule=data, ckpt_path=str(tmp_path / "a.ckpt"))
    assert again.global_step == 2 * module.global_step


@pytest.mark.parametrize(
    "make",
    [
        lambda folder, on: PEFTModule(
            folder, {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}, backbone_compile=on
        ),
        lambda folder, on: FineTuning(folder, backbone_compile=on),
        lambda folder, on: Adapters(folder, size=4, backbone_compile=on),
        lambda folder, on: PromptTuning(folder, prompt_length=4, backbone_compile=on, backbone_dtype="bfloat16"),
    ],
    ids=["lora", "fine-tuning", "adapters", "bf16"],
)
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_trained_weights_and_bf16(
    make: Callable, kind: str, model_folder: Callable[..., str], trainer: Callable[..., L.Trainer], data: AnyData
) -> None:
    folder = model_folder(kind, layers=1)  # built before a seed is set
    trained = []
    for on in (False, True):
        L.seed_everything(0)
        module = make(folder, on)
        trainer(max_epochs=1).fit(module, datamodule=data)
        trained.append(module.state_dict())
    assert trained[0]
    assert trained[0].keys() == trained[1].keys()
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-3, atol=1e-4)
