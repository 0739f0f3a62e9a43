"""With the same weights, logits, loss and gradients equal PEFT's, in float64, on right-padded mixed batches."""

import copy

import pytest
import torch
from peft import MultitaskPromptTuningConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model

from mpt_lightning import MultitaskPrompt, SoftPrompt
from mpt_lightning.backbones import CausalBackbone, Seq2SeqBackbone
from mpt_lightning.objectives import IGNORE, token_cross_entropy
from tests.conftest import KINDS, build_model

LENGTH, DIM, TASKS = 6, 32, 3


def with_peft(kind: str, multitask: bool) -> PeftModel:
    task_type = TaskType.SEQ_2_SEQ_LM if kind == "t5" else TaskType.CAUSAL_LM
    common = {"task_type": task_type, "num_virtual_tokens": LENGTH, "num_transformer_submodules": 1}
    config = (
        MultitaskPromptTuningConfig(**common, num_tasks=TASKS, num_ranks=2)
        if multitask
        else PromptTuningConfig(**common)
    )
    return get_peft_model(build_model(kind).double(), config).double().eval()


def with_ours(kind: str) -> Seq2SeqBackbone | CausalBackbone:
    cls = Seq2SeqBackbone if kind == "t5" else CausalBackbone
    return cls(build_model(kind).double(), kind).double().eval()


def peft_batch(kind: str, batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the same rows in PEFT's format, and the mask of its logits that predict label tokens."""
    if kind == "t5":
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        return inputs, batch["labels"] != IGNORE
    width = batch["input_ids"].shape[1] + batch["labels"].shape[1]
    rows = len(batch["input_ids"])
    ids, mask, labels = (torch.full((rows, width), value) for value in (0, 0, IGNORE))
    for row in range(rows):
        text = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        answer = batch["labels"][row][batch["labels"][row] != IGNORE]
        both = torch.cat([text, answer])
        ids[row, : len(both)], mask[row, : len(both)] = both, 1
        labels[row, len(text) : len(both)] = answer
    predicts = torch.zeros(rows, LENGTH + width, dtype=torch.bool)
    predicts[:, LENGTH - 1 : -1] = labels != IGNORE
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}, predicts


@pytest.mark.parametrize("kind", KINDS)
def test_multitask_prompt(kind: str, batch: dict[str, torch.Tensor]) -> None:
    reference = with_peft(kind, multitask=True)
    encoder = reference.prompt_encoder["default"]
    ours, prompt = with_ours(kind), MultitaskPrompt(TASKS, LENGTH, DIM, rank=2).double()
    with torch.no_grad():
        encoder.embedding.weight.copy_(prompt.prompt_embeddings)
        encoder.prefix_task_cols.copy_(prompt.prefix_task_cols)
        encoder.prefix_task_rows.copy_(prompt.prefix_task_rows)

    inputs, predicts = peft_batch(kind, batch)
    expected = reference(**inputs, task_ids=batch["task_ids"])
    distinct, rows = batch["task_ids"].unique(return_inverse=True)
    logits = ours(prompt(distinct), rows, batch["input_ids"], batch["attention_mask"], batch["labels"]).logits
    loss = token_cross_entropy(logits, batch["labels"])

    torch.testing.assert_close(logits[batch["labels"] != IGNORE], expected.logits[predicts], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(loss, expected.loss.double(), rtol=1e-5, atol=0)
    expected.loss.backward()
    loss.backward()
    for mine, theirs in [
        (prompt.prompt_embeddings, encoder.embedding.weight),
        (prompt.prefix_task_cols, encoder.prefix_task_cols),
        (prompt.prefix_task_rows, encoder.prefix_task_rows),
    ]:
        assert mine.grad is not None
        assert mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5 * float(theirs.grad.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_soft_prompt(kind: str, batch: dict[str, torch.Tensor]) -> None:
    reference, ours = with_peft(kind, multitask=False), with_ours(kind)
    prompt = SoftPrompt(1, LENGTH, DIM).double()
    table = reference.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        table.copy_(prompt.prompt_embeddings[0])
    batch = copy.deepcopy(batch)
    batch["task_ids"].zero_()

    inputs, predicts = peft_batch(kind, batch)
    expected = reference(**inputs)
    logits = ours(
        prompt(torch.tensor([0])), batch["task_ids"], batch["input_ids"], batch["attention_mask"], batch["labels"]
    ).logits
    loss = token_cross_entropy(logits, batch["labels"])

    torch.testing.assert_close(logits[batch["labels"] != IGNORE], expected.logits[predicts], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(loss, expected.loss.double(), rtol=1e-5, atol=0)
    expected.loss.backward()
    loss.backward()
    assert prompt.prompt_embeddings.grad is not None
    torch.testing.assert_close(
        prompt.prompt_embeddings.grad[0], table.grad, rtol=1e-5, atol=1e-5 * float(table.grad.abs().max())
    )
