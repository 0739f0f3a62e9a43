"""Checking at load time that a model gives the same results with prompts as by itself.

A prompt of known tokens' embeddings before a text must have the same logits as the ids of both in the bare model, for
rows of different lengths in one padded batch. Models fail if they scale embeddings, count positions in columns, change
keys behind the cache, or attend to later tokens.
"""

import logging
from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mpt_lightning.backbones.base import Backbone, Way
from mpt_lightning.backbones.miniature import miniature
from mpt_lightning.errors import MPTError
from mpt_lightning.io import one_line

logger = logging.getLogger(__name__)

# Tokens of the prompt, of two texts and of an answer to each.
PROMPT, TEXTS, ANSWER = 3, (4, 2), 2
# The largest rounding error, in standard deviations of the logits. In float32 it is about 1e-6 per layer. Half
# precision has 8 bits per number, and 8-bit layers round activations too, so that only large errors are detected.
TOLERANCE, HALF_TOLERANCE = 3e-4, 0.1
# Parameters; a larger model is represented by its miniature, since each pass reads all weights.
SMALL = 10_000_000


@torch.no_grad()
def check_backbone(backbone: Backbone) -> None:
    """Compare a backbone with its bare model on a few tokens, and choose the ways that give the same results.

    Large models are represented by a miniature of the same class and settings, in float32. If a miniature cannot be
    built, or fails the check, the model itself is checked. If no way gives the model's own results, an MPTError
    contains the cause and the size of the error.
    """
    if backbone.model.num_parameters() > SMALL:
        try:
            small = type(backbone)(miniature(backbone.model), backbone.name)
            _choose_ways(small)
        except Exception as failure:  # e.g. sizes of a configuration that depend on each other
            logger.info("%s is checked with all its weights: %s", backbone.name, one_line(failure))
        else:
            backbone.ways &= small.ways
            return
    training = backbone.training
    _choose_ways(backbone.eval())
    backbone.train(training)


def _choose_ways(backbone: Backbone) -> None:
    """Remove the faster ways that give wrong results; raise if the plain one does."""
    ids = _plain_ids(backbone).to(backbone.model.get_input_embeddings().weight.device)
    prompt, *texts, answers = ids.split([PROMPT, *TEXTS, 2 * ANSWER])
    with backbone.probing(texts, answers[0]) as read:
        probe = _Probe(backbone, prompt, read, answers.view(2, ANSWER))
        for way in sorted(backbone.ways):
            if problem := probe.problem(way):
                backbone.ways.discard(way)
                logger.info("%s: prompts are copied, not %s: %s", backbone.name, way, problem)
        # A shared prefix is a cached one without its copies: if it is right, so are the copies.
        if "shared" not in backbone.ways and (problem := probe.problem()):
            raise MPTError(probe.refusal(problem))


class _Probe:
    """Two rows with one prompt, and the bare model's logits of their answers."""

    def __init__(self, backbone: Backbone, prompt: Tensor, texts: list[Tensor], answers: Tensor) -> None:
        self.backbone, model = backbone, backbone.model
        self.prompt, self.texts, self.answers = prompt, texts, answers
        self.ids = pad_sequence(texts, batch_first=True)
        self.mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        self.expected: Tensor | None = None
        half = model.dtype in (torch.float16, torch.bfloat16) or getattr(model, "is_quantized", False)
        self.tolerance = HALF_TOLERANCE if half else TOLERANCE

    def problem(self, way: Way | None = None) -> str:
        """Return what is wrong with one way to bring prompts to rows, or an empty string; None copies prompts."""
        try:
            if self.expected is None:
                self.expected = self._bare(lambda ids: {"input_ids": ids})
            # For a backbone the same prompt twice is two prompts, which cannot be shared.
            count = 1 if way == "shared" else 2
            prompts = self.backbone.embed(self.prompt).expand(count, -1, -1)
            rows = torch.arange(2, device=self.ids.device) % count
            with torch.set_grad_enabled(way == "packed"):  # selects the training pass; nothing needs a gradient
                logits = self.backbone(prompts, rows, self.ids, self.mask, self.answers).logits
            error = self._error(logits, self.expected)
        except Exception as failure:  # models reject arguments in any way
            return f"it fails: {one_line(failure)}"
        return "" if error <= self.tolerance else f"logits are off by {error:.2g} of their standard deviation"

    def refusal(self, problem: str) -> str:
        """Return the error message of a model that cannot be used."""
        name = f"{type(self.backbone.model).__name__} ({self.backbone.name})"
        return (
            f"{name} cannot take prompts: with a prompt of embeddings before padded texts, compared with the bare "
            f"model on the same tokens, {problem}. {self._cause()} Use another backbone; to use this one anyway, "
            "set --model.backbone_check false (load_backbone(..., check=False))."
        )

    def _cause(self) -> str:
        if self.expected is None:
            return "The bare model itself does not run on token ids alone."
        try:
            embedded = self._bare(lambda ids: {"inputs_embeds": self.backbone.embed(ids)})
        except Exception as failure:
            return f"It does not take embeddings instead of ids: {one_line(failure)}."
        if (error := self._error(embedded, self.expected)) > self.tolerance:
            return f"Without any padding, it gives other logits for embeddings than for their ids (off by {error:.2g})."
        return "Without padding it gives the same logits for embeddings as for their ids."

    def _bare(self, inputs: Callable[[Tensor], dict[str, Tensor]]) -> Tensor:
        """Return the bare model's logits `[2, ANSWER, V]` of the answers, each row alone without padding."""
        rows = zip(self.texts, self.answers, strict=True)
        return torch.cat([self.backbone.bare_logits(inputs, self.prompt[None], a[None], b[None]) for a, b in rows])

    def _error(self, logits: Tensor, expected: Tensor) -> float:
        """Return the root mean square of the difference, in standard deviations of the expected logits."""
        difference = (logits.double() - expected.double()).square().mean().sqrt()
        return float((difference / expected.double().std()).nan_to_num(torch.inf, torch.inf))


def _plain_ids(backbone: Backbone) -> Tensor:
    """Return distinct token ids, spread over the vocabulary, without special tokens."""
    config = backbone.model.config.get_text_config()
    special = {value for name, value in config.to_dict().items() if name.endswith("token_id") and type(value) is int}
    size = config.vocab_size
    count = PROMPT + sum(TEXTS) + 2 * ANSWER
    drawn = ((size // 2 + 7919 * step) % size for step in range(size))  # a prime, so that no token comes twice
    return torch.tensor(list(islice((token for token in drawn if token not in special), count)))
