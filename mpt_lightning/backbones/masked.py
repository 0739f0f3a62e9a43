"""Masked language models (BERT, RoBERTa, ModernBERT, ...): the prompt follows [CLS], the answer is read at [MASK].

A new architecture needs no code here if `AutoModelForMaskedLM` knows its configuration (`AutoModelForMaskedLM.register`
for one's own), its `base_model` takes `inputs_embeds` and `attention_mask` and returns a `last_hidden_state`, and its
head reads one position at a time. The check at load time (`probe`) compares it with its own results on single rows.
What goes wrong only on longer texts than the check's is listed by type in `limits.check_masked`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM, PreTrainedModel

from mpt_lightning.backbones.base import Backbone, BackboneOutput, Inputs, align
from mpt_lightning.backbones.cache import Pair, gather_layers
from mpt_lightning.backbones.columns import insert, keep_columns
from mpt_lightning.backbones.layer_prefix import NAME, keys_and_values, prefixed
from mpt_lightning.backbones.limits import attention_windows, check_masked, rotation_limits
from mpt_lightning.errors import MPTError
from mpt_lightning.objectives import IGNORE, Segment, precise
from mpt_lightning.prompts import PromptOutput


class MaskedBackbone(Backbone):
    """A frozen bidirectional encoder with a masked language model's head; see `Backbone` for the arguments.

    Each row begins with [CLS] and has one [MASK]. The model reads `[CLS] prompt text-with-[MASK] [SEP]`; if some of
    its layers attend to a window of neighbours only (ModernBERT), the prompt stands before the mask instead, where all
    layers read it. For an answer of M tokens the mask stands M times. The text after a separator is the second segment
    of models with token types.
    """

    family = "masked"
    auto_model = AutoModelForMaskedLM

    def __init__(self, model: PreTrainedModel, name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, name, *args, **kwargs)
        if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
            model.set_attn_implementation(NAME)
        self._attention: list[nn.Module] = []  # the layers' attention modules, once a prefix needs them
        self._local = bool(attention_windows(model.config))
        # While the model is checked, the id that stands for [MASK]; the tokenizer may not be there.
        self._stand_in: int | None = None

    @classmethod
    def takes(cls, config: Any) -> bool:
        """Return whether the model is an encoder with a masked language model's head in transformers."""
        known = type(config) in MODEL_FOR_MASKED_LM_MAPPING
        if taken := known and not config.is_encoder_decoder and not getattr(config, "is_decoder", False):
            check_masked(config)
        return taken

    @property
    def mask_id(self) -> int:
        """The id of the mask."""
        return int(self.tokenizer.mask_token_id) if self._stand_in is None else self._stand_in

    @cached_property
    def second_type(self) -> int:
        """The token type of the text after a separator, as the tokenizer encodes pairs; 0 without token types."""
        if getattr(self.model.config, "type_vocab_size", 0) < 2:
            return 0
        return max(self.tokenizer("a", "a", return_token_type_ids=True)["token_type_ids"])

    @cached_property
    def max_positions(self) -> int | None:
        """The longest sequence, prompt included; RoBERTa's positions begin after its padding id."""
        sizes = [super().max_positions, *(limit.columns for limit in rotation_limits(self.model.config))]
        for name, module in self.model.named_modules():
            padding = getattr(module, "padding_idx", None)
            if name.endswith("position_embeddings") and padding is not None:
                sizes.append(module.num_embeddings - padding - 1)
        return min(filter(None, sizes), default=None)

    @contextmanager
    def probing(self, texts: list[Tensor], spare: Tensor) -> Iterator[list[Tensor]]:
        """Yield texts that end with a mask, for which the spare id stands."""
        self._stand_in = int(spare)
        try:
            yield [torch.cat([text[:-1], spare[None]]) for text in texts]
        finally:
            self._stand_in = None

    def bare_logits(
        self, inputs: Callable[[Tensor], dict[str, Tensor]], prompt: Tensor, text: Tensor, answer: Tensor
    ) -> Tensor:
        """See `Backbone.bare_logits`."""
        masks = text[:, -1:].expand_as(answer)
        before = [text[:, :-1], prompt] if self._local else [text[:, :1], prompt, text[:, 1:-1]]
        return self.model(**inputs(torch.cat([*before, masks], dim=1))).logits[:, -answer.shape[1] :]

    def keys_and_values(self, embeddings: Tensor) -> tuple[Pair, ...]:
        """See `Backbone.keys_and_values`."""
        return keys_and_values(self.model, embeddings)[1]

    def _prefix(self, layers: Sequence[Pair], rows: Tensor) -> AbstractContextManager[None]:
        """Return the context of a pass in which each layer has the prefix of its rows `[B]`."""
        if self.gradient_checkpointing:
            raise MPTError(
                "Prefixes in the layers of a masked model cannot be recomputed in the backward pass. Set "
                "--model.gradient_checkpointing false."
            )
        if not self._attention:
            with torch.no_grad():
                self._attention, _ = keys_and_values(self.model, self.embed(rows.new_zeros(1, 1)))
        return prefixed(self._attention, gather_layers(layers, rows))

    def _arrange(self, prompts: PromptOutput, inputs: Inputs, masks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Put the prompt's tokens and further masks into rows that need `masks` `[B]` of them; None for a classifier.

        Returns:
            Ids `[B, S]` with -1, -2, ... for the prompt's tokens, their mask `[B, S]`, and the columns `[B, M]` of the
            masks, repeated where a row has fewer; that of [CLS] for a classifier.
        """
        ids, mask = align(*inputs[2:], "right")
        place = torch.zeros_like(ids[:, 0]) if masks is None else self._place(ids, mask)
        length = 0 if prompts.embeddings is None else prompts.length
        without = (ids >= 0).all(dim=1)  # rows of templates that have no places for the prompt
        self.has_places(ids, length, mixed=True)
        if length and bool(without.any()):
            beside = self._local and masks is not None
            new = torch.arange(-1, -1 - length, -1, device=ids.device)
            at, count = place if beside else torch.ones_like(place), length * without
            ids, mask = insert(ids, mask, at, new, count)
            place = place + count * (place >= at)
        masks = torch.ones_like(place) if masks is None else masks
        if (most := int(masks.max())) > 1:
            ids, mask = insert(ids, mask, place, ids.new_full((most - 1,), self.mask_id), masks - 1)
        width = int(mask.sum(dim=1).max())
        if self.max_positions is not None and width > self.max_positions:
            raise MPTError(
                f"The prompt and text take {width} positions, and {self.name} has {self.max_positions}. Use shorter "
                "texts (max_input_length) or a shorter prompt."
            )
        last = (place + masks - 1)[:, None]
        return ids[:, :width], mask[:, :width], (place[:, None] + torch.arange(most, device=ids.device)).minimum(last)

    def _place(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the column `[B]` of each row's mask."""
        found = (ids == self.mask_id) & (mask == 1)
        if bool((wrong := found.sum(dim=1) != 1).any()):
            row = int(wrong.int().argmax())
            raise MPTError(
                f"Row {row} of the batch has {int(found[row].sum())} masks, and a masked language model answers at "
                "one. Change the template, or texts that contain the tokenizer's mask."
            )
        return found.int().argmax(dim=1)

    def _run(self, inputs: Inputs, masks: Tensor | None, hidden_states: bool = False) -> tuple[Any, Tensor, Tensor]:
        """Run the model on rows that need `masks` `[B]`, or its encoder alone for a classifier, which needs none.

        Returns:
            Its output, with logits `[B, M, V]` at the masks or the state `[B, 1, D]` of [CLS], the ids `[B, S]` that it
            read, and their mask `[B, S]`.
        """
        prompts, rows = PromptOutput.of(inputs[0]), inputs[1]
        if masks is not None and prompts.head is not None:
            raise MPTError("A classifier ranks a task's choices, and has no logits over the vocabulary.")
        ids, mask, columns = self._arrange(prompts, inputs, masks)
        prefix = nullcontext() if not prompts.layers else self._prefix(prompts.layers, rows)
        if prompts.embeddings is None or not prompts.length:
            embeds = self.embed(ids)
        else:
            embeds = self.embed_among(prompts.embeddings, rows, ids)
        if prompts.shift is not None:
            embeds = self.add_shift(embeds, prompts.shift, rows, mask * (ids >= 0))
        options: dict[str, Any] = {}
        if self._stand_in is None and self.second_type:
            separators = ids == self.tokenizer.sep_token_id
            before = separators.cumsum(dim=1) - separators.int()
            options["token_type_ids"] = before.clamp(max=self.second_type) * mask
        model = self.model if masks is not None else self.model.base_model
        with prefix, keep_columns(self.model.base_model, columns):
            output = model(
                inputs_embeds=embeds * mask[..., None],  # MobileBERT reads neighbours, padding included
                attention_mask=mask,
                output_hidden_states=hidden_states,
                **options,
            )
        return output, ids, mask

    def score(
        self, prompts: Tensor | PromptOutput, rows: Tensor, input_ids: Tensor, attention_mask: Tensor, choices: Tensor
    ) -> Tensor:
        """Return the log-likelihood `[B, C]` of each choice, a classifier's class; see `Backbone.score`."""
        if not isinstance(prompts, PromptOutput) or prompts.head is None:
            return super().score(prompts, rows, input_ids, attention_mask, choices)
        output, _, _ = self._run((prompts, rows, input_ids, attention_mask), None)
        weight, bias = (part[rows] for part in prompts.head)
        logits = torch.einsum("bd,bcd->bc", output.last_hidden_state[:, 0].to(weight.dtype), weight) + bias
        exists = (choices != IGNORE).any(dim=2)
        return functional.log_softmax(precise(logits), dim=1)[:, : choices.shape[1]].masked_fill(~exists, -torch.inf)

    def forward(
        self,
        prompts: Tensor | PromptOutput,
        rows: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        hidden_states: bool = False,
    ) -> BackboneOutput:
        """Predict the label tokens at the masks; see `Backbone.forward`."""
        masks = (labels != IGNORE).sum(dim=1).clamp(min=1)
        output, ids, mask = self._run((prompts, rows, input_ids, attention_mask), masks, hidden_states)
        # Labels may have columns of padding alone.
        result = BackboneOutput(functional.pad(output.logits, (0, 0, 0, labels.shape[1] - output.logits.shape[1])))
        if hidden_states:
            # The first state is the embedding, before any layer.
            states, text = output.hidden_states[1:], mask * (ids >= 0)
            result.hidden = {"encoder/text": Segment(states, text)}
            length = int((ids < 0).sum(dim=1).max())
            columns = (ids < 0).int().argsort(dim=1, descending=True, stable=True)[:, :length]
            index = columns[..., None].expand(-1, -1, states[0].shape[2])
            of_prompt = tuple(state.gather(1, index) for state in states)
            result.hidden["encoder/prompt"] = Segment(of_prompt, torch.ones_like(columns))
        return result

    def _likelihood(self, inputs: Inputs, of_row: Tensor, labels: Tensor) -> Tensor:
        """See `Backbone._likelihood`; each row runs once for each number of tokens that its choices have."""
        prompts, *own = inputs
        lengths = (labels != IGNORE).sum(dim=1)
        passes, index = torch.stack([of_row, lengths], dim=1).unique(dim=0, return_inverse=True)
        part: Any = (prompts, *(tensor[passes[:, 0]] for tensor in own))
        output, _, _ = self._run(part, passes[:, 1])
        found = functional.log_softmax(precise(output.logits), dim=-1)
        labels = labels[:, : found.shape[1]]
        places = torch.arange(labels.shape[1], device=labels.device)
        of_tokens = found[index[:, None], places, labels.clamp(min=0)]
        return of_tokens.masked_fill(labels == IGNORE, 0.0).sum(dim=1)

    def generate(
        self, prompts: Tensor | PromptOutput, rows: Tensor, input_ids: Tensor, attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """Raise: a masked language model ranks choices, and writes no text."""
        raise MPTError(
            f"{self.name} is a masked language model, which ranks a task's words and writes no text. Set `choices` on "
            "the card, or use an encoder-decoder or a decoder-only backbone."
        )
