"""Without a prompt a backbone is the plain model."""

import pytest
import torch

from mpt_lightning.backbones import Backbone, CausalBackbone, Seq2SeqBackbone
from mpt_lightning.prompts import EmptyPrompt
from tests.conftest import KINDS, build_model

IGNORE = -100


@pytest.fixture(params=KINDS)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    cls = Seq2SeqBackbone if request.param == "t5" else CausalBackbone
    return cls(build_model(request.param), request.param).double().eval()


def plain_logits(backbone: Backbone, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the bare model's logits `[M, V]` of the label tokens `[M]` after the tokens `[L]`, one row, no padding."""
    if isinstance(backbone, Seq2SeqBackbone):
        return backbone.model(input_ids=ids[None], labels=labels[None]).logits[0]
    return backbone.model(input_ids=torch.cat([ids, labels[:-1]])[None]).logits[0, len(ids) - 1 :]


@pytest.mark.parametrize("encoded", [False, True])
def test_all_outputs_equal_the_bare_models(encoded: bool, backbone: Backbone, batch: dict[str, torch.Tensor]) -> None:
    prompt = EmptyPrompt(3, backbone.dim, ["a", "b", "c"])(torch.arange(3))
    prompts = backbone.encode_prompts(prompt) if encoded else prompt
    choices = torch.randint(3, 100, (5, 3, 3), generator=torch.Generator().manual_seed(3))
    choices[0, 1, 1:] = IGNORE
    inputs = (prompts, batch["task_ids"], batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        logits, scores = backbone(*inputs, batch["labels"]).logits, backbone.score(*inputs, choices)
        tokens = backbone.generate(*inputs, max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0)
        for row in range(5):
            ids = batch["input_ids"][row, : int(batch["attention_mask"][row].sum())]
            labels = batch["labels"][row][batch["labels"][row] != IGNORE]
            expected = plain_logits(backbone, ids, labels)
            torch.testing.assert_close(logits[row, : len(labels)], expected, rtol=1e-9, atol=1e-9)
            for place, choice in enumerate(choices[row]):
                words = choice[choice != IGNORE]
                likelihood = plain_logits(backbone, ids, words).log_softmax(1)[range(len(words)), words].sum()
                torch.testing.assert_close(scores[row, place], likelihood, rtol=1e-9, atol=1e-9)
            alone = backbone.model.generate(
                ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=4, num_beams=2, do_sample=False,
                pad_token_id=0,
            )[0]  # fmt: skip
            new = alone[1:] if isinstance(backbone, Seq2SeqBackbone) else alone[len(ids) :]
            assert tokens[row, : len(new)].tolist() == new.tolist()
            assert not tokens[row, len(new) :].any()


def test_an_empty_prompt_needs_no_pass(batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = CausalBackbone(build_model("llama"), "llama")
    lengths: list[int] = []
    plain = backbone.model.forward

    def forward(**inputs: torch.Tensor):
        lengths.append(inputs["input_ids"].shape[1])
        return plain(**inputs)

    monkeypatch.setattr(backbone.model, "forward", forward)
    inputs = (batch["task_ids"], batch["input_ids"], batch["attention_mask"], batch["labels"])
    output = backbone(torch.zeros(3, 0, 32), *inputs, hidden_states=True)
    assert lengths == [7 + 3 - 1]
    assert output.hidden["decoder/prompt"].layers[0].shape == (3, 0, 32)
    assert output.hidden["decoder/prompt"].weight.shape == (3, 0)


def test_an_empty_prompt_has_task_names_only() -> None:
    prompt = EmptyPrompt(2, 8, ["a", "b"])
    assert prompt.fold("b").shape == (0, 8)
    assert not list(prompt.parameters())
    assert EmptyPrompt(**prompt.config()).tasks == ["a", "b"]
    prompt.add_task("c", like="a")
    prompt.remove_task("a")
    assert prompt.tasks == ["b", "c"]
    with pytest.raises(ValueError, match="num_tasks must be at least 1, got 0"):
        EmptyPrompt(0, 8)
