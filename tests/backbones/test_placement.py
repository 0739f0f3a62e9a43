"""Prompt tokens at any place of the text, and prefixes of keys and values."""

import lightning.pytorch as L
import pytest
import torch

from mpt_lightning import PrefixTuning, PromptTuning, load_task
from mpt_lightning.backbones import CausalBackbone, Seq2SeqBackbone
from mpt_lightning.data.template import count_slots, with_slots
from mpt_lightning.errors import MPTError
from mpt_lightning.prompts import PrefixPrompt
from tests.backbones.bare_model import assert_equals_bare_model
from tests.conftest import KINDS, build_model

T5, LLAMA = "mpt_lightning/demo/t5", "mpt_lightning/demo/llama"


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_tokens_replace_their_ids(kind: str) -> None:
    """Forward, ranking and generation equal the bare model on embeddings."""
    backbone = (Seq2SeqBackbone if kind == "t5" else CausalBackbone)(build_model(kind).double(), kind).eval()
    prompts = torch.randn(2, 3, 32, dtype=torch.double, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.tensor([[-1, 7, 8, -2, -3, 0], [9, -1, -2, 10, 11, -3]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6])
    rows, labels = torch.tensor([1, 0]), torch.tensor([[20, 21], [22, 23]])
    embed = backbone.model.get_input_embeddings()
    wholes = [
        torch.stack([prompts[rows[row], -1 - i] if i < 0 else embed(i) for i in ids[row][mask[row] == 1]])[None]
        for row in range(2)
    ]
    logits = assert_equals_bare_model(backbone, prompts, wholes, rows, ids, mask, labels)
    logits.square().sum().backward()
    assert (prompts.grad.norm(dim=2) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "found"), [(1, 0), (3, 1)], ids=["in some rows", "too few"])
def test_other_places_than_the_prompts_tokens_raise(kind: str, tokens: int, found: int) -> None:
    backbone = (Seq2SeqBackbone if kind == "t5" else CausalBackbone)(build_model(kind), kind)
    ids = torch.tensor([[-1, 7, 8], [9, 10, 11] if found == 0 else [-1, 10, 11]])
    inputs = (torch.zeros(1, tokens, 32), torch.tensor([0, 0]), ids, torch.ones_like(ids))
    labels = ids[:, 1:]
    for run in (lambda: backbone(*inputs, labels), lambda: backbone.score(*inputs, labels[..., None])):
        with pytest.raises(MPTError, match=rf"places for {found} prompt tokens .*, expected {tokens}, the prompt's"):
            run()


def test_prompt_slots_become_negative_ids() -> None:
    assert count_slots("[prompt*2] x [prompt*10]{y}") == 12
    assert count_slots("a prompt*2 and [prompt*]") == 0
    assert with_slots("a[prompt*2]b c [prompt*1]", lambda piece: [len(piece)]) == [1, -1, -2, 4, -3]


@pytest.mark.parametrize("backbone", [T5, LLAMA])
def test_a_card_places_the_prompt(backbone: str, tmp_path) -> None:
    task = load_task("demo/topic").cards["demo/topic"]
    task.input = "[prompt*2] sentence : {sentence} [prompt*1]"
    data = load_task(task, backbone=backbone, cache_dir=str(tmp_path), max_train_rows=16, max_eval_rows=20)
    data.setup("fit")
    row = next(iter(data.train_dataloader()))["input_ids"][0].tolist()
    assert row[:3] == [-1, -2, data.tokenizer("sentence")["input_ids"][0]]
    assert [i for i in row if i < 0] == [-1, -2, -3]
    assert ([i for i in row if i > 0][-1] == data.tokenizer.eos_token_id) == (backbone == T5)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_steps=2, enable_checkpointing=False, **options)
    trainer.fit(PromptTuning(backbone, prompt_length=3, reparameterization="lstm"), datamodule=data)
    assert 0 <= float(trainer.callback_metrics["val/demo/topic/accuracy"]) <= 1
    with pytest.raises(
        ValueError, match=r"for 3 prompt tokens, and the prompt has 4\. Set --model\.prompt_length to 3"
    ):
        L.Trainer(max_steps=1, enable_checkpointing=False, **options).fit(
            PromptTuning(backbone, prompt_length=4), datamodule=data
        )
    with pytest.raises(ValueError, match=r"\[prompt\*N\]\) in a context"):
        load_task(task, backbone=LLAMA, cache_dir=str(tmp_path), context_shots=1, separator="").setup("fit")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_prefix_from_a_text_equals_the_text(kind: str) -> None:
    backbone = CausalBackbone(build_model(kind).double(), kind).eval()
    start = torch.randn(1, 4, 32, dtype=torch.double)
    layers = backbone.encode_prompts(start).layers
    _, heads, _, width = layers[0][0].shape
    prefix = PrefixPrompt(2, 4, len(layers), heads, width).double()
    prefix.initialize(layers)
    rows, ids, labels = torch.tensor([1, 0]), torch.tensor([[5, 6], [7, 8]]), torch.tensor([[9], [10]])
    given = backbone(start, torch.zeros_like(rows), ids, torch.ones_like(ids), labels).logits
    made = backbone(prefix(torch.tensor([0, 1])), rows, ids, torch.ones_like(ids), labels).logits
    torch.testing.assert_close(made, given, rtol=1e-9, atol=1e-9)
    made.sum().backward()
    assert prefix.prefix.grad.abs().max() > 0


@pytest.mark.parametrize("projection", [False, True])
def test_prefix_tuning_trains_evaluates_and_reloads(projection: bool, tmp_path) -> None:
    L.seed_everything(0)
    data = load_task(
        "demo/advice", answer_prefix="label :", cache_dir=str(tmp_path), batch_size=16, max_train_rows=128,
        max_eval_rows=40,
    )  # fmt: skip
    module = PrefixTuning(LLAMA, prompt_length=4, projection=projection, lr=0.02)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_steps=40, max_epochs=-1, enable_checkpointing=False, gradient_clip_val=1.0, **options)
    trainer.fit(module, datamodule=data)
    (scores,) = trainer.validate(module, datamodule=data, verbose=False)
    assert scores["val/demo/advice/accuracy"] > 0.8
    trainer.save_checkpoint(tmp_path / "prefix.ckpt")
    loaded = PrefixTuning.load_from_checkpoint(tmp_path / "prefix.ckpt")
    (again,) = L.Trainer(**options).validate(loaded, datamodule=data, verbose=False)
    assert again == scores
    with pytest.raises(ValueError, match="Expected a prompt of embeddings alone, got keys and values"):
        loaded.prompt.fold("demo/advice")


def test_encoder_decoders_without_prefixes_raise(tmp_path) -> None:
    backbone, ids = Seq2SeqBackbone(build_model("t5"), "t5"), torch.tensor([[5, 6]])
    prefix = PrefixPrompt(1, 3, layers=2, heads=2, width=4)(torch.tensor([0]))
    with pytest.raises(ValueError, match="takes prompts of embeddings, got keys and values"):
        backbone(prefix, torch.tensor([0]), ids, torch.ones_like(ids), ids)
    data = load_task("demo/advice", cache_dir=str(tmp_path), max_train_rows=8)
    trainer = L.Trainer(max_steps=1, logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(ValueError, match=r"of the family causal or masked, and .* is seq2seq"):
        trainer.fit(PrefixTuning(T5), datamodule=data)
