"""The context prompt: which tokens are trained, how far they may move, and from where."""

import copy
import io

import pytest
import torch

from mpt_lightning import ContextPrompt

IDS = [7, 11, 12, 20, 30, 2, 11, 13, 20, 31, 32, 2]
TYPES = [0, 1, 2, 3, 4, 0, 5, 6, 7, 8, 8, 0]
INPUTS, TEMPLATES, FROZEN = [2, 7], [1, 3, 6, 8], [0, 4, 5, 9, 10, 11]
WIDTH = 32
ROW = torch.tensor([0])


def make(**options: object) -> ContextPrompt:
    prompt = ContextPrompt(IDS, TYPES, WIDTH, **options)
    prompt.attach(table())
    return prompt


def table() -> torch.Tensor:
    return torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(3))


def pushed(prompt: ContextPrompt, size: float = 5.0) -> ContextPrompt:
    with torch.no_grad():
        prompt.delta_embedding.copy_(torch.randn(len(prompt.token_ids), WIDTH) * size)
    return prompt


def test_the_bounds_equal_the_authors() -> None:
    prompt = make()
    assert (prompt.epsilon, prompt.template_epsilon, prompt.epsilon_scale) == (0.2, 0.1, "width")


def test_the_prompt_starts_as_the_contexts_embeddings() -> None:
    prompt = make()
    torch.testing.assert_close(prompt(torch.tensor([0, 0])).embeddings, table()[IDS].expand(2, -1, -1), rtol=0, atol=0)


def test_labels_are_found_by_their_token_type() -> None:
    prompt = make()
    assert prompt.num_examples == 2
    assert prompt.label_positions.tolist() == [4, 9, 10]
    assert prompt.label_ids.tolist() == [30, 31, 32]
    assert prompt.label_distances.tolist() == [2, 1, 1]


@pytest.mark.parametrize(
    ("trained", "moving"),
    [("inputs", sorted(INPUTS + TEMPLATES)), ("all", list(range(12))), ("instruction", []), ("nothing", [])],
)
def test_only_the_chosen_tokens_are_trained(trained: str, moving: list[int]) -> None:
    prompt = pushed(make(trained=trained))
    moved = (prompt(ROW).embeddings[0] - table()[IDS]).norm(dim=1) > 0
    assert moved.nonzero()[:, 0].tolist() == moving


def test_an_instruction_precedes_a_frozen_context() -> None:
    prompt = ContextPrompt([5, 6, *IDS], [-1, -1, *TYPES], WIDTH, trained="instruction")
    prompt.attach(table())
    moved = (pushed(prompt)(ROW).embeddings[0] - table()[[5, 6, *IDS]]).norm(dim=1) > 0
    assert moved.nonzero()[:, 0].tolist() == [0, 1]
    assert prompt.label_distances.tolist() == [2, 1, 1]
    assert prompt.num_examples == 2


@pytest.mark.parametrize("scale", ["width", "embedding"])
def test_projection_pulls_each_token_onto_its_ball(scale: str) -> None:
    prompt = pushed(make(epsilon=0.3, template_epsilon=0.1, epsilon_scale=scale))
    before = prompt.delta_embedding.detach().clone()
    prompt.project()
    after = prompt.delta_embedding.detach()
    unit = torch.full((12,), (WIDTH / 2048) ** 0.5) if scale == "width" else table()[IDS].norm(dim=1)
    expected = 0.1 * unit
    expected[[*INPUTS, 4, 9, 10]] *= 3
    torch.testing.assert_close(after.norm(dim=1), expected)
    torch.testing.assert_close(after / after.norm(dim=1, keepdim=True), before / before.norm(dim=1, keepdim=True))


def test_projection_does_not_change_tokens_inside() -> None:
    prompt = pushed(make(epsilon=0.3, template_epsilon=0.3), size=1e-3)
    before = prompt.delta_embedding.detach().clone()
    prompt.project()
    assert torch.equal(prompt.delta_embedding, before)


def test_without_a_bound_nothing_is_projected() -> None:
    prompt = pushed(make(epsilon=None, template_epsilon=0.1))
    before = prompt.delta_embedding.detach().norm(dim=1)
    prompt.project()
    after = prompt.delta_embedding.detach().norm(dim=1)
    assert torch.equal(after[INPUTS], before[INPUTS])
    assert (after[TEMPLATES] < 0.1).all()


def test_the_forward_pass_changes_nothing() -> None:
    prompt = pushed(make())
    before = prompt.delta_embedding.detach().clone()
    with torch.inference_mode():
        prompt.eval()(ROW)
    assert torch.equal(prompt.delta_embedding, before)
    assert not prompt.delta_embedding.is_inference()


def test_saving_and_loading_keep_centre_and_token() -> None:
    prompt = pushed(make())
    assert set(prompt.state_dict()) == {"delta_embedding"}
    for _ in range(4):
        again = pushed(ContextPrompt(**prompt.config()))
        again.attach(table())
        again.load_state_dict(prompt.state_dict())
        assert torch.equal(again(ROW).embeddings, prompt(ROW).embeddings)
        again.project()
        assert torch.equal(again.embeddings, table()[IDS])
        assert ((again(ROW).embeddings[0] - table()[IDS]).norm(dim=1) <= again.radius[:, 0] * (1 + 1e-4)).all()
        prompt.project()
        assert torch.equal(again(ROW).embeddings, prompt(ROW).embeddings)


def copied(prompt: ContextPrompt) -> ContextPrompt:
    return copy.deepcopy(prompt)


def pickled(prompt: ContextPrompt) -> ContextPrompt:
    file = io.BytesIO()
    torch.save(prompt, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copied, pickled])
def test_frozen_tokens_have_no_gradient_in_copies(again) -> None:
    prompt = again(make())
    prompt(ROW).embeddings.square().sum().backward()
    assert prompt.delta_embedding.grad[FROZEN].abs().max() == 0
    assert (prompt.delta_embedding.grad[INPUTS + TEMPLATES].norm(dim=1) > 0).all()


@pytest.mark.filterwarnings("ignore")  # warnings of torch while it compiles
def test_the_prompt_compiles_to_one_graph() -> None:
    prompt = pushed(make())
    compiled = torch.compile(copy.deepcopy(prompt), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ROW).embeddings, prompt(ROW).embeddings, rtol=0, atol=0)
    project = torch.compile(compiled._orig_mod.project, fullgraph=True, backend="aot_eager")
    project()
    prompt.project()
    torch.testing.assert_close(compiled(ROW).embeddings, prompt(ROW).embeddings)


def test_leave_one_out_hides_a_rows_own_copy() -> None:
    seen = make().visible(torch.tensor([1, -1, 0]))
    assert seen[0].tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1]
    assert seen[1].tolist() == [1] * 12
    assert seen[2].tolist() == [1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0.0}, r"epsilon must be above 0, or none for no bound; got 0\.0"),
        ({"template_epsilon": -1.0}, "template_epsilon must be above 0"),
        ({"epsilon": float("nan")}, "epsilon must be above 0"),
        ({"token_types": TYPES[:-1]}, "one type per token: got 12 ids, 11 types"),
        ({"token_types": [-2, *TYPES[1:]]}, "Token types are -1, 0 or above; got -2"),
        ({"token_types": [4, *TYPES[1:]]}, "starts with a label"),
        ({"token_ids": [], "token_types": []}, "length must be at least 1"),
        ({"tasks": ["a", "b"]}, "1 different names"),
    ],
)
def test_invalid_contexts_raise(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContextPrompt(**({"token_ids": IDS, "token_types": TYPES, "dim": WIDTH} | change))


def test_misuse_raises() -> None:
    prompt = ContextPrompt(IDS, TYPES, WIDTH)
    with pytest.raises(RuntimeError, match="attach"):
        prompt(ROW)
    with pytest.raises(ValueError, match="token ids from 2 to 32 and the width 32"):
        prompt.attach(torch.randn(20, WIDTH))
    with pytest.raises(ValueError, match="belongs to one task"):
        prompt.add_task("second")
