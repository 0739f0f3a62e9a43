"""Losses equal hand-written loops, in float64."""

import math
from collections.abc import Callable

import pytest
import torch

from mpt_lightning.objectives import (
    IGNORE,
    Segment,
    bucketed_distillation,
    choice_cross_entropy,
    chosen_states,
    context_cross_entropy,
    hidden_distillation,
    logit_distillation,
    right_choices,
    token_cross_entropy,
    top_buckets,
)

torch.manual_seed(0)
LABELS = torch.tensor([[1, 2, IGNORE], [0, IGNORE, IGNORE]])
COUNTED = [(0, 0), (0, 1), (1, 0)]


def test_cross_entropy_is_the_mean_over_label_tokens() -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.double)
    expected = sum(-logits[b, m].log_softmax(-1)[LABELS[b, m]] for b, m in COUNTED) / 3
    torch.testing.assert_close(token_cross_entropy(logits, LABELS), expected)


def test_choice_cross_entropy_needs_a_right_choice() -> None:
    """Labels that are none of the choices have no loss to learn from."""
    shares = right_choices(torch.tensor([[[1], [2]], [[3], [4]]]), torch.tensor([[2], [9]]))
    assert shares.tolist() == [[0, 1], [0, 0]]
    assert choice_cross_entropy(torch.zeros(2, 2), shares, torch.tensor([1, 1])).isnan()
    expected = torch.tensor(math.log(2))
    torch.testing.assert_close(choice_cross_entropy(torch.zeros(2, 2), shares, torch.tensor([3, 0])), expected)


def text(states: torch.Tensor) -> dict[str, Segment]:
    return {"decoder/text": Segment((states,), LABELS != IGNORE)}


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: token_cross_entropy(a, LABELS),
        lambda a, b: logit_distillation(a, b, LABELS),
        lambda a, b: bucketed_distillation(a, *top_buckets(b[LABELS != IGNORE], 2), LABELS),
        lambda a, b: hidden_distillation(text(a), text(b)),
    ],
    ids=["cross-entropy", "logits", "buckets", "hidden"],
)
def test_half_precision_is_computed_in_fp32(loss: Callable) -> None:
    both = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert loss(*both).dtype == torch.float32
    torch.testing.assert_close(loss(*both), loss(*both.float()))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logit_distillation_is_kl_of_teacher_from_student(temperature: float) -> None:
    student, teacher = torch.randn(2, 2, 3, 4, dtype=torch.double).requires_grad_()
    total = 0.0
    for b, m in COUNTED:
        p = (teacher[b, m] / temperature).softmax(-1)
        q = (student[b, m] / temperature).softmax(-1)
        total += (p * (p / q).log()).sum()
    torch.testing.assert_close(logit_distillation(student, teacher, LABELS, temperature), total * temperature**2 / 3)


def test_the_teacher_receives_no_gradient() -> None:
    student, teacher = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    in_buckets = bucketed_distillation(student, *top_buckets(teacher[LABELS != IGNORE], 2), LABELS)
    of_states = hidden_distillation(text(student), text(teacher))
    (logit_distillation(student, teacher, LABELS) + in_buckets + of_states).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad[1, 1:].abs().sum() == 0  # padding does not count


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_bucketed_distillation_is_kl_over_buckets(k: int, temperature: float) -> None:
    student, teacher = torch.randn(2, 2, 3, 5, dtype=torch.double)
    total = 0.0
    for b, m in COUNTED:
        p = (teacher[b, m] / temperature).softmax(-1)
        q = (student[b, m] / temperature).softmax(-1)
        kept = sorted(range(5), key=lambda token: -p[token])[:k]
        for token in kept:
            total += p[token] * (p[token] / q[token]).log()
        others_p, others_q = (sum(side[token] for token in range(5) if token not in kept) for side in (p, q))
        total += others_p * (others_p / others_q).log()
    buckets = top_buckets(teacher[LABELS != IGNORE], k, temperature)
    assert [tuple(part.shape) for part in buckets] == [(3, k), (3, k + 1)]
    result = bucketed_distillation(student, *buckets, LABELS, temperature)
    torch.testing.assert_close(result, total * temperature**2 / 3)
    assert 0 < result < logit_distillation(student, teacher, LABELS, temperature)  # a lower bound


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [5, 64])
def test_one_bucket_per_token_gives_the_exact_divergence(k: int, temperature: float) -> None:
    student, teacher = torch.randn(2, 2, 3, 5, dtype=torch.double)
    student.requires_grad_()
    buckets = top_buckets(teacher[LABELS != IGNORE], k, temperature)
    losses = [
        bucketed_distillation(student, *buckets, LABELS, temperature),
        logit_distillation(student, teacher, LABELS, temperature),
    ]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("k", [2, 5])
def test_gradient_of_bucketed_distillation(k: int) -> None:
    student, teacher = torch.randn(2, 2, 3, 5, dtype=torch.double)
    buckets = top_buckets(teacher[LABELS != IGNORE], k, 1.5)
    assert torch.autograd.gradcheck(
        lambda logits: bucketed_distillation(logits, *buckets, LABELS, 1.5), student.requires_grad_()
    )
    bucketed_distillation(student, *buckets, LABELS).backward()
    assert student.grad is not None
    assert student.grad[1, 1:].abs().sum() == 0  # padding does not count


def test_small_remainders_keep_their_precision() -> None:
    """One minus the sum of the kept probabilities would be 0 in fp32, and its logarithm -inf."""
    teacher, student = (torch.tensor([[[top, 0.0, 1.0, 0.5]]]) for top in (40.0, 60.0))
    labels = torch.zeros(1, 1, dtype=torch.long)
    ids, log_probs = top_buckets(teacher[0], 1)
    exact = top_buckets(teacher[0].double(), 1)[1]
    torch.testing.assert_close(log_probs, exact.float(), rtol=1e-6, atol=0)
    expected = bucketed_distillation(student.double(), ids, exact, labels).float()
    torch.testing.assert_close(bucketed_distillation(student, ids, log_probs, labels), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("k", [1, 3, 4])
def test_extreme_logits_stay_finite(k: int) -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0, 3.0]], [[-1e4, 1e4, 1e4, -1e4]]])
    labels = torch.zeros(2, 1, dtype=torch.long)
    student = logits.flip(0).clone().requires_grad_()
    loss = bucketed_distillation(student, *top_buckets(logits.flatten(0, 1), k), labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_without_label_tokens_the_divergence_is_zero() -> None:
    buckets = top_buckets(torch.randn(0, 5), 2)
    student, none = torch.randn(1, 2, 5), torch.full((1, 2), IGNORE)
    assert bucketed_distillation(student, *buckets, none) == logit_distillation(student, student, none) == 0


@pytest.fixture
def states() -> tuple[dict[str, Segment], dict[str, Segment]]:
    generator = torch.Generator().manual_seed(1)

    def make() -> dict[str, Segment]:
        def layers(*shape: int) -> tuple[torch.Tensor, ...]:
            return tuple(torch.randn(*shape, dtype=torch.double, generator=generator) for _ in range(2))

        return {
            "encoder/prompt": Segment(layers(2, 2, 4), torch.ones(2, 2)),
            "encoder/text": Segment(layers(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])),
            "decoder/text": Segment(layers(2, 2, 4), torch.tensor([[1, 1], [1, 0]])),
        }

    return make(), make()


def by_hand(student: dict, teacher: dict, keys: list[str], layers: list[int]) -> torch.Tensor:
    total, count = torch.tensor(0.0, dtype=torch.double), 0
    for key in keys:
        for layer in layers:
            for b, s in student[key].weight.nonzero().tolist():
                total += (student[key].layers[layer][b, s] - teacher[key].layers[layer][b, s]).square().mean()
                count += 1
    return total / count


@pytest.mark.parametrize(("layers", "chosen"), [("last", [1]), ("all", [0, 1])])
@pytest.mark.parametrize(
    ("positions", "stacks", "groups"),
    [
        ("text", "both", [["encoder/text"], ["decoder/text"]]),
        ("all", "encoder", [["encoder/prompt", "encoder/text"]]),
        ("prompt", "both", [["encoder/prompt"]]),
        ("text", "decoder", [["decoder/text"]]),
    ],
)
def test_hidden_distillation(states, layers, chosen, positions, stacks, groups) -> None:
    student, teacher = states
    expected = sum(by_hand(student, teacher, keys, chosen) for keys in groups)
    torch.testing.assert_close(hidden_distillation(student, teacher, layers, positions, stacks), expected)
    if (layers, positions, stacks) == ("last", "text", "both"):  # the defaults
        assert hidden_distillation(student, teacher) == hidden_distillation(student, teacher, layers, positions, stacks)


def test_the_teacher_needs_only_the_chosen_states(states) -> None:
    student, teacher = states
    for layers, positions, stacks in (("last", "text", "both"), ("all", "prompt", "encoder")):
        options = {"layers": layers, "positions": positions, "stacks": stacks}
        kept = {key: Segment(found, teacher[key].weight) for key, found in chosen_states(teacher, **options).items()}
        assert len(kept) < len(teacher)
        torch.testing.assert_close(
            hidden_distillation(student, kept, **options), hidden_distillation(student, teacher, **options)
        )


def test_a_shared_prompt_counts_once_per_row() -> None:
    """One stored prompt of weight 3 equals three rows with a copy each."""
    ours, theirs = torch.randn(2, 1, 2, 4, dtype=torch.double)
    text = Segment((torch.randn(3, 2, 4, dtype=torch.double),), torch.ones(3, 2))
    other = Segment((torch.randn(3, 2, 4, dtype=torch.double),), torch.ones(3, 2))
    shared = [
        {"decoder/prompt": Segment((states,), torch.full((1, 2), 3)), "decoder/text": rest}
        for states, rest in ((ours, text), (theirs, other))
    ]
    repeated = [
        {"decoder/prompt": Segment((states.expand(3, -1, -1),), torch.ones(3, 2)), "decoder/text": rest}
        for states, rest in ((ours, text), (theirs, other))
    ]
    torch.testing.assert_close(
        hidden_distillation(*shared, positions="all"), hidden_distillation(*repeated, positions="all")
    )


def test_missing_states_raise(states) -> None:
    student, teacher = states
    with pytest.raises(ValueError, match="stacks='decoder', positions='prompt', and the model has encoder/prompt"):
        hidden_distillation(student, teacher, positions="prompt", stacks="decoder")


def context_inputs(examples: int, tokens: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(9, (examples * tokens,), generator=generator)
    distances = torch.arange(examples, 0, -1).repeat_interleave(tokens)
    own = torch.tensor([[3, 4], [5, -100]])
    return torch.randn(len(labels), 9, generator=generator), labels, distances, torch.randn(2, 2, 9), own


@pytest.mark.parametrize("normalize", ["paper", "weights"])
def test_context_loss_is_the_loop_over_rows_and_labels(normalize: str) -> None:
    context_logits, context_labels, distances, logits, labels = context_inputs(3)
    total, count, weights = 0.0, 0, 0.0
    for row in range(2):
        for logit, label, distance in zip(context_logits, context_labels, distances, strict=True):
            weight = 0.7 ** int(distance)
            total -= weight * torch.log_softmax(logit, 0)[label]
            count, weights = count + 1, weights + weight
        for logit, label in zip(logits[row], labels[row], strict=True):
            if label >= 0:
                total -= torch.log_softmax(logit, 0)[label]
                count, weights = count + 1, weights + 1
    expected = total / (count if normalize == "paper" else weights)
    got = context_cross_entropy(context_logits, context_labels, distances, logits, labels, 0.7, normalize)
    torch.testing.assert_close(got, expected)


def test_weighted_context_loss_ignores_number_of_examples() -> None:
    losses = {}
    for normalize in ("paper", "weights"):
        losses[normalize] = []
        for examples in (2, 10, 50):
            _, labels, distances, _, own = context_inputs(examples)
            even = torch.zeros(len(labels), 9), labels, distances, torch.zeros(2, 2, 9), own
            losses[normalize].append(context_cross_entropy(*even, 0.9, normalize).item())
    assert losses["weights"] == pytest.approx([math.log(9)] * 3, rel=1e-6)
    assert losses["paper"][2] < 0.6 * losses["paper"][0]


def test_context_loss_of_half_precision_logits_is_in_fp32() -> None:
    context_logits, context_labels, distances, logits, labels = context_inputs(3)
    half = context_logits.bfloat16(), context_labels, distances, logits.bfloat16(), labels
    precise = half[0].float(), context_labels, distances, half[3].float(), labels
    assert context_cross_entropy(*half).dtype == torch.float32
    torch.testing.assert_close(context_cross_entropy(*half), context_cross_entropy(*precise), rtol=0, atol=0)
