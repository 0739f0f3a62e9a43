"""Prompts can be trained on quantized backbones, if the libraries are installed."""

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from torch.nn import functional

from mpt_lightning import CPT, MPTSource, PromptTuning, TaskDataModule, load_backbone
from mpt_lightning.backbones import Backbone
from mpt_lightning.objectives import token_cross_entropy
from tests.conftest import KINDS, build_model, build_tokenizer

pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

# bitsandbytes imports parts of torch that torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
DEMO_T5, DEMO_LLAMA = "mpt_lightning/demo/t5", "mpt_lightning/demo/llama"
QUANTIZED = ["8bit", "4bit"]
# Largest error of the logits, relative to fp32.
NEAR = {"8bit": 0.05, "4bit": 0.5}
# Smallest cosine between the prompt's gradient and that in fp32.
SIMILAR = {"8bit": 0.99, "4bit": 0.8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return the folder of a tiny model with weights of a realistic scale."""
    made: dict[str, str] = {}

    def of(kind: str) -> str:
        if kind not in made:
            made[kind] = str(tmp_path_factory.mktemp("small") / kind)
            build_model(kind, 0.3).save_pretrained(made[kind])
            build_tokenizer(kind).save_pretrained(made[kind])
        return made[kind]

    return of


def loss_and_gradient(backbone: Backbone, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    prompts = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inputs = (batch["task_ids"], batch["input_ids"], batch["attention_mask"], batch["labels"])
    output = backbone(prompts, *inputs)
    token_cross_entropy(output.logits, batch["labels"]).backward()
    return output.logits.detach().float(), prompts.grad.flatten()


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("quantization", QUANTIZED)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_before_and_after_a_pass_without(
    kind: str, quantization: str, options: dict, folder: Callable[[str], str], batch: dict[str, torch.Tensor]
) -> None:
    plain = load_backbone(folder(kind)).train()
    small = load_backbone(folder(kind), quantization=quantization, **options).train()
    assert sum(p.nbytes for p in small.parameters()) < 0.8 * sum(p.nbytes for p in plain.parameters())
    assert small.fingerprint == f"{plain.fingerprint.partition('-')[0]}-quantized"
    expected, found = loss_and_gradient(plain, batch), loss_and_gradient(small, batch)
    counted = batch["labels"] != -100
    assert 0 < (found[0] - expected[0])[counted].norm() < NEAR[quantization] * expected[0][counted].norm()
    assert functional.cosine_similarity(expected[1], found[1], dim=0) > SIMILAR[quantization]
    with torch.no_grad():  # a teacher's pass
        prompts = small.encode_prompts(torch.rand(3, 6, 32))
        small(prompts[torch.arange(3)], *(batch[n] for n in ("task_ids", "input_ids", "attention_mask", "labels")))
    again = loss_and_gradient(small, batch)
    assert torch.equal(again[0], found[0])
    assert torch.equal(again[1], found[1])


class Losses(L.Callback):
    """Records each step's loss."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_prompt_tuning_source_training_and_cpt_learn(quantization: str, tmp_path: Path) -> None:
    def train(module: L.LightningModule, data: L.LightningDataModule) -> None:
        losses = Losses()
        trainer = L.Trainer(
            accelerator="cpu", max_steps=24, max_epochs=-1, logger=False, enable_checkpointing=False,
            callbacks=[losses], enable_progress_bar=False, enable_model_summary=False, limit_val_batches=1,
            val_check_interval=2, check_val_every_n_epoch=None, num_sanity_val_steps=1, gradient_clip_val=1.0,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        trainer.save_checkpoint(tmp_path / f"{type(module).__name__}.ckpt")
        first, last = sum(losses.values[:4]), sum(losses.values[-4:])
        assert last < 0.8 * first

    L.seed_everything(0)
    options = {"batch_size": 8, "max_eval_rows": 16, "cache_dir": str(tmp_path / "cache")}
    common = {"backbone_quantization": quantization, "schedule": "constant"}
    data = TaskDataModule("demo/topic", max_train_rows=64, **options)
    train(PromptTuning(DEMO_T5, prompt_length=8, lr=0.3, **common), data)
    teachers = str(tmp_path / "PromptTuning.ckpt")
    train(MPTSource(DEMO_T5, teachers, prompt_length=8, task_lr=0.02, **common), data)
    context = TaskDataModule("demo/voice", context_shots=8, answer_prefix="label :", separator="", **options)
    train(CPT(DEMO_LLAMA, lr=0.05, epsilon=2.0, template_epsilon=1.0, **common), context)
