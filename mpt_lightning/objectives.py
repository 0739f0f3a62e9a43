"""Losses: token cross-entropy, and distillation of logits and hidden states, as plain functions of tensors."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mpt_lightning.errors import MPTError

# The label of padding, Hugging Face's and torch's convention.
IGNORE = -100
# The key of the hidden states of a decoder-only model's prompts, which all rows of a task share.
OF_PROMPTS = "decoder/prompt"

Layers = Literal["last", "all"]
Positions = Literal["all", "text", "prompt"]
Normalize = Literal["paper", "weights"]
Stacks = Literal["both", "encoder", "decoder"]


@dataclass
class Segment:
    """Hidden states of one part of the sequence.

    Attributes:
        layers: Per layer `[N, S, H]`, the last layer last.
        weight: `[N, S]`, how often each position counts: 0 for padding; the number of rows that share it for a prompt.
    """

    layers: tuple[Tensor, ...]
    weight: Tensor


def precise(logits: Tensor) -> Tensor:
    """Convert half precision to fp32; keep fp64."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    return functional.cross_entropy(
        precise(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction=reduction
    )


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of label tokens `[B, M]`, -100 for padding, given logits `[B, M, V]`.

    It is in fp32 or better, and 0 without label tokens.

    Example:
        >>> token_cross_entropy(torch.zeros(1, 2, 4), torch.tensor([[3, -100]]))
        tensor(1.3863)
    """
    return _cross_entropy(logits, labels, "sum") / (labels != IGNORE).sum().clamp(min=1)


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-likelihood `[N]` in nats of rows of label tokens `[N, M]`, given logits `[N, M, V]`."""
    return -_cross_entropy(logits, labels, "none").view(labels.shape).sum(dim=1)


def choice_cross_entropy(scores: Tensor, shares: Tensor, weights: Tensor) -> Tensor:
    """Return the cross-entropy in nats of the right choices, given log-likelihoods `[B, C]`, -inf where none is.

    `shares` `[B, C]` are how much each choice is right, and sum to 1 (two parts of a value: LM-BFF's regression, Gao et
    al., 2021, section 4.2). The mean is over rows, each with a weight `[B]` of at least 0, and NaN if one of
    them has no right choice.

    Example:
        >>> choice_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]), torch.ones(1))
        tensor(0.6931)
    """
    chances = functional.log_softmax(precise(scores), dim=1).masked_fill(scores.isinf(), 0.0)
    losses = -(shares.to(chances.dtype) * chances).sum(dim=1)
    losses = losses.masked_fill((shares.sum(dim=1) == 0) & (weights > 0), torch.nan)
    return (losses * weights).sum() / weights.sum().clamp(min=1)


def right_choices(choices: Tensor, labels: Tensor) -> Tensor:
    """Return the shares `[B, C]` of choices `[B, C, K]` in the answers with the labels `[B, M]`: 1 or 0."""
    width = max(choices.shape[2], labels.shape[1])
    padded = [functional.pad(t, (0, width - t.shape[-1]), value=IGNORE) for t in (choices, labels)]
    return (padded[0] == padded[1][:, None]).all(dim=2).float()


def context_cross_entropy(
    context_logits: Tensor,
    context_labels: Tensor,
    distances: Tensor,
    logits: Tensor,
    labels: Tensor,
    decay: float = 0.95,
    normalize: Normalize = "paper",
) -> Tensor:
    """Return the cross-entropy in nats of the context's labels and the rows' labels (CPT sections 3.2 and 3.3).

    Older examples of the context weigh less. The context's loss is the same for every row, so it is computed once and
    counts B times.

    Args:
        context_logits: [N, V], one for each label token of the context.
        context_labels: [N].
        distances: [N] examples from a label to the row: 1 for the last example of the context. Weight: decay^distance.
        logits: [B, M, V] of the rows' own labels, which have weight 1.
        labels: [B, M], -100 for padding.
        decay: Above 0, at most 1, which weighs all examples equally.
        normalize: "paper" divides by the number of label tokens, as PEFT does, so that the loss shrinks with more
            examples; "weights" divides by the sum of their weights.

    Example:
        >>> even = [torch.zeros(2, 4), torch.tensor([0, 3]), torch.tensor([2, 1]), torch.zeros(1, 1, 4)]
        >>> context_cross_entropy(*even, torch.tensor([[1]]), decay=0.5, normalize="weights")
        tensor(1.3863)
    """
    of_context = functional.cross_entropy(precise(context_logits), context_labels, reduction="none")
    own = _cross_entropy(logits, labels, "sum")
    weights = decay ** distances.to(of_context.dtype)
    return (len(labels) * (weights * of_context).sum() + own) / context_tokens(weights, labels, normalize)


def context_tokens(weights: Tensor, labels: Tensor, normalize: Normalize) -> Tensor:
    """Return the divisor of `context_cross_entropy`, given the weights decay^distance `[N]` of the context's labels."""
    of_context = len(weights) if normalize == "paper" else weights.sum()
    return len(labels) * of_context + (labels != IGNORE).sum()


def logit_distillation(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(teacher || student) over the vocabulary, averaged over label tokens (paper section 3.2, L_Logits).

    It is in nats, times temperature squared, so that its gradient keeps its scale (Hinton et al., 2015).

    Args:
        student: [B, M, V] logits.
        teacher: [B, M, V] logits; no gradient flows into them.
        labels: [B, M], -100 for padding.
        temperature: Softens both distributions, above 0.

    Example:
        >>> same = torch.randn(2, 3, 5)
        >>> logit_distillation(same, same, torch.ones(2, 3, dtype=torch.long)).abs() < 1e-6
        tensor(True)
    """
    counted = labels != IGNORE
    of_student = functional.log_softmax(precise(student)[counted] / temperature, dim=-1)
    of_teacher = functional.log_softmax(precise(teacher)[counted] / temperature, dim=-1)
    return _divergence(of_student, of_teacher, temperature, counted)


def _divergence(student: Tensor, teacher: Tensor, temperature: float, counted: Tensor) -> Tensor:
    divergence = functional.kl_div(student, teacher.detach(), log_target=True, reduction="sum")
    return divergence * temperature**2 / counted.sum().clamp(min=1)


def top_buckets(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Shorten distributions to one bucket for each of the k likeliest tokens, and one for all others together.

    `logits` are `[N, V]`; the temperature, above 0, softens the distributions first.

    Returns:
        The tokens' ids [N, k], the likeliest first, and log-probabilities [N, k + 1], the others' at the end; both
        [N, V] if all tokens are kept, k at least V.

    Example:
        >>> ids, log_probs = top_buckets(torch.tensor([[1.0, 0.0, 2.0, 0.0]]), k=2)
        >>> ids, log_probs.exp()
        (tensor([[2, 0]]), tensor([[0.6103, 0.2245, 0.1652]]))
    """
    log_probs = functional.log_softmax(precise(logits) / temperature, dim=-1)
    top, ids = log_probs.topk(min(k, logits.shape[-1]), dim=-1)
    return ids, _with_rest(log_probs, ids, top)


def _with_rest(log_probs: Tensor, ids: Tensor, top: Tensor) -> Tensor:
    """Append the log-probability of all tokens but `ids`, if there are others."""
    # Summed over the others: one minus the sum of the kept ones is rounding error if that sum is near 1.
    if ids.shape[-1] == log_probs.shape[-1]:
        return top
    rest = log_probs.scatter(-1, ids, float("-inf")).logsumexp(dim=-1, keepdim=True)
    return torch.cat([top, rest], dim=-1)


def bucketed_distillation(
    student: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return KL(teacher || student) over the buckets of `top_buckets`; otherwise like `logit_distillation`.

    Both distributions use the teacher's buckets, so that this is a lower bound of the KL over the vocabulary (the
    log-sum inequality), and equal to it if all tokens are kept.

    Args:
        student: [B, M, V] logits.
        ids: [N, k] the teacher's likeliest tokens at the N label tokens, row by row, without padding.
        log_probs: [N, k + 1], or [N, V] with k = V; at the same temperature. No gradient flows into them.
        labels: [B, M], -100 for padding.
        temperature: Of the student, above 0.

    Example:
        >>> labels, logits = torch.tensor([[1, -100]]), torch.randn(1, 2, 9)
        >>> bucketed_distillation(logits, *top_buckets(logits[labels >= 0], k=3), labels).abs() < 1e-6
        tensor(True)
    """
    counted = labels != IGNORE
    of_student = functional.log_softmax(precise(student)[counted] / temperature, dim=-1)
    return _divergence(_with_rest(of_student, ids, of_student.gather(-1, ids)), log_probs, temperature, counted)


def chosen_states(
    states: Mapping[str, Segment], layers: Layers, positions: Positions, stacks: Stacks
) -> dict[str, tuple[Tensor, ...]]:
    """Return the hidden states that `hidden_distillation` compares, by "<stack>/<part>"; the arguments are its own."""
    return {
        key: found.layers[-1:] if layers == "last" else found.layers
        for key, found in states.items()
        if stacks in ("both", key.split("/")[0]) and positions in ("all", key.split("/")[1])
    }


def label_weights(
    states: Mapping[str, Segment], rows: Tensor, labels: Tensor, positions: Positions
) -> dict[str, Tensor]:
    """Return weights of positions `[B, S]`, or `[U, P]` of shared prompts, by the keys of hidden states.

    With these weights `hidden_distillation` has, per stack, the denominator of the other losses: the number of label
    tokens. So losses of several batches add up. The weight of a row's position is the row's number of label tokens
    divided by its number of compared positions in the stack, 0 for padding; that of a shared prompt's position is the
    sum of this over the rows `[B]` that have the prompt.
    """
    lengths: dict[str, Tensor] = {}  # [B] per stack
    for key in chosen_states(states, "last", positions, "both"):
        weight = states[key].weight
        own = torch.full_like(rows, weight.shape[1]) if key == OF_PROMPTS else (weight > 0).sum(dim=1)
        lengths[key.split("/")[0]] = lengths.get(key.split("/")[0], 0) + own
    tokens, weights = (labels != IGNORE).sum(dim=1), {}
    for key, found in states.items():
        share = tokens / lengths.get(key.split("/")[0], tokens).clamp(min=1)
        if key == OF_PROMPTS:
            prompts = torch.arange(len(found.weight), device=rows.device)
            share = ((rows == prompts[:, None]) * share).sum(dim=1)
        weights[key] = (found.weight > 0) * share[:, None]
    return weights


def hidden_distillation(
    student: Mapping[str, Segment],
    teacher: Mapping[str, Segment],
    layers: Layers = "last",
    positions: Positions = "text",
    stacks: Stacks = "both",
) -> Tensor:
    """Return the masked mean squared error of hidden states (paper section 3.2, L_Hidden).

    The paper does not specify layers and positions, so both are arguments. Within a stack the mean is over layers,
    positions by their `weight`, and H; the stacks' means are added.

    Args:
        student: Hidden states by "<stack>/<part>".
        teacher: The same keys and shapes, at least of the compared states; no gradient flows into them.
        layers: The last layer of each stack, or all.
        positions: Text tokens, prompt tokens, or all.
        stacks: Encoder, decoder, or both if the model has both.

    Raises:
        MPTError: If the model has none of the requested states.
    """
    errors: dict[str, list[Tensor]] = defaultdict(list)
    counts: dict[str, list[Tensor]] = defaultdict(list)
    of_teacher = chosen_states(teacher, layers, positions, stacks)
    for key, ours in chosen_states(student, layers, positions, stacks).items():
        stack, weight = key.split("/")[0], student[key].weight
        for mine, theirs in zip(ours, of_teacher[key], strict=True):
            squares = (precise(mine) - precise(theirs.detach())).square().mean(dim=-1)
            errors[stack].append((squares * weight).sum())
            counts[stack].append(weight.sum())
    if not errors:
        raise MPTError(
            f"No hidden states to distil: stacks={stacks!r}, positions={positions!r}, and the model has "
            f"{', '.join(student) or 'none'}. Choose among these."
        )
    means = [sum(errors[stack]) / sum(counts[stack]).clamp(min=1) for stack in errors]  # type: ignore[union-attr]
    return torch.stack(means).sum()
