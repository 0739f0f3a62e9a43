"""With the same context and batch, loss and gradient equal those of PEFT's CPT over ten projected steps, in float64."""

import copy

import pytest
import torch
from peft import CPTConfig, PeftModel, TaskType, get_peft_model

from mpt_lightning import ContextPrompt
from mpt_lightning.backbones import CausalBackbone
from mpt_lightning.objectives import IGNORE, context_cross_entropy
from tests.conftest import build_model

# Three examples of different lengths, the second with a label of two tokens, separators between them.
IDS = [11, 12, 13, 14, 20, 30, 2, 11, 15, 16, 20, 31, 32, 2, 11, 17, 18, 19, 20, 30, 2]
TYPES = [1, 2, 2, 2, 3, 4, 0, 5, 6, 6, 7, 8, 8, 0, 9, 10, 10, 10, 11, 12, 0]
STEPS = 10


def with_peft(kind: str, decay: float) -> PeftModel:
    config = CPTConfig(
        task_type=TaskType.CAUSAL_LM, cpt_token_ids=IDS, cpt_tokens_type_mask=TYPES, cpt_mask=[1] * len(IDS),
        opt_weighted_loss_type="none" if decay == 1 else "decay", opt_loss_decay_factor=decay,
        opt_projection_epsilon=0.4, opt_projection_format_epsilon=0.2,
    )  # fmt: skip
    return get_peft_model(build_model(kind).double(), config).double()


def peft_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the rows in PEFT's format: answers after their texts, a type per token."""
    width = batch["input_ids"].shape[1] + batch["labels"].shape[1]
    ids, mask, types = (torch.zeros(len(batch["input_ids"]), width, dtype=torch.long) for _ in range(3))
    for row in range(len(ids)):
        text = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        answer = batch["labels"][row][batch["labels"][row] != IGNORE]
        both = torch.cat([text, answer])
        ids[row, : len(both)], mask[row, : len(both)] = both, 1
        types[row, : len(text)], types[row, len(text) : len(both)] = 2, 4
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone(), "input_type_mask": types}


@pytest.mark.parametrize("decay", [0.8, 1.0])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_ten_steps(kind: str, decay: float, batch: dict[str, torch.Tensor]) -> None:
    reference, backbone = with_peft(kind, decay), CausalBackbone(build_model(kind).double(), kind).double()
    prompt = ContextPrompt(IDS, TYPES, dim=32, epsilon=0.4, template_epsilon=0.2).double()
    prompt.attach(backbone.embeddings)
    # Dropout in the base model, which PEFT leaves on in training, would make the two differ.
    reference.base_model.eval()
    theirs = reference.prompt_encoder["default"].delta_embedding.weight
    optimizers = [torch.optim.AdamW(p, lr=0.02, weight_decay=0.0) for p in ([theirs], prompt.parameters())]
    optimizers[1].register_step_post_hook(lambda *_: prompt.project())
    inputs, rows = peft_batch(batch), torch.zeros_like(batch["task_ids"])
    bound, losses = False, []
    for _ in range(STEPS):
        expected = reference(**copy.deepcopy(inputs)).loss
        context = backbone.encode_prompts(prompt(rows[:1]), predict_at=prompt.label_positions - 1)
        logits = backbone(context, rows, batch["input_ids"], batch["attention_mask"], batch["labels"]).logits
        loss = context_cross_entropy(
            context.logits[0], prompt.label_ids, prompt.label_distances, logits, batch["labels"], decay
        )
        torch.testing.assert_close(loss, expected.double(), rtol=1e-5, atol=0)
        losses.append(loss.item())
        for optimizer, value in zip(optimizers, (expected, loss), strict=True):
            optimizer.zero_grad()
            value.backward()
        mine = prompt.delta_embedding.grad
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-5, atol=1e-5 * float(theirs.grad.abs().max()))
        assert mine[prompt.moves[:, 0] == 0].abs().max() == 0
        for optimizer in optimizers:
            optimizer.step()
        norm = prompt.delta_embedding.detach().norm(dim=1)
        # PEFT projects in its next forward pass; until then its parameter is outside the balls.
        bound |= bool((theirs.detach().norm(dim=1) > prompt.radius[:, 0] * 1.001).any())
        assert (norm <= prompt.radius[:, 0] * (1 + 1e-12)).all()
    assert bound, "no step was projected"
    assert losses[-1] < losses[0]
