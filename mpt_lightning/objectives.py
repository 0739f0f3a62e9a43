"""Losses: token cross-entropy, and distillation of logits and hidden states.

Plain functions of tensors. `Segment`s (hidden states with a weight per position) come from the backbones.
"""

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

IGNORE = -100

Layers = Literal["last", "all"]
Positions = Literal["all", "text", "prompt"]
Normalize = Literal["paper", "weights"]
Stacks = Literal["both", "encoder", "decoder"]


class HiddenStates(Protocol):
    """Hidden states of one part of the sequence; see `mpt_lightning.backbones.Segment`."""

    layers: tuple[Tensor, ...]
    weight: Tensor


def _precise(logits: Tensor) -> Tensor:
    """Lift half precision to fp32; keep fp64."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the label tokens, in fp32.

    Args:
        logits: [B, M, V].
        labels: [B, M], -100 for padding.

    Returns:
        A scalar, in nats.

    Example:
        >>> token_cross_entropy(torch.zeros(1, 2, 4), torch.tensor([[3, -100]]))
        tensor(1.3863)
    """
    return functional.cross_entropy(_precise(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def context_cross_entropy(
    context_logits: Tensor,
    context_labels: Tensor,
    distances: Tensor,
    logits: Tensor,
    labels: Tensor,
    decay: float = 0.95,
    normalize: Normalize = "paper",
) -> Tensor:
    """Cross-entropy of the context's labels and of the rows' own, the older the less (CPT sections 3.2 and 3.3).

    The context's part is the same for every row, so it comes in once, and counts B times.

    Args:
        context_logits: [N, V], one for each label token of the context.
        context_labels: [N].
        distances: [N] examples from a label to the row: 1 for the last example of the context. Weight: decay^distance.
        logits: [B, M, V] of the rows' own labels, which have weight 1.
        labels: [B, M], -100 for padding.
        decay: above 0, at most 1; 1 weighs all alike.
        normalize: "paper" divides by the number of label tokens, as PEFT does, so that the loss shrinks with more
            examples; "weights" divides by the sum of their weights.

    Returns:
        A scalar, in nats.

    Example:
        >>> even = [torch.zeros(2, 4), torch.tensor([0, 3]), torch.tensor([2, 1]), torch.zeros(1, 1, 4)]
        >>> context_cross_entropy(*even, torch.tensor([[1]]), decay=0.5, normalize="weights")
        tensor(1.3863)
    """
    of_context = functional.cross_entropy(_precise(context_logits), context_labels, reduction="none")
    own = functional.cross_entropy(
        _precise(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    weights = decay ** distances.to(of_context.dtype)
    size, own_tokens = len(labels), (labels != IGNORE).sum()
    count = len(context_labels) if normalize == "paper" else weights.sum()
    return (size * (weights * of_context).sum() + own) / (size * count + own_tokens)


def logit_distillation(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) over the vocabulary, mean over the label tokens (paper section 3.2, L_Logits).

    Multiplied by temperature squared, so that its gradient keeps its scale (Hinton et al., 2015).

    Args:
        student: [B, M, V] logits.
        teacher: [B, M, V] logits; no gradient flows into them.
        labels: [B, M], -100 for padding.
        temperature: softens both sides, above 0.

    Returns:
        A scalar, in nats.

    Example:
        >>> same = torch.randn(2, 3, 5)
        >>> logit_distillation(same, same, torch.ones(2, 3, dtype=torch.long)).abs() < 1e-6
        tensor(True)
    """
    counted = labels != IGNORE
    of_student = functional.log_softmax(_precise(student)[counted] / temperature, dim=-1)
    of_teacher = functional.log_softmax(_precise(teacher.detach())[counted] / temperature, dim=-1)
    divergence = functional.kl_div(of_student, of_teacher, log_target=True, reduction="sum")
    return divergence * temperature**2 / counted.sum().clamp(min=1)


def hidden_distillation(
    student: Mapping[str, HiddenStates],
    teacher: Mapping[str, HiddenStates],
    layers: Layers = "last",
    positions: Positions = "text",
    stacks: Stacks = "both",
) -> Tensor:
    """Masked mean squared error of hidden states (paper section 3.2, L_Hidden).

    The paper does not say which layers and positions, so both are choices. Within a stack the mean goes over layers,
    counted positions and H; the stacks' means are added.

    Args:
        student: hidden states by "<stack>/<part>".
        teacher: the same keys and shapes; no gradient flows into them.
        layers: the last layer of each stack, or all.
        positions: text tokens, prompt tokens, or all.
        stacks: encoder, decoder, or both where the model has both.

    Returns:
        A scalar.

    Raises:
        ValueError: the model has none of the states asked for.
    """
    errors: dict[str, list[Tensor]] = {}
    counts: dict[str, list[Tensor]] = {}
    for key, ours in student.items():
        stack, part = key.split("/")
        if stacks not in ("both", stack) or positions not in ("all", part):
            continue
        chosen = slice(-1, None) if layers == "last" else slice(None)
        for mine, theirs in zip(ours.layers[chosen], teacher[key].layers[chosen], strict=True):
            squares = (_precise(mine) - _precise(theirs.detach())).square().mean(dim=-1)
            errors.setdefault(stack, []).append((squares * ours.weight).sum())
            counts.setdefault(stack, []).append(ours.weight.sum())
    if not errors:
        raise ValueError(
            f"No hidden states to distil: stacks={stacks!r}, positions={positions!r}, and the model has "
            f"{', '.join(student) or 'none'}. Choose among these."
        )
    means = [sum(errors[stack]) / sum(counts[stack]).clamp(min=1) for stack in errors]  # type: ignore[union-attr]
    return torch.stack(means).sum()
