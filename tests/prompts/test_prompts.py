"""Values, sizes and tasks of all prompts."""

from collections.abc import Callable

import pytest
import torch

from mpt_lightning import MultitaskPrompt, SoftPrompt
from mpt_lightning.prompts import (
    ClassifierPrompt,
    DecomposedPrompt,
    EmptyPrompt,
    EncodedPrompt,
    PrefixPrompt,
    Prompt,
    PromptOutput,
    SuperposedPrompt,
    init,
)

# One of each registered prompt, except `ContextPrompt`, which has one task.
PROMPTS: dict[str, Callable[[], Prompt]] = {
    "SoftPrompt": lambda: SoftPrompt(2, 3, 8),
    "MultitaskPrompt": lambda: MultitaskPrompt(2, 3, 8, rank=2),
    "DecomposedPrompt": lambda: DecomposedPrompt(2, 3, 8, text_length=5, rank=2),
    "EncodedPrompt residual": lambda: EncodedPrompt(2, 3, 8),
    "EncodedPrompt mlp": lambda: EncodedPrompt(2, 3, 8, encoder="mlp", hidden=6),
    "EncodedPrompt lstm": lambda: EncodedPrompt(2, 3, 8, encoder="lstm"),
    "SuperposedPrompt": lambda: SuperposedPrompt(2, 3, 8, [[3, 5, 7], [2, 4, 6]]),
    "PrefixPrompt": lambda: PrefixPrompt(2, 3, layers=2, heads=2, width=4),
    "PrefixPrompt network": lambda: PrefixPrompt(2, 3, layers=2, heads=2, width=4, projection=5),
    "ClassifierPrompt": lambda: ClassifierPrompt(2, 3, 8, [2, 3], hidden=6),
    "EmptyPrompt": lambda: EmptyPrompt(2, 8),
}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_multitask_prompt_equals_a_loop_over_tasks_and_ranks() -> None:
    prompt = MultitaskPrompt(num_tasks=3, length=4, dim=6, rank=2).double()
    got = prompt(torch.tensor([2, 0, 2])).embeddings
    for place, task in enumerate([2, 0, 2]):
        weights = torch.zeros(4, 6, dtype=torch.double)
        for rank in range(2):
            weights += torch.outer(prompt.prefix_task_cols[task, :, rank], prompt.prefix_task_rows[task, rank])
        torch.testing.assert_close(got[place], prompt.prompt_embeddings * weights, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("tasks", "expected"), [(1, 77_668), (6, 82_008), (8, 8 * 10_468)], ids=["target", "sources", "group of eight"]
)
def test_parameter_counts_equal_the_papers(tasks: int, expected: int) -> None:
    assert count(MultitaskPrompt(tasks, length=100, dim=768, rank=1)) == expected


def test_factors_near_one_keep_the_shared_prompt() -> None:
    torch.manual_seed(0)
    ones, normal = (MultitaskPrompt(2, 20, 64, rank=3, factor_init=kind) for kind in ("ones", "normal"))
    ids = torch.arange(2)
    relative = (ones(ids).embeddings - ones.prompt_embeddings).norm() / ones.prompt_embeddings.norm()
    assert relative < 0.1
    assert normal(ids).embeddings.norm() < 0.01 * normal.prompt_embeddings.norm() * 2**0.5


def test_fold_equals_the_forward() -> None:
    prompt = MultitaskPrompt(2, 4, 6, rank=2, tasks=["a", "b"])
    folded = prompt.fold("b")
    assert folded.shape == (4, 6)
    assert not folded.requires_grad
    assert torch.equal(folded, prompt(torch.tensor([1])).embeddings[0])


@pytest.mark.parametrize("make", [SoftPrompt, MultitaskPrompt])
def test_add_remove_and_rename_keep_the_other_tasks(make: type) -> None:
    prompt = make(3, 4, 6, tasks=["a", "b", "c"])
    before = {task: prompt.fold(task) for task in "abc"}
    prompt.add_task("d", like="b")
    rows = {name: getattr(prompt, name).detach().clone() for name in prompt.task_parameters()}
    prompt.add_task("e")
    for name, value in rows.items():
        torch.testing.assert_close(getattr(prompt, name)[4], value.mean(dim=0))
    prompt.remove_task("a")
    prompt.rename_task("c", "z")
    assert prompt.tasks == ["b", "z", "d", "e"]
    assert torch.equal(prompt.fold("b"), before["b"])
    assert torch.equal(prompt.fold("z"), before["c"])
    assert torch.equal(prompt.fold("d"), before["b"])
    assert prompt.num_tasks == 4
    assert all(parameter.requires_grad for parameter in prompt.parameters())


@pytest.mark.parametrize("name", PROMPTS)
def test_every_prompt_is_rebuilt_and_changes_its_tasks(name: str) -> None:
    torch.manual_seed(0)
    prompt, table = PROMPTS[name](), torch.randn(10, 8)
    again = Prompt.classes[name.split()[0]](**prompt.config())
    assert again.config() == prompt.config()
    again.load_state_dict(prompt.state_dict())
    for each in (prompt, again):
        each.attach(table)
    with torch.no_grad():
        before = prompt(torch.tensor([0, 1, 1]))
        torch.testing.assert_close(vars(again(torch.tensor([0, 1, 1]))), vars(before))
        prompt.add_task("c", like="1")
        torch.testing.assert_close(vars(prompt(torch.tensor([0, 1, 2]))), vars(before))
        prompt.remove_task("0")
        torch.testing.assert_close(vars(prompt(torch.tensor([0, 1]))), vars(before[torch.tensor([1, 2])]))
    assert prompt.tasks == ["1", "c"]
    assert Prompt.classes[name.split()[0]](**prompt.config()).num_tasks == 2


def test_every_registered_prompt_is_tested() -> None:
    ours = {name for name, kind in Prompt.classes.items() if kind.__module__.startswith("mpt_lightning.prompts.")}
    assert {name.split()[0] for name in PROMPTS} == ours - {"ContextPrompt"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.index("x"), "Unknown task 'x'. This prompt has: a, b"),
        (lambda p: p.add_task("a"), "exists already"),
        (lambda p: p.rename_task("a", "b"), "is taken"),
        (lambda p: (p.remove_task("a"), p.remove_task("b")), "only task"),
        (lambda p: MultitaskPrompt(1, 2, 3, rank=0), "rank must be at least 1, got 0"),
        (lambda p: SoftPrompt(1, 0, 3), "length must be at least 1, got 0"),
        (lambda p: SoftPrompt(2, 2, 3, tasks=["a", "a"]), "2 different names"),
    ],
)
def test_invalid_arguments_raise(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(SoftPrompt(2, 2, 3, tasks=["a", "b"]))


@pytest.mark.parametrize(
    ("start", "rows"), [("average", [0, 1, 2]), ("b", [1])], ids=["mean of the sources", "one source"]
)
def test_targets_start_from_the_source(start: str, rows: list[int]) -> None:
    source = MultitaskPrompt(3, 4, 6, rank=2, tasks=["a", "b", "c"])
    target = MultitaskPrompt.from_source(source, ["x", "y"], start)
    assert torch.equal(target.prompt_embeddings, source.prompt_embeddings)
    for task in range(2):
        torch.testing.assert_close(target.prefix_task_cols[task], source.prefix_task_cols[rows].mean(0))
        torch.testing.assert_close(target.prefix_task_rows[task], source.prefix_task_rows[rows].mean(0))
    with torch.no_grad():
        target.prompt_embeddings.zero_()
    assert source.prompt_embeddings.abs().sum() > 0


def test_a_target_can_start_from_the_shared_prompt_alone() -> None:
    source = MultitaskPrompt(3, 4, 64, tasks=["a", "b", "c"])
    with torch.no_grad():
        source.prefix_task_cols.mul_(7)
    target = MultitaskPrompt.from_source(source, ["x"], "shared")
    assert (target.fold("x") - source.prompt_embeddings).norm() < 0.1 * source.prompt_embeddings.norm()


def test_dept_has_a_prompt_and_a_shift_for_each_task() -> None:
    torch.manual_seed(0)
    prompt, start = DecomposedPrompt(3, 4, 6, text_length=5, rank=2, tasks=["a", "b", "c"]), torch.randn(3, 4, 6)
    prompt.initialize(start)
    torch.nn.init.normal_(prompt.shift_rows)
    shifts = torch.stack([prompt.shift_cols[task] @ prompt.shift_rows[task] for task in range(3)])
    got = prompt(torch.tensor([2, 0]))
    torch.testing.assert_close((got.embeddings, got.shift), (start[[2, 0]], shifts[[2, 0]]))
    prompt.remove_task("a")
    left = prompt(torch.tensor([0, 1]))
    torch.testing.assert_close((left.embeddings, left.shift), (start[1:], shifts[1:]))
    wide = DecomposedPrompt(1, 1, 1, text_length=2000, rank=16)
    assert 0.24 < wide.shift_cols.std() < 0.26  # 1/sqrt(R), so that the product's scale does not depend on R


def test_sampled_vocabulary_is_distinct_and_frequent() -> None:
    table = torch.arange(50.0)[:, None].expand(50, 3)
    drawn = init.sampled_vocabulary(table, 20, top=25, exclude=[0, 1, 2])[:, 0]
    assert len(drawn.unique()) == 20
    assert drawn.min() >= 3
    assert drawn.max() < 25
    with pytest.raises(ValueError, match="there are 22"):
        init.sampled_vocabulary(table, 23, top=25, exclude=[0, 1, 2])


def test_text_and_label_starts() -> None:
    table = torch.arange(10.0)[:, None].expand(10, 2)
    assert init.from_token_ids(table, [4, 7], 5)[:, 0].tolist() == [4, 7, 4, 7, 4]
    labels = init.from_class_labels(table, [[2, 4], [9]], 4)[:, 0]
    assert labels[:2].tolist() == [3, 9]
    with pytest.raises(ValueError, match="no tokens"):
        init.from_token_ids(table, [], 5)


class ScaledPrompt(Prompt):
    """A user's prompt: a matrix and a factor per task."""

    per_task = ("scales",)

    def __init__(self, num_tasks: int, length: int, dim: int, power: int = 1, tasks: list[str] | None = None) -> None:
        super().__init__(num_tasks, length, dim, tasks)
        self.power = power
        self.matrix = torch.nn.Parameter(torch.ones(length, dim))
        self.scales = torch.nn.Parameter(torch.arange(1.0, num_tasks + 1))

    def forward(self, task_ids: torch.Tensor) -> PromptOutput:
        return PromptOutput(self.matrix * self.scales[task_ids, None, None] ** self.power)


def test_a_new_prompt_writes_forward_and_per_task() -> None:
    prompt = Prompt.classes["ScaledPrompt"](2, 3, 4, power=2, tasks=["a", "b"])
    assert prompt.config() == {"num_tasks": 2, "length": 3, "dim": 4, "power": 2, "tasks": ["a", "b"]}
    assert prompt.task_parameters() == ["scales"]
    prompt.add_task("c", like="b")
    prompt.remove_task("a")
    assert prompt.scales.tolist() == [2.0, 2.0]
    assert torch.equal(prompt.fold("c"), torch.full((3, 4), 4.0))


def test_rows_of_an_output_are_those_of_its_parts() -> None:
    rows = torch.tensor([1, 0, 1])
    for prompt in (DecomposedPrompt(2, 3, 4, text_length=5, rank=2), PrefixPrompt(2, 3, layers=2, heads=2, width=4)):
        with torch.no_grad():
            output, expected = prompt(torch.arange(2))[rows], prompt(rows)
        torch.testing.assert_close(vars(output), vars(expected))
        assert output.length == 3
        with pytest.raises(ValueError, match="Expected a prompt of embeddings alone"):
            output.embeddings_alone()
