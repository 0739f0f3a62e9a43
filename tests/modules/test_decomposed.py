"""DePT: each token's embedding is shifted by the row of its position in the text."""

import lightning.pytorch as L
import pytest
import torch

from mpt_lightning import DePT, load_task
from mpt_lightning.backbones import CausalBackbone, Seq2SeqBackbone
from mpt_lightning.prompts import DecomposedPrompt
from tests.backbones.bare_model import assert_equals_bare_model
from tests.conftest import KINDS, build_model

T5, LLAMA = "mpt_lightning/demo/t5", "mpt_lightning/demo/llama"
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_equal_the_bare_model_on_shifted_embeddings(kind: str) -> None:
    backbone = (Seq2SeqBackbone if kind == "t5" else CausalBackbone)(build_model(kind).double(), kind).eval()
    torch.manual_seed(0)
    prompt = DecomposedPrompt(2, 3, 32, text_length=4, rank=2).double()
    torch.nn.init.normal_(prompt.shift_rows)
    ids = torch.tensor([[0, 0, 7, 8, 9], [5, 6, 10, 11, 12]])  # the second is longer than the shift
    mask, rows, labels = (ids > 0).long(), torch.tensor([1, 0]), torch.tensor([[20, 21], [22, 23]])
    given = prompt(torch.tensor([0, 1]))
    embed, wholes = backbone.model.get_input_embeddings(), []
    for row in range(2):
        text = embed(ids[row][mask[row] == 1])
        shifted = text.clone()
        shifted[:4] = text[:4] + given.shift[rows[row]][: len(text)]
        wholes.append(torch.cat([given.embeddings[rows[row]], shifted])[None])
    logits = assert_equals_bare_model(backbone, given, wholes, rows, ids, mask, labels)
    logits.square().sum().backward()
    assert prompt.shift_cols.grad.abs().max() > 0


@pytest.mark.parametrize("backbone", [T5, LLAMA])
def test_training_with_two_rates_and_reloading(backbone: str, tmp_path) -> None:
    L.seed_everything(0)
    data = load_task("demo/advice", max_input_length=32, cache_dir=str(tmp_path), max_train_rows=32, max_eval_rows=20)
    module = DePT(backbone, prompt_length=4, rank=3, lr=0.1, shift_lr=0.0)
    trainer = L.Trainer(max_steps=2, max_epochs=-1, enable_checkpointing=False, **QUIET)
    trainer.fit(module, datamodule=data)
    assert module.prompt.shift_rows.shape == (1, 3, module.prompt.dim)
    assert module.prompt.shift_cols.shape == (1, 32, 3)
    assert module.prompt.shift_rows.abs().max() == 0  # its learning rate is zero
    trainer.save_checkpoint(tmp_path / "dept.ckpt")
    (scores,) = trainer.validate(module, datamodule=data, verbose=False)
    loaded = DePT.load_from_checkpoint(tmp_path / "dept.ckpt")
    assert L.Trainer(**QUIET).validate(loaded, datamodule=data, verbose=False) == [scores]
    with pytest.raises(ValueError, match="Expected a prompt of embeddings alone, got one that shifts"):
        loaded.prompt.fold("demo/advice")


def test_invalid_values_raise() -> None:
    with pytest.raises(ValueError, match="text_length and rank must be at least 1"):
        DecomposedPrompt(1, 2, 4, text_length=3, rank=0)
    with pytest.raises(ValueError, match=r"shift_lr: got -1\.0, expected a number at least 0"):
        DePT(T5, shift_lr=-1.0)
    with pytest.raises(ValueError, match="DePT cannot start from a checkpoint"):
        DePT(T5, prompt_init="checkpoint")
