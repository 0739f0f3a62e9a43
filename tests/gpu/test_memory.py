"""Tensors are loaded onto the device where they are used, and freed when the run ends or fails."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mpt_lightning import PEFTModule, PromptTuning
from mpt_lightning.callbacks import PEFTExport, SimilarityPicture
from tests.conftest import build_model, build_tokenizer
from tests.gpu.cases import LORA, SHORT
from tests.gpu.conftest import Device, TinyData
from tests.gpu.test_modules import left_on_gpu

PISSA = {"peft_config": {"peft_type": "LORA", "r": 2, "init_lora_weights": "pissa"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    build_model("llama", layers=1).save_pretrained(path)
    build_tokenizer("llama").save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("module", "options", "at_once"),
    [(PromptTuning, SHORT, True), (PEFTModule, LORA, True), (PEFTModule, PISSA, False)],
    ids=["prompt", "lora", "pissa"],
)
def test_weights_are_loaded_directly_onto_the_device(
    module, options, at_once, device: Device, folder, monkeypatch
) -> None:
    places = []
    adapt = module.adapt
    monkeypatch.setattr(
        module, "adapt", lambda self, backbone: (places.append(backbone.embeddings.is_cuda), adapt(self, backbone))
    )
    with device():
        device.trainer(max_steps=1, limit_val_batches=0).fit(module(folder, **options), datamodule=TinyData())
    assert places == [at_once]


def test_a_run_that_fails_frees_the_device(device: Device, folder) -> None:
    class Broken(PromptTuning):
        def predict_step(self, *_: object) -> None:
            assert left_on_gpu(self) > 0
            raise RuntimeError("broken")

    with device():
        module = Broken(folder, **SHORT)
        device.trainer(max_steps=1, limit_val_batches=0).fit(module, datamodule=TinyData())
        with pytest.raises(RuntimeError, match="broken"):
            device.trainer().predict(module, datamodule=TinyData())
        assert module.evaluator is None
        assert left_on_gpu(module) == 0


def test_callbacks_and_half_precision_run(device: Device, folder, tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, monitor="val/average", mode="max")
    with device():
        trainer = device.trainer(
            max_epochs=1, enable_checkpointing=True, precision="bf16-true", default_root_dir=tmp_path,
            callbacks=[saved, SimilarityPicture(), PEFTExport()],
        )  # fmt: skip
        module = PromptTuning(folder, max_new_tokens=2, **SHORT)
        trainer.fit(module, datamodule=TinyData())
    assert module.prompt.prompt_embeddings.dtype == torch.bfloat16
    assert (tmp_path / "peft" / "film" / "adapter_config.json").is_file()
    assert (tmp_path / "prompt_similarity.png").is_file()
