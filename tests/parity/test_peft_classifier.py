"""Three defects of PEFT 0.21's prompt tuning with a classifier on BERT, and the same results without them.

A test that fails in its part on PEFT shows that PEFT has changed.
"""

from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from stages import BERT
from torch import Tensor
from torch.nn import functional
from transformers import BertForSequenceClassification

from mpt_lightning import PromptTuning, load_backbone, load_task
from mpt_lightning.backbones import Backbone
from mpt_lightning.backbones.base import align
from mpt_lightning.prompts import ClassifierPrompt
from mpt_lightning.resources import backbone_path

LENGTH = 3
CLS, SEP = 2, 3


def build_base(seed: int) -> BertForSequenceClassification:
    """Load the embedded BERT; its pooler and its classifier are new."""
    torch.manual_seed(seed)
    model, report = BertForSequenceClassification.from_pretrained(
        backbone_path(BERT), num_labels=2, output_loading_info=True
    )
    parts = ("bert.pooler.dense", "classifier")
    assert report["missing_keys"] == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    return model.double().eval()


@pytest.fixture
def theirs() -> PeftModel:
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=LENGTH)
    return get_peft_model(build_base(0), config).double().eval()


@pytest.fixture
def ours(theirs: PeftModel) -> tuple[Backbone, ClassifierPrompt]:
    """Return the backbone, and a classifier with PEFT's prompt and weights."""
    backbone = load_backbone(BERT).double().eval()
    prompt = ClassifierPrompt(1, LENGTH, backbone.dim, [2], backbone.dim).double()
    linear = theirs.base_model.classifier.modules_to_save["default"]
    with torch.no_grad():
        prompt.prompt_embeddings.copy_(theirs.prompt_encoder["default"].embedding.weight)
        prompt.weight.copy_(linear.weight)
        prompt.bias.copy_(linear.bias)
    return backbone, prompt


@pytest.fixture
def rows(ours: tuple[Backbone, ClassifierPrompt]) -> tuple[Tensor, Tensor]:
    """Return right-padded ids `[B, L]` of two texts, and their mask."""
    texts = ["the dog chased the fox in the park .", "the cat sat ."]
    encoded = ours[0].tokenizer(texts, padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def scores(ours: tuple[Backbone, ClassifierPrompt], ids: Tensor, mask: Tensor) -> Tensor:
    backbone, prompt = ours
    task = torch.zeros(len(ids), dtype=torch.long)
    with torch.no_grad():
        return backbone.score(prompt(torch.tensor([0])), task, ids, mask, torch.tensor([[[5], [6]]] * len(ids)))


@torch.no_grad()
def test_peft_classifies_a_prompt_token_and_not_cls(
    theirs: PeftModel, ours: tuple[Backbone, ClassifierPrompt], rows: tuple[Tensor, Tensor]
) -> None:
    model, ids = theirs.base_model, rows[0][:1]
    words, prompt = model.bert.embeddings.word_embeddings(ids[0]), theirs.prompt_encoder["default"].embedding.weight

    def states(*parts: Tensor) -> Tensor:
        return model.bert(inputs_embeds=torch.cat(parts)[None]).last_hidden_state

    read = states(prompt, words)
    logits = theirs(input_ids=ids, attention_mask=rows[1][:1]).logits
    torch.testing.assert_close(logits, model.classifier(model.bert.pooler(read)))  # the state of a prompt token
    assert (logits - model.classifier(model.bert.pooler(read[:, LENGTH:]))).abs().max() > 0.01  # the state of [CLS]

    state = states(words[:1], prompt, words[1:])[0, 0]
    assert ids[0, 0] == ours[0].tokenizer.cls_token_id
    expected = functional.log_softmax(model.classifier(state), dim=0)
    torch.testing.assert_close(scores(ours, ids, rows[1][:1])[0], expected)


def test_peft_neither_trains_nor_saves_a_new_pooler(
    theirs: PeftModel, rows: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    trained = [name for name, parameter in theirs.named_parameters() if parameter.requires_grad]
    assert not [name for name in trained if "pooler" in name]
    theirs.save_pretrained(tmp_path / "peft")
    inputs = {"input_ids": rows[0], "attention_mask": rows[1]}
    loaded = PeftModel.from_pretrained(build_base(1), tmp_path / "peft").double().eval()
    assert (loaded(**inputs).logits - theirs(**inputs).logits).abs().max() > 0.01

    module = PromptTuning(BERT, prompt_length=LENGTH, head="classification", lr=0.1)
    data = load_task("demo/voice", max_train_rows=8, max_eval_rows=8, cache_dir=str(tmp_path))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    run = L.Trainer(accelerator="cpu", max_steps=1, enable_model_summary=False, **quiet)
    run.fit(module, datamodule=data)
    run.save_checkpoint(tmp_path / "ours.ckpt")
    backbone, prompt = module.parts()
    pretrained = load_backbone(BERT).model.state_dict()
    assert all(torch.equal(value, pretrained[name]) for name, value in backbone.model.state_dict().items())
    saved = torch.load(tmp_path / "ours.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == {f"prompt.{name}" for name, parameter in prompt.named_parameters()}
    assert all(parameter.grad.abs().max() > 0 for parameter in prompt.parameters())
    torch.manual_seed(1)
    again = PromptTuning.load_from_checkpoint(str(tmp_path / "ours.ckpt"))
    assert torch.equal(scores(again.parts(), *rows), scores(module.parts(), *rows))


def test_padding_on_the_left_changes_pefts_results(
    theirs: PeftModel, ours: tuple[Backbone, ClassifierPrompt], rows: tuple[Tensor, Tensor]
) -> None:
    ids, mask = align(*rows, "left")
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    before = torch.arange(LENGTH).expand(2, -1)
    right = theirs(input_ids=rows[0], attention_mask=rows[1]).logits
    with pytest.warns(UserWarning, match="Position ids are not supported"):
        left = theirs(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(left[0], right[0])  # the row without padding
    assert (left[1] - right[1]).abs().max() > 0.01
    # With the positions that PEFT discards there would be no difference.
    words = theirs.base_model.bert.embeddings.word_embeddings(ids)
    with_positions = theirs.base_model(
        inputs_embeds=torch.cat([theirs.get_prompt(2), words], dim=1),
        attention_mask=torch.cat([torch.ones_like(before), mask], dim=1),
        position_ids=torch.cat([before, LENGTH + positions], dim=1),
    )
    torch.testing.assert_close(with_positions.logits, right)
    torch.testing.assert_close(scores(ours, ids, mask), scores(ours, *rows))
