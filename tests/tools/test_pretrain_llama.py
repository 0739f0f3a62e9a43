"""The demo's decoder-only model: its tokenizer, its size, and its accuracy with examples in the context."""

from pathlib import Path
from random import Random

import lightning.pytorch as L
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpt_lightning import CPT, load_task
from mpt_lightning.resources import LLAMA, backbone_path
from tools import world
from tools.context_tasks import POOL, TARGET_WORDS, judgement
from tools.pretrain_llama import evaluate, make_tokenizer

MODEL = backbone_path(LLAMA)


def test_the_script_builds_the_shipped_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert make_tokenizer(0).get_vocab() == tokenizer.get_vocab()
    text = "sentence : the dog found it . label : food"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text  # no special token at either end
    for name in world.TASKS:
        words = world.TASKS[name].choices
        assert tokenizer.unk_token_id not in [tokenizer(word)["input_ids"][0] for word in words]


def test_the_model_is_small_and_learns_from_its_context() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    assert model.num_parameters() < 1.5e6
    assert (Path(MODEL) / "model.safetensors").stat().st_size < 5 * 2**20
    assert evaluate(model, AutoTokenizer.from_pretrained(MODEL), "advice", shots=2, contexts=30, seed=7) >= 0.9


@pytest.mark.parametrize("task", world.TARGETS)
def test_a_target_task_is_never_pretrained_with_its_label_words(task: str) -> None:
    assert set(world.TARGETS[task].choices) <= TARGET_WORDS <= set(POOL)
    rng = Random(0)
    assert any(judgement(rng).target for _ in range(20))  # some of the drawn tasks must avoid TARGET_WORDS


def test_the_modules_context_is_laid_out_as_in_pretraining(tmp_path: Path) -> None:
    """The DataModule's context and rows have the same tokens as an episode of the pretraining."""
    data = load_task(
        "demo/advice", backbone=LLAMA, context_shots=1, answer_prefix="label :", separator="",
        cache_dir=str(tmp_path), max_eval_rows=100,
    )  # fmt: skip
    data.setup("validate")
    text = AutoTokenizer.from_pretrained(MODEL).decode(data.context.token_ids)
    assert text.startswith("sentence : ")
    assert text.count(" label : ") == text.count("</s>") == 2
    assert text.endswith("</s>")
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (scores,) = trainer.validate(CPT(LLAMA, method="icl"), datamodule=data, verbose=False)
    assert scores["val/demo/advice/accuracy"] >= 0.85
    assert torch.isfinite(torch.tensor(scores["val/loss"]))
