"""The interface between prompts and a frozen language model, and what both kinds of model share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from mpt_lightning.backbones.compilation import compile_parts
from mpt_lightning.backbones.fingerprint import fingerprint
from mpt_lightning.backbones.outputs import BackboneOutput, EncodedPrompts, Prompts
from mpt_lightning.backbones.pretrained import load_tokenizer
from mpt_lightning.errors import MPTError
from mpt_lightning.prompts import PromptOutput

Family = Literal["seq2seq", "causal"]
# A faster way to bring prompts to rows than copying their keys and values for every row.
Way = Literal["packed", "shared"]

# The label of padding, Hugging Face's and torch's convention.
IGNORE = -100


class Backbone(nn.Module, ABC):
    """A frozen Hugging Face model that takes prompts.

    `prompts` in every verb has one prompt per distinct task of the batch: the output of a `Prompt`, a tensor of
    embeddings `[U, P, H]`, or the result of `encode_prompts`. `rows` `[B]` contains which of the U prompts each row
    has. P = 0 is no prompt at all.

    Args:
        model: the model; its parameters are frozen here.
        name: Hub id or folder it came from.
        dropout: keep the model's dropout on while prompts train. Off by default, which is worth several points.
        gradient_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
        compiled: compile feed-forward networks and norms, see `compilation`.

    Raises:
        MPTError: the model cannot checkpoint gradients, or has nothing to compile.
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
        # Whether each rank holds a part of the model only (see `sharding`): then all ranks must make the same passes.
        self.sharded = False
        # What the model multiplies the embeddings of ids by, but not embeddings that it is given (Marian, Pegasus).
        self.input_scale = 1.0
        # Modules put into the model to be trained, each by itself: in training mode whatever `dropout` says.
        self.parts: list[nn.Module] = []
        if gradient_checkpointing:
            if not model.supports_gradient_checkpointing:
                raise MPTError(
                    f"{type(model).__name__} ({name}) cannot checkpoint gradients. Set gradient_checkpointing=False."
                )
            model.activation_checkpointing_enable({"use_reentrant": False})
        if compiled:
            compile_parts(model, name)
        self.train(self.training)

    @classmethod
    @abstractmethod
    def takes(cls, config: Any) -> bool:
        """Return whether a model of this configuration belongs to the family.

        Raises:
            MPTError: If it does, and is known to give wrong results.
        """

    @abstractmethod
    def bare_logits(self, inputs: Callable[[Tensor], dict[str, Tensor]], text: Tensor, answer: Tensor) -> Tensor:
        """Run the bare model on one row without padding; `probe` compares this with `forward`.

        Args:
            inputs: Turns token ids into the model's arguments: ids or embeddings.
            text: [1, L] token ids.
            answer: [1, M] token ids.

        Returns:
            The answer's logits `[1, M, V]`.
        """

    @property
    def dim(self) -> int:
        """H, the size of an input embedding."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the input embeddings, in which the model takes prompts."""
        found: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return found

    @property
    def embeddings(self) -> Tensor:
        """The input embeddings `[V, H]` as the model's layers receive them: scaled where the model scales them.

        If the model is sharded they are gathered, so that all ranks must ask for them.
        """
        module: Any = self.model.get_input_embeddings()
        table: Tensor = module.weight.full_tensor() if isinstance(module.weight, DTensor) else module.weight
        if type(module) is nn.Embedding and self.input_scale == 1:
            return table
        ids = torch.arange(len(table), device=table.device)
        scaled: Tensor = functional_call(module, {"weight": table}, ids) if table is not module.weight else module(ids)
        return scaled * self.input_scale

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model was made for, prompt included; None where its positions are relative."""
        config = self.model.config.get_text_config()
        found: int | None = getattr(config, "max_position_embeddings", None)
        return found if found and found > 0 else None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the model."""
        return load_tokenizer(self.name)

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of the model's weights; see `fingerprint.fingerprint`.

        It is computed once: before weights are trained, layers are put in, or the model is sharded.
        """
        return fingerprint(self.model)

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode; the model itself trains (has dropout) only when `dropout` is on."""
        super().train(mode)
        self.model.train(mode and self.dropout)
        for part in self.parts:
            part.training = mode  # not train(): PEFT's layers have the frozen ones inside them
        if self.gradient_checkpointing:
            # transformers checkpoints a layer only in training mode, which is not dropout: that is its children's.
            for layer in self.model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = mode
        return self

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the input embeddings `[B, L, H]` of token ids `[B, L]`; a prompt stands before these."""
        embeddings: Tensor = self.model.get_input_embeddings()(input_ids)
        return embeddings if self.input_scale == 1 else embeddings * self.input_scale

    def embed_shifted(self, shift: Tensor, rows: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed rows, and add to each token what belongs to its place in the text.

        Args:
            shift: [U, S, H]; tokens after the first S stay as they are.
            rows: [B] in 0..U-1.
            input_ids: [B, L].
            attention_mask: [B, L].

        Returns:
            [B, L, H].
        """
        text = self.embed(input_ids)
        place = attention_mask.cumsum(dim=1) - 1
        shifted = ((place < shift.shape[1]) & (attention_mask == 1))[..., None]
        index = place.clamp(0, shift.shape[1] - 1)[..., None].expand(-1, -1, text.shape[2])
        return text + shift.to(text.dtype)[rows].gather(1, index) * shifted

    def embed_among(self, prompts: Tensor, rows: Tensor, input_ids: Tensor) -> Tensor:
        """Embed rows among whose tokens the prompt's stand: id -1 is the prompt's first token, -2 its second.

        Args:
            prompts: [U, P, H].
            rows: [B] in 0..U-1.
            input_ids: [B, L].

        Returns:
            [B, L, H].
        """
        text = self.embed(input_ids.clamp(min=0))
        place = (-1 - input_ids).clamp(min=0)[..., None].expand(-1, -1, text.shape[2])
        own = prompts.to(text.dtype)[rows].gather(1, place)
        return torch.where(input_ids[..., None] < 0, own, text)

    def encode_prompts(self, prompts: Tensor | PromptOutput) -> PromptOutput | EncodedPrompts:
        """Compute what depends on the prompts alone.

        The result replaces the prompts in every verb, and is indexed by `[N]` rows as they are.
        """
        return PromptOutput.of(prompts)

    @abstractmethod
    def forward(
        self,
        prompts: Prompts,
        rows: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        hidden_states: bool = False,
    ) -> BackboneOutput:
        """Predict the label tokens, given the ones before.

        Args:
            prompts: Of the U distinct tasks.
            rows: [B] in 0..U-1.
            input_ids: [B, L].
            attention_mask: [B, L], 1 for tokens, padding on any side.
            labels: [B, M], -100 for padding, which is at the end.
            hidden_states: also give every layer's hidden states.

        Returns:
            Logits `[B, M, V]`, and hidden states where asked for.
        """

    @abstractmethod
    def score(
        self, prompts: Prompts, rows: Tensor, input_ids: Tensor, attention_mask: Tensor, choices: Tensor
    ) -> Tensor:
        """Give the log-likelihood of each choice; the input is encoded once.

        It is the sum over the choice's tokens, not their mean: of two choices that a model finds equally likely per
        token, the shorter one wins.

        Args:
            prompts: Of the U distinct tasks.
            rows: [B] in 0..U-1.
            input_ids: [B, L].
            attention_mask: [B, L].
            choices: [B, C, M] label tokens, -100 for padding; a choice of nothing but padding does not exist.

        Returns:
            [B, C] in nats, fp32; -inf where there is no choice.
        """

    @abstractmethod
    def generate(
        self, prompts: Prompts, rows: Tensor, input_ids: Tensor, attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """Generate label tokens.

        Args:
            prompts: Of the U distinct tasks.
            rows: [B] in 0..U-1.
            input_ids: [B, L].
            attention_mask: [B, L].
            **options: what `transformers`' `generate` takes, such as `max_new_tokens` and `num_beams`.

        Returns:
            [B, N] new token ids, filled up with the padding token.
        """


def align(input_ids: Tensor, attention_mask: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Move the padding of each row to one side, keeping the tokens' order.

    With the padding in one known place no result can depend on where a tokenizer put it.

    Args:
        input_ids: [B, L].
        attention_mask: [B, L].
        side: where padding goes, "left" or "right".

    Returns:
        The ids and the mask, [B, L] each.
    """
    key = attention_mask if side == "left" else 1 - attention_mask
    order = torch.argsort(key, dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the log-probabilities of label tokens.

    Args:
        logits: [N, M, V].
        labels: [N, M], -100 for padding.

    Returns:
        [N] in nats, fp32 or better.
    """
    precise = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    loss = nn.functional.cross_entropy(precise.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return -loss.view(labels.shape).sum(dim=1)
