"""What backbones return, and what prompts become in a decoder-only model."""

from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from mpt_lightning.backbones.gather import gather_layers
from mpt_lightning.objectives import Segment
from mpt_lightning.prompts import PromptOutput

# Keys and values of one layer, `[N, heads, S, D]` each.
Pair: TypeAlias = tuple[Tensor, Tensor]


@dataclass
class BackboneOutput:
    """The result of a forward pass.

    Attributes:
        logits: `[B, M, V]`, position m predicts label token m.
        hidden: Hidden states by "<stack>/<part>": encoder/prompt, encoder/text and decoder/text of an
            encoder-decoder, decoder/prompt and decoder/text of a decoder-only model. Empty unless asked for.
        prompt_logits: `[U, N, V]` at the requested positions of the prompts, or None.
    """

    logits: Tensor
    hidden: dict[str, Segment] = field(default_factory=dict)
    prompt_logits: Tensor | None = None


@dataclass
class EncodedPrompts:
    """Prompts after a pass through a decoder-only model: everything that rows need of them.

    Attributes:
        layers: Per layer the keys and values, `[U, heads, P, D]` each; empty if P is 0.
        hidden: Per layer the hidden states `[U, P, H]`; empty if the prompts are keys and values themselves.
        embeddings: The prompts' embeddings `[U, P, H]`; None if P is 0, or the prompts are keys and values themselves.
        shift: `[U, S, H]`, added to the embeddings of the text's tokens, or None.
        logits: `[U, N, V]` at the requested positions, or None.
    """

    layers: tuple[Pair, ...] = ()
    hidden: tuple[Tensor, ...] = ()
    embeddings: Tensor | None = None
    shift: Tensor | None = None
    logits: Tensor | None = None

    @property
    def length(self) -> int:
        """P, tokens per prompt."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def __getitem__(self, rows: Tensor) -> "EncodedPrompts":
        """Return some of the prompts, in the order of `rows` `[N]` in 0..U-1, without their logits."""
        return EncodedPrompts(
            gather_layers(self.layers, rows),
            tuple(states[rows] for states in self.hidden),
            None if self.embeddings is None else self.embeddings[rows],
            None if self.shift is None else self.shift[rows],
        )


# What every verb of a backbone takes; a tensor is plain embeddings `[U, P, H]`.
Prompts: TypeAlias = Tensor | PromptOutput | EncodedPrompts
