"""Decoder-only models (GPT-2, Llama, ...): one pass over each distinct prompt, whose keys and values the rows reuse.

The prompt comes first, so its keys and values depend on the prompt alone. They are computed once per distinct prompt
and gathered per row: U·P + B·S tokens instead of B·(P + S). Gradients flow through them. Training runs prompts and rows
as one packed sequence if the model allows it (`packed`), otherwise first the prompts, then the rows.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from mpt_lightning.backbones.attention import NAME
from mpt_lightning.backbones.base import Backbone, BackboneOutput, EncodedPrompts, Inputs, align
from mpt_lightning.backbones.cache import Pair, PrefixCache, gather_layers
from mpt_lightning.backbones.limits import attention_windows, length_limit
from mpt_lightning.backbones.packed import packed_forward
from mpt_lightning.backbones.sharding import tie
from mpt_lightning.errors import MPTError
from mpt_lightning.objectives import IGNORE, Segment, log_likelihood
from mpt_lightning.prompts import PromptOutput


class CausalBackbone(Backbone):
    """A frozen decoder-only model whose layers are all attention; see `Backbone` for the arguments.

    The state of other layers cannot be split at a prefix.
    """

    family = "causal"
    auto_model = AutoModelForCausalLM

    def __init__(self, model: PreTrainedModel, name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, name, *args, **kwargs)
        config = model.config.get_text_config(decoder=True)
        kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        if kinds:
            raise MPTError(
                f"{type(model).__name__} ({name}) has layers of the kind {', '.join(sorted(kinds))}. "
                "Prompts need a decoder with full or sliding-window attention in every layer."
            )
        self._num_layers: int = config.num_hidden_layers
        self._limit = length_limit(config)
        # Our attention function packs prompts and rows into one pass, and without gradients reads a shared prefix
        # without copying it for every row. With gradients copies are faster, on a CPU by a tenth, since otherwise the
        # attention weights would have to be kept.
        replaceable = config._attn_implementation == "sdpa" and model._supports_attention_backend
        if replaceable and not attention_windows(config):
            self.ways = {"packed", "shared"}
            model.set_attn_implementation(NAME)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                # Our caches are read-only, so a layer can be recomputed with them.
                layer._can_checkpoint_with_cache = True

    @classmethod
    def takes(cls, config: Any) -> bool:
        """Return whether the model is decoder-only; encoders with a causal head in transformers are not."""
        kind = type(config)
        encoder = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
        return not config.is_encoder_decoder and kind in MODEL_FOR_CAUSAL_LM_MAPPING and not encoder

    def bare_logits(
        self, inputs: Callable[[Tensor], dict[str, Tensor]], prompt: Tensor, text: Tensor, answer: Tensor
    ) -> Tensor:
        """See `Backbone.bare_logits`."""
        whole = torch.cat([prompt, text, answer], dim=1)
        return self.model(**inputs(whole), use_cache=False).logits[:, -answer.shape[1] - 1 : -1]

    @property
    def max_positions(self) -> int | None:
        """The longest sequence, prompt included: the model's positions, or a smaller limit of its attention."""
        limits = (super().max_positions, self._limit.columns if self._limit else None)
        return min(filter(None, limits), default=None)

    def _check_length(self, columns: int) -> None:
        """Raise if the model would treat a prompt or padding differently at this length; see `limits`."""
        if self._limit is not None and columns > self._limit.columns:
            raise MPTError(
                f"The prompt, text and answer take {columns} columns, and {self.name} {self._limit.reason}. Use "
                "shorter texts (max_input_length) or a shorter prompt."
            )

    def encode_prompts(self, prompts: Tensor | PromptOutput, predict_at: Tensor | None = None) -> EncodedPrompts:
        """Run the model over the prompts, once each; keys and values, and encoded prompts, need no pass.

        `predict_at` `[N]` are positions in 0..P-1 whose logits for the next token are returned too.
        """
        return self._encode(prompts, predict_at)

    def keys_and_values(self, embeddings: Tensor) -> tuple[Pair, ...]:
        """See `Backbone.keys_and_values`."""
        return self._encode(embeddings).layers or ()

    def _encode(self, prompts: Tensor | PromptOutput, predict_at: Tensor | None = None) -> EncodedPrompts:
        """Run `encode_prompts` within another method: FSDP counts each public method as one pass."""
        if isinstance(prompts, EncodedPrompts):
            return prompts
        given = PromptOutput.of(prompts)
        embeddings = given.embeddings
        if embeddings is None:
            return EncodedPrompts(layers=given.layers)
        if not given.length:
            return EncodedPrompts(shift=given.shift, hidden=(embeddings,) * self._num_layers)
        cache = PrefixCache(self._num_layers)
        # `logits_to_keep=1` avoids a vocabulary-sized output, since a prompt usually predicts nothing.
        output = self.model(
            inputs_embeds=embeddings.to(self.dtype, copy=True),  # CTRL scales its inputs in place
            past_key_values=cache,
            use_cache=not self.gradient_checkpointing,
            output_hidden_states=True,
            logits_to_keep=1 if predict_at is None else predict_at,
            return_dict=True,
        )
        layers, hidden = cache.contents(), tuple(output.hidden_states[1:])
        if self.sharded:
            layers = (*layers[:-1], tie(*layers[-1], hidden[-1]))
        logits = None if predict_at is None else output.logits
        return EncodedPrompts(embeddings, layers, given.shift, hidden=hidden, logits=logits)

    def _prefix(self, encoded: EncodedPrompts, rows: Tensor, whole: bool = True) -> PrefixCache:
        """Return the cache for a pass over the rows `[B]`; with `whole` each row attends to all of its prompt."""
        if not encoded.length:
            return PrefixCache(self._num_layers)
        if "shared" in self.ways and whole and len(encoded.layers[0][0]) == 1 and not torch.is_grad_enabled():
            return PrefixCache(self._num_layers, shared=encoded.layers)
        return PrefixCache(gather_layers(encoded.layers, rows))

    def _among(
        self, encoded: EncodedPrompts, rows: Tensor, input_ids: Tensor, text: Tensor
    ) -> tuple[EncodedPrompts, Tensor]:
        """Return what precedes the rows, and the rows: ids, or embeddings if these depend on the prompt.

        `text` `[B, S]` is 1 at the text's tokens, and 0 at padding and the answer's tokens.
        """
        if encoded.shift is not None:
            return encoded, self.add_shift(self.embed(input_ids), encoded.shift, rows, text)
        if encoded.embeddings is None or not self.has_places(input_ids, encoded.embeddings.shape[1]):
            return encoded, input_ids
        return EncodedPrompts(), self.embed_among(encoded.embeddings, rows, input_ids)

    def _read(
        self,
        cache: Any,
        *,
        past: Tensor,
        before: Tensor | int,
        tokens: Tensor,
        mask: Tensor,
        keep: int,
        hidden_states: bool = False,
    ) -> Any:
        """Run tokens `[N, S]`, or embeddings `[N, S, H]`, after a cache; return logits for the last `keep` ones.

        `past` `[N, P]` is the cache's mask. `before` `[N, 1]`, or a number, is the number of tokens in the cache,
        including those that rows do not attend to.
        """
        full = torch.cat([past, mask], dim=1)
        self._check_length(full.shape[1])
        # Positions count tokens, not columns: neither padding nor its side moves a token.
        positions = (before + mask.cumsum(dim=1) - 1).clamp(min=0)
        options = {"position_ids": positions} if self._takes_positions else {}
        return self.model(
            **{"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens},
            attention_mask=full,
            past_key_values=cache,
            use_cache=not self.gradient_checkpointing,
            logits_to_keep=keep,
            output_hidden_states=hidden_states,
            return_dict=True,
            **options,
        )

    def forward(
        self,
        prompts: Tensor | PromptOutput,
        rows: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        hidden_states: bool = False,
        prompt_mask: Tensor | None = None,
        predict_at: Tensor | None = None,
    ) -> BackboneOutput:
        """Predict the label tokens; see `Backbone.forward`.

        `prompt_mask` `[B, P]` is 1 where a row attends to its prompt's token, by default everywhere. `predict_at` `[N]`
        are positions in 0..P-1 of the prompts; the output's `prompt_logits` are those of the next tokens.
        """
        # With padding on the left all texts end in the same column, and the labels' logits are the last M columns.
        input_ids, attention_mask = align(input_ids, attention_mask, "left")
        given, read = labels[:, :-1], labels[:, 1:] != IGNORE  # a row's last label is never an input
        whole = torch.cat([input_ids, given.clamp(min=0)], dim=1)
        mask = torch.cat([attention_mask, read.to(attention_mask.dtype)], dim=1)
        packable = self._packable(prompts)
        if packable is not None and not self.has_places(input_ids, packable.shape[1]):
            self._check_length(packable.shape[1] + whole.shape[1])
            return packed_forward(
                self, packable, rows, whole, mask, predicted=labels.shape[1], hidden_states=hidden_states,
                prompt_mask=prompt_mask, predict_at=predict_at,
            )  # fmt: skip
        encoded = self._encode(prompts, predict_at)
        prompt_logits = encoded.logits
        encoded, tokens = self._among(encoded, rows, whole, torch.cat([attention_mask, torch.zeros_like(given)], dim=1))
        output = self._read(
            self._prefix(encoded, rows, whole=prompt_mask is None),
            past=attention_mask.new_ones(len(rows), encoded.length) if prompt_mask is None else prompt_mask,
            before=encoded.length,
            tokens=tokens,
            mask=mask,
            keep=labels.shape[1],
            hidden_states=hidden_states,
        )
        result = BackboneOutput(output.logits, prompt_logits=prompt_logits)
        if hidden_states:
            result.hidden = {"decoder/text": Segment(tuple(output.hidden_states[1:]), mask)}
            if encoded.hidden:
                shared_by = torch.bincount(rows, minlength=len(encoded.hidden[0]))
                result.hidden["decoder/prompt"] = Segment(encoded.hidden, shared_by[:, None].expand(-1, encoded.length))
        return result

    def _packable(self, prompts: Tensor | PromptOutput) -> Tensor | None:
        """Return the embeddings `[U, P, H]` if they can run in one pass with rows, which is faster with gradients."""
        fits = "packed" in self.ways and self._takes_positions and not self.gradient_checkpointing
        if not fits or not torch.is_grad_enabled() or isinstance(prompts, EncodedPrompts):
            return None
        given = PromptOutput.of(prompts)
        return given.embeddings if given.shift is None and given.length else None

    def _likelihood(self, inputs: Inputs, of_row: Tensor, labels: Tensor) -> Tensor:
        prompts, rows, input_ids, attention_mask = inputs
        encoded = self._encode(prompts)
        input_ids, attention_mask = align(input_ids, attention_mask, "left")
        encoded, tokens = self._among(encoded, rows, input_ids, attention_mask)
        past = attention_mask.new_ones(len(rows), encoded.length)
        cache = self._prefix(encoded, rows)
        first = self._read(cache, past=past, before=encoded.length, tokens=tokens, mask=attention_mask, keep=1).logits
        given = labels[:, :-1]
        if self.sharded and not given.shape[1]:  # a second pass on every rank, whatever the choices on others
            given = labels
        if not given.shape[1]:
            return log_likelihood(first[of_row], labels)
        # All choices of a text reuse its keys and values; only the choices' tokens are run.
        rest = self._read(
            PrefixCache(gather_layers(cache.contents(), of_row), cache.shared),
            past=torch.cat([past, attention_mask], dim=1)[of_row],
            before=encoded.length + attention_mask.sum(dim=1, keepdim=True)[of_row],
            tokens=given.clamp(min=0),
            mask=(given != IGNORE).to(attention_mask.dtype),
            keep=given.shape[1],
        ).logits
        return log_likelihood(torch.cat([first[of_row], rest], dim=1)[:, : labels.shape[1]], labels)

    def generate(
        self, prompts: Tensor | PromptOutput, rows: Tensor, input_ids: Tensor, attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """Generate label tokens; see `Backbone.generate`."""
        encoded = self._encode(prompts)
        input_ids, attention_mask = align(input_ids, attention_mask, "left")
        encoded, tokens = self._among(encoded, rows, input_ids, attention_mask)
        self._check_length(encoded.length + input_ids.shape[1] + (options.get("max_new_tokens") or 1))
        if tokens.is_floating_point():
            if encoded.length:  # transformers' `generate` takes no cache together with embeddings
                prompt: Any = encoded.embeddings  # which every prompt with a shift has
                tokens = torch.cat([prompt.to(tokens.dtype)[rows], tokens], dim=1)
                attention_mask = torch.cat([attention_mask.new_ones(len(rows), encoded.length), attention_mask], dim=1)
            return self.model.generate(inputs_embeds=tokens, attention_mask=attention_mask, **options)
        # `generate` expects an id for every cached position, and skips it.
        stand_in = input_ids.new_zeros(len(rows), encoded.length)
        copies = max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
        prefix = DynamicCache(gather_layers(encoded.layers, rows.repeat_interleave(copies))) if encoded.length else None
        written = self.model.generate(
            input_ids=torch.cat([stand_in, input_ids], dim=1),
            attention_mask=torch.cat([torch.ones_like(stand_in), attention_mask], dim=1),
            past_key_values=prefix,
            **options,
        )
        return written[:, encoded.length + input_ids.shape[1] :]
