"""The interface between prompts and a frozen language model, and what all families share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from mpt_lightning.backbones.cache import Pair
from mpt_lightning.backbones.compilation import compile_parts
from mpt_lightning.backbones.fingerprint import fingerprint
from mpt_lightning.backbones.pretrained import load_tokenizer
from mpt_lightning.errors import MPTError
from mpt_lightning.objectives import IGNORE, Segment
from mpt_lightning.prompts import PromptOutput

Family = Literal["seq2seq", "causal", "masked"]
# What the training loss is a cross-entropy over, and the default of each family.
Over = Literal["choices", "vocabulary"]
OVER: dict[Family, Over] = {"seq2seq": "vocabulary", "causal": "vocabulary", "masked": "choices"}
# Faster alternatives to copying the prompts' keys and values for every row. With gradients "packed": prompts and rows
# run in one pass. Without gradients "shared": all rows attend to the same keys and values of one prompt.
Way = Literal["packed", "shared"]
# Prompts, rows, input ids and attention mask; see `Backbone`.
Inputs: TypeAlias = tuple[Tensor | PromptOutput, Tensor, Tensor, Tensor]


@dataclass
class BackboneOutput:
    """The result of a forward pass.

    Attributes:
        logits: `[B, M, V]`, position m predicts label token m.
        hidden: Hidden states by "<stack>/<part>": encoder/prompt, encoder/text and decoder/text of an
            encoder-decoder, the first two of a masked model, decoder/prompt and decoder/text of a decoder-only model.
            Empty unless requested.
        prompt_logits: `[U, N, V]` at the requested positions of the prompts, or None.
    """

    logits: Tensor
    hidden: dict[str, Segment] = field(default_factory=dict)
    prompt_logits: Tensor | None = None


@dataclass
class EncodedPrompts(PromptOutput):
    """Prompts after a pass through a decoder-only model, with the keys and values of all layers.

    Attributes:
        hidden: Per layer the hidden states `[U, P, H]`; empty if the prompts were keys and values.
        logits: `[U, N, V]` at the requested positions, or None.
    """

    hidden: tuple[Tensor, ...] = ()
    logits: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> "EncodedPrompts":
        """Return some of the prompts, in the order of `rows` `[N]` in 0..U-1, without their logits."""
        part = super().__getitem__(rows)
        hidden = tuple(states[rows] for states in self.hidden)
        return EncodedPrompts(part.embeddings, part.layers, part.shift, hidden=hidden)


class Backbone(nn.Module, ABC):
    """A frozen Hugging Face model that takes prompts.

    `forward`, `score` and `generate` take the same first four arguments:

    - `prompts`: One prompt per distinct task of the batch: the output of a `Prompt`, embeddings `[U, P, H]`, or the
      result of `encode_prompts`. P = 0 is no prompt.
    - `rows` `[B]` in 0..U-1: The prompt of each row.
    - `input_ids` `[B, L]` and `attention_mask` `[B, L]`, 1 for tokens; padding on any side.

    Args:
        model: The model; its parameters are frozen here.
        name: Hub id or folder it came from.
        dropout: Keep the model's dropout on while prompts train. Off by default, which is worth several points.
        gradient_checkpointing: Recompute each layer in the backward pass instead of keeping its activations.
        compiled: Compile feed-forward networks and norms; see `compilation`.

    Raises:
        ValueError: If the model cannot checkpoint gradients, or has nothing to compile.
    """

    family: ClassVar[Family]
    # The class of transformers that loads such models.
    auto_model: ClassVar[Any]

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        dropout: bool = False,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False)
        self.name = name
        self.dropout = dropout
        self.gradient_checkpointing = gradient_checkpointing
        # The faster ways that give the model's own results; `check_backbone` removes the others.
        self.ways: set[Way] = set()
        # Whether each rank holds only a part of the model (see `sharding`): then all ranks must run the same passes.
        self.sharded = False
        # The model's factor for embeddings of ids, which it does not apply to `inputs_embeds` (Marian, Pegasus).
        self.input_scale = 1.0
        # Trained modules inside the model (adapters): in training mode independently of `dropout`.
        self.parts: list[nn.Module] = []
        if gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if compiled:
            compile_parts(model, name)
        self.train(self.training)

    @classmethod
    @abstractmethod
    def takes(cls, config: Any) -> bool:
        """Return whether a model of this configuration belongs to the family; raise if its results are wrong."""

    @abstractmethod
    def bare_logits(
        self, inputs: Callable[[Tensor], dict[str, Tensor]], prompt: Tensor, text: Tensor, answer: Tensor
    ) -> Tensor:
        """Return the bare model's logits `[1, M, V]` of an answer `[1, M]` to a text `[1, L]`, for the `probe`.

        The text has the prompt `[1, P]` of token ids where the backbone puts it. `inputs` turns token ids into the
        model's arguments: ids or embeddings.
        """

    @property
    def dim(self) -> int:
        """H, the size of an input embedding."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the input embeddings, in which the model takes prompts."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def embeddings(self) -> Tensor:
        """The input embeddings `[V, H]` as the model's layers receive them, scaled if the model scales them.

        A sharded model gathers them, so that all ranks must read this property.
        """
        module: Any = self.model.get_input_embeddings()
        table: Tensor = module.weight.full_tensor() if isinstance(module.weight, DTensor) else module.weight
        if type(module) is nn.Embedding and self.input_scale == 1:
            return table
        ids = torch.arange(len(table), device=table.device)
        return functional_call(module, {"weight": table}, ids) * self.input_scale

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model was trained for, prompt included; None if its positions are relative."""
        size: int = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 0
        return size if size > 0 else None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the model."""
        return load_tokenizer(self.name)

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of the model's weights, see `fingerprint`; read it before weights or layers change."""
        return fingerprint(self.model)

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode; the model itself is in training mode (has dropout) only if `dropout` is on."""
        super().train(mode)
        self.model.train(mode and self.dropout)
        for part in self.parts:
            part.training = mode  # not train(): PEFT's layers contain the frozen ones
        if self.gradient_checkpointing:
            # transformers checkpoints a layer only in training mode; dropout is a matter of the layer's children.
            for layer in self.model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = mode
        return self

    @contextmanager
    def probing(self, texts: list[Tensor], spare: Tensor) -> Iterator[list[Tensor]]:
        """Yield texts `[L]` of plain token ids as the family reads texts, for the `probe`; they lack the id `spare`."""
        yield texts

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the input embeddings `[B, L, H]` of token ids `[B, L]`, without a prompt."""
        embeddings: Tensor = self.model.get_input_embeddings()(input_ids)
        return embeddings if self.input_scale == 1 else embeddings * self.input_scale

    def add_shift(self, text: Tensor, shift: Tensor, rows: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the embeddings `[B, L, H]` of texts, with a shift `[U, S, H]` added to their first S tokens."""
        place = attention_mask.cumsum(dim=1) - 1
        shifted = ((place < shift.shape[1]) & (attention_mask == 1))[..., None]
        index = place.clamp(0, shift.shape[1] - 1)[..., None].expand(-1, -1, text.shape[2])
        return text + shift.to(text.dtype)[rows].gather(1, index) * shifted

    def has_places(self, input_ids: Tensor, length: int, mixed: bool = False) -> bool:
        """Return whether rows `[B, L]` have places for a prompt's tokens; `mixed` allows rows without beside them.

        Raises:
            MPTError: If a row has another number of places than the prompt has tokens.
        """
        counts = (input_ids < 0).sum(dim=1)
        if (found := bool(counts.any())) and bool((wrong := (counts != length) & ((counts > 0) | (not mixed))).any()):
            raise MPTError(
                f"A row of the batch has places for {int(counts[wrong][0])} prompt tokens ([prompt*N]), expected "
                f"{length}, the prompt's length, in all rows or in none. Change templates or texts with [prompt*N]."
            )
        return found

    def embed_among(self, prompts: Tensor, rows: Tensor, input_ids: Tensor) -> Tensor:
        """Return the embeddings `[B, L, H]` of rows; id -1 is the first token of a row's prompt, -2 the second."""
        text = self.embed(input_ids.clamp(min=0))
        place = (-1 - input_ids).clamp(min=0)[..., None].expand(-1, -1, text.shape[2])
        own = prompts.to(text.dtype)[rows].gather(1, place)
        return torch.where(input_ids[..., None] < 0, own, text)

    def encode_prompts(self, prompts: Tensor | PromptOutput) -> PromptOutput:
        """Compute what depends on the prompts alone; every other method takes the result in their place."""
        return PromptOutput.of(prompts)

    @abstractmethod
    def keys_and_values(self, embeddings: Tensor) -> tuple[Pair, ...]:
        """Return per layer the keys and values `[1, heads, P, D]` of a prompt's embeddings `[1, P, H]`."""

    @abstractmethod
    def forward(
        self,
        prompts: Tensor | PromptOutput,
        rows: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        hidden_states: bool = False,
    ) -> BackboneOutput:
        """Predict each label token from the ones before.

        `labels` `[B, M]` are padded at the end with -100. With `hidden_states` the output has those of every layer.
        """

    def score(
        self, prompts: Tensor | PromptOutput, rows: Tensor, input_ids: Tensor, attention_mask: Tensor, choices: Tensor
    ) -> Tensor:
        """Return the log-likelihood `[B, C]` of each choice in nats, fp32; the input is encoded once.

        It is the sum over the choice's tokens, not their mean: of two choices with the same likelihood per token, the
        shorter one wins. `choices` `[B, C, M]` are label tokens, -100 for padding; a choice of padding alone does not
        exist, and gets -inf.
        """
        exists = (choices != IGNORE).any(dim=2)
        of_row, _ = exists.nonzero(as_tuple=True)
        scores = torch.full(exists.shape, float("-inf"), device=choices.device)
        if not len(of_row):
            return scores
        likelihood = self._likelihood((prompts, rows, input_ids, attention_mask), of_row, choices[exists])
        return scores.to(likelihood.dtype).masked_scatter(exists, likelihood)

    @abstractmethod
    def _likelihood(self, inputs: Inputs, of_row: Tensor, labels: Tensor) -> Tensor:
        """Return the log-likelihood `[N]` of choices `[N, M]`, -100 for padding, of the rows `[N]` in 0..B-1."""

    @abstractmethod
    def generate(
        self, prompts: Tensor | PromptOutput, rows: Tensor, input_ids: Tensor, attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """Generate new token ids `[B, N]`, filled up with the padding token.

        `options` are those of transformers' `generate`, such as `max_new_tokens` and `num_beams`.
        """


def align(input_ids: Tensor, attention_mask: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Move the padding of ids `[B, L]` and their mask `[B, L]` to one side, "left" or "right", keeping tokens in order.

    With the padding in one known place no result can depend on where a tokenizer put it.
    """
    key = attention_mask if side == "left" else 1 - attention_mask
    order = torch.argsort(key, dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)
