"""Fine-tuning, and hard prompts, which have no trained weights."""

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch

from mpt_lightning import FineTuning, HardPrompt, PromptTuning, load_backbone, load_task
from mpt_lightning.checkpoint import KEY
from tests.conftest import KINDS
from tests.modules.checks import assert_loads_equal, assert_resumes_exactly
from tests.modules.conftest import AnyData

Folder = Callable[[str], str]
MakeTrainer = Callable[..., L.Trainer]
DEMO = "mpt_lightning/demo/t5"


@pytest.mark.parametrize("train", ["all", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_chosen_weights_are_trained_and_saved(
    train: str, kind: str, model_folder: Folder, data: AnyData, trainer: MakeTrainer, tmp_path: Path
) -> None:
    before = load_backbone(model_folder(kind))
    module = FineTuning(model_folder(kind), train=train, lr=0.01)
    fitted = trainer(max_epochs=1)
    fitted.fit(module, datamodule=data)
    assert_loads_equal(module, fitted, tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    names = {"lm_head.weight"} if train == "head" else {name for name, _ in before.model.named_parameters()}
    assert content["state_dict"].keys() == {f"backbone.model.{name}" for name in names}
    assert content[KEY]["fingerprint"] == before.fingerprint  # although the embeddings may have been trained
    moved = not torch.equal(before.embeddings, module.backbone.embeddings)
    assert moved == (train == "all")
    assert not torch.equal(before.model.get_output_embeddings().weight, module.backbone.model.lm_head.weight)
    assert not module.backbone.model.training  # dropout is off by default


def test_the_untied_head_starts_as_a_copy_of_the_embeddings(
    model_folder: Folder, data: AnyData, trainer: MakeTrainer
) -> None:
    module = FineTuning(model_folder("gpt2"), train="head", lr=0.0)
    trainer(max_steps=1).fit(module, datamodule=data)
    plain = PromptTuning(model_folder("gpt2"), prompt_length=4)
    plain.configure_model()
    assert plain.backbone.model.lm_head.weight is plain.backbone.embeddings
    assert module.backbone.model.lm_head.weight is not module.backbone.embeddings
    assert torch.equal(module.backbone.model.lm_head.weight, plain.backbone.embeddings)


@pytest.mark.parametrize("train", ["all", "head"])
def test_resuming_is_exact(train: str, model_folder: Folder, trainer: MakeTrainer, tmp_path: Path) -> None:
    folder = model_folder("t5")
    assert_resumes_exactly(lambda: FineTuning(folder, train=train, lr=0.01), trainer, tmp_path)


def test_another_way_of_training_is_refused(
    model_folder: Folder, data: AnyData, trainer: MakeTrainer, tmp_path: Path
) -> None:
    fitted = trainer(max_steps=1)
    fitted.fit(FineTuning(model_folder("t5"), train="head"), datamodule=data)
    fitted.save_checkpoint(tmp_path / "head.ckpt")
    with pytest.raises(ValueError, match=r"was trained with {'train': 'head'}, and this run has {'train': 'all'}"):
        trainer().fit(FineTuning(model_folder("t5")), datamodule=data, ckpt_path=str(tmp_path / "head.ckpt"))
    with pytest.raises(ValueError, match="was trained on the backbone"):
        FineTuning.load_from_checkpoint(str(tmp_path / "head.ckpt"), backbone=model_folder("gpt2"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": "body"}, "train: got 'body', expected one of all, head"),
        ({"backbone_dtype": "bfloat16"}, "Leave backbone_dtype at float32; --trainer.precision bf16-mixed"),
    ],
)
def test_invalid_values_raise(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTuning("anything", **arguments)


def test_rows_too_long_for_the_backbone_raise(model_folder: Folder, data: AnyData, trainer: MakeTrainer) -> None:
    data.max_input_length = 100
    with pytest.raises(
        ValueError, match=r"^Inputs of up to 100 need 100 positions, and .* has 96.*answers are long\).$"
    ):
        trainer().fit(FineTuning(model_folder("gpt2")), datamodule=data)


def test_a_hard_prompt_needs_no_training_and_no_checkpoint(trainer: MakeTrainer, tmp_path: Path) -> None:
    """The embedded model answers a question that it was pretrained on, but not the bare fields."""

    def accuracy(pattern: int | None) -> float:
        module = HardPrompt(DEMO)
        data = load_task("demo/voice", pattern=pattern, max_eval_rows=60, cache_dir=str(tmp_path))
        run = trainer()
        (result,) = run.test(module, datamodule=data, verbose=False)
        records = run.predict(module, datamodule=data)
        words = ["start", "end"] if pattern == 0 else ["active", "passive"]
        assert {row["prediction"] for batch in records for row in batch} <= set(words)
        assert data.cards["demo/voice"].choices == words
        return result["test/demo/voice/accuracy"]

    assert accuracy(None) < 0.8 < 0.95 < accuracy(0)


def test_a_hard_prompt_is_not_fitted(trainer: MakeTrainer, data: AnyData) -> None:
    with pytest.raises(ValueError, match="HardPrompt trains nothing: run `mpt validate`"):
        trainer().fit(HardPrompt(DEMO), datamodule=data)
