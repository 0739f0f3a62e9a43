"""Initial values `[P, H]` of prompts, on the CPU: sampled vocabulary, text, class labels, or random.

Initialisation and learning rate largely determine the results of prompt tuning: in PEFT's own runs they alone move the
result on one benchmark from 5.7 to 34.3 per cent.
"""

from collections.abc import Iterable, Sequence
from itertools import cycle, islice

import torch
from torch import Tensor

from mpt_lightning.errors import MPTError


def random_uniform(*shape: int) -> Tensor:
    """Return uniform numbers in [-0.5, 0.5], the original prompt tuning's random start."""
    return torch.rand(*shape) - 0.5


def sampled_vocabulary(embeddings: Tensor, length: int, top: int = 5000, exclude: Iterable[int] = ()) -> Tensor:
    """Return the embeddings of distinct tokens drawn from the backbone's table `[V, H]`; see `vocabulary_ids`."""
    return _rows(embeddings, vocabulary_ids(len(embeddings), length, top, exclude))


def vocabulary_ids(size: int, length: int, top: int = 5000, exclude: Iterable[int] = ()) -> list[int]:
    """Draw `length` distinct ids from the `top` most frequent of V tokens, but none of `exclude`: special tokens.

    Vocabularies are sorted by frequency, so the first ids are the most frequent.
    """
    banned = set(exclude)
    ids = [token for token in range(min(top, size)) if token not in banned]
    if len(ids) < length:
        raise MPTError(f"A prompt of {length} distinct tokens needs as many to draw from; there are {len(ids)}.")
    return torch.tensor(ids)[torch.randperm(len(ids))[:length]].tolist()


def from_token_ids(embeddings: Tensor, token_ids: Sequence[int], length: int) -> Tensor:
    """Return the embeddings of a text's tokens, at least one, repeated or cut to the prompt's length."""
    if not token_ids:
        raise MPTError("The text to start a prompt from has no tokens; give at least one word.")
    return _rows(embeddings, list(islice(cycle(token_ids), length)))


def from_class_labels(embeddings: Tensor, labels: Sequence[Sequence[int]], length: int) -> Tensor:
    """Return the class labels' embeddings first, then sampled vocabulary (Lester et al., 2021, section 3.1).

    `labels` are the token ids of each class word; the embeddings of a word's tokens are averaged.
    """
    words = [_rows(embeddings, ids).mean(dim=0) for ids in labels if len(ids)][:length]
    if len(words) == length:
        return torch.stack(words)
    rest = sampled_vocabulary(embeddings, length - len(words))
    return torch.cat([torch.stack(words), rest]) if words else rest


def _rows(embeddings: Tensor, ids: Sequence[int]) -> Tensor:
    """Copy the rows `[N, H]` of some tokens to the CPU, so that a start is the same on every device."""
    return embeddings.detach()[torch.tensor(list(ids), device=embeddings.device)].cpu()
