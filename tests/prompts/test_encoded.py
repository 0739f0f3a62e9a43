"""Prompts that are computed by a network, or as weighted sums of embeddings."""

import pytest
import torch

from mpt_lightning.prompts import EncodedPrompt, Prompt, SuperposedPrompt

BOTH = torch.tensor([0, 1])
KINDS = ["residual", "mlp", "lstm", "superposition"]


def table() -> torch.Tensor:
    return torch.randn(20, 8, generator=torch.Generator().manual_seed(0))


def make(kind: str) -> Prompt:
    torch.manual_seed(1)
    if kind == "superposition":
        prompt = SuperposedPrompt(2, 4, 8, [[3, 5, 7], [2, 4, 6]], ["a", "b"])
        prompt.attach(table())
        return prompt
    return EncodedPrompt(2, 4, 8, ["a", "b"], kind, hidden=6)


def test_a_residual_prompt_starts_as_the_prompt_itself() -> None:
    prompt, start = make("residual"), torch.randn(2, 4, 8)
    prompt.initialize(start)
    torch.testing.assert_close(prompt(BOTH).embeddings, start, rtol=0, atol=0)
    prompt(BOTH).embeddings.square().sum().backward()
    assert prompt.encoders[0].network[-1].weight.grad.abs().max() > 0  # the layer, which starts at zero, is trained


def test_a_superposed_prompt_is_a_weighted_sum_of_embeddings() -> None:
    prompt = make("superposition")
    expected = sum(prompt.weights[1, 2, n] * table()[token] for n, token in enumerate([2, 4, 6]))
    torch.testing.assert_close(prompt(torch.tensor([1])).embeddings[0, 2], expected)
    assert set(prompt.state_dict()) == {"weights"}
    with pytest.raises(RuntimeError, match="attach"):
        SuperposedPrompt(**prompt.config())(BOTH)


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_share_no_parameters(kind: str) -> None:
    """The gradient of one task's prompt does not reach another's parameters."""
    prompt = make(kind)
    prompt(torch.tensor([1])).embeddings.square().sum().backward()
    first = [p.grad for name, p in prompt.named_parameters() if name.startswith("encoders.0")]
    assert not any(grad is not None and grad.abs().max() > 0 for grad in first)
    for name in prompt.task_parameters():
        grad = getattr(prompt, name).grad
        assert grad[0].abs().max() == 0
        assert grad[1].abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_saving_loading_and_folding_agree(kind: str) -> None:
    """A second load changes nothing: the network's input is saved, not its output."""
    prompt = make(kind)
    again = type(prompt)(**prompt.config())
    again.attach(table())
    for _ in range(2):
        again.load_state_dict(prompt.state_dict())
        assert torch.equal(again(BOTH).embeddings, prompt(BOTH).embeddings)
    # An LSTM rounds differently without gradients.
    torch.testing.assert_close(again.fold("b"), prompt(BOTH).embeddings[1].detach())


def test_invalid_values_raise() -> None:
    with pytest.raises(ValueError, match="encoder must be one of residual, mlp, lstm, got 'gru'"):
        EncodedPrompt(1, 2, 4, encoder="gru")
    with pytest.raises(ValueError, match="hidden must be at least 1"):
        EncodedPrompt(1, 2, 4, hidden=0)
    with pytest.raises(ValueError, match=r"token_ids must be 2 lists of one length, got \[1\]"):
        SuperposedPrompt(2, 2, 4, [[1]])
