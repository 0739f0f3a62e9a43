"""Encoder-decoders (T5, BART, ...): the prompt precedes the encoder's input."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from mpt_lightning.backbones.base import Backbone, BackboneOutput, Inputs, align
from mpt_lightning.backbones.cache import Pair
from mpt_lightning.errors import MPTError
from mpt_lightning.objectives import IGNORE, Segment, log_likelihood
from mpt_lightning.prompts import PromptOutput


class Seq2SeqBackbone(Backbone):
    """A frozen encoder-decoder that can turn labels into its decoder's inputs; see `Backbone` for the arguments."""

    family = "seq2seq"
    auto_model = AutoModelForSeq2SeqLM

    def __init__(self, model: PreTrainedModel, name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, name, *args, **kwargs)
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise MPTError(
                f"{type(model).__name__} ({name}) has no prepare_decoder_input_ids_from_labels, so the inputs of its "
                "decoder in training are unknown. Use a T5, BART, mBART, PLBART, MVP, Marian or Pegasus model."
            )
        if model.config.model_type != "fsmt":  # FSMT scales `inputs_embeds` too
            self.input_scale = float(getattr(model.get_encoder(), "embed_scale", 1.0))

    @classmethod
    def takes(cls, config: Any) -> bool:
        """Return whether the model is an encoder-decoder; raise if it is a ProphetNet."""
        if config.model_type == "prophetnet":
            raise MPTError(
                "ProphetNet models cannot be backbones: in transformers itself their results depend on the padding of "
                "the batch. Use a T5 or BART model."
            )
        return config.is_encoder_decoder and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    def bare_logits(
        self, inputs: Callable[[Tensor], dict[str, Tensor]], prompt: Tensor, text: Tensor, answer: Tensor
    ) -> Tensor:
        """See `Backbone.bare_logits`."""
        read = self.model.prepare_decoder_input_ids_from_labels(answer)
        return self.model(**inputs(torch.cat([prompt, text], dim=1)), decoder_input_ids=read, use_cache=False).logits

    def _encode(self, inputs: Inputs, hidden_states: bool = False) -> tuple[Any, Tensor]:
        """Run the encoder over `[prompt, text, padding]`; return its output and the mask `[B, P + L]`."""
        prompts, rows, input_ids, attention_mask = inputs
        # Positions, relative and absolute, count from the left, so padding goes to the right.
        input_ids, attention_mask = align(input_ids, attention_mask, "right")
        given = PromptOutput.of(prompts)
        prompt, shift = given.embeddings, given.shift
        if prompt is None:
            raise MPTError("An encoder-decoder takes prompts of embeddings, got keys and values.")
        if self.has_places(input_ids, prompt.shape[1]):  # the prompt's tokens are among the text's
            embeds, mask = self.embed_among(prompt, rows, input_ids), attention_mask
        else:
            text = self.embed(input_ids)
            if shift is not None:
                text = self.add_shift(text, shift, rows, attention_mask)
            embeds = torch.cat([prompt.to(text.dtype)[rows], text], dim=1)
            mask = torch.cat([attention_mask.new_ones(len(rows), prompt.shape[1]), attention_mask], dim=1)
        output = self.model.get_encoder()(
            inputs_embeds=embeds, attention_mask=mask, output_hidden_states=hidden_states, return_dict=True
        )
        return output, mask

    def keys_and_values(self, embeddings: Tensor) -> tuple[Pair, ...]:
        """Raise: an encoder-decoder takes prompts of embeddings alone."""
        raise MPTError("An encoder-decoder takes prompts of embeddings, not keys and values.")

    def _decode(self, encoded: Tensor, mask: Tensor, labels: Tensor, hidden_states: bool = False) -> Any:
        """Run the decoder over label tokens `[B, M]`, shifted, given the encoder's states `[B, S, H]`."""
        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            attention_mask=mask,
            decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(labels),
            output_hidden_states=hidden_states,
            use_cache=False,
            return_dict=True,
        )

    def forward(
        self,
        prompts: Tensor | PromptOutput,
        rows: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        hidden_states: bool = False,
    ) -> BackboneOutput:
        """Predict the label tokens; see `Backbone.forward`."""
        encoded, mask = self._encode((prompts, rows, input_ids, attention_mask), hidden_states)
        decoded = self._decode(encoded.last_hidden_state, mask, labels, hidden_states)
        output = BackboneOutput(decoded.logits)
        if hidden_states:
            length = mask.shape[1] - input_ids.shape[1]
            # The first state of each stack is the embedding, before any layer.
            states = encoded.hidden_states[1:]
            output.hidden = {
                "encoder/prompt": Segment(tuple(state[:, :length] for state in states), mask[:, :length]),
                "encoder/text": Segment(tuple(state[:, length:] for state in states), mask[:, length:]),
                "decoder/text": Segment(tuple(decoded.decoder_hidden_states[1:]), labels != IGNORE),
            }
        return output

    def _likelihood(self, inputs: Inputs, of_row: Tensor, labels: Tensor) -> Tensor:
        encoded, mask = self._encode(inputs)
        return log_likelihood(self._decode(encoded.last_hidden_state[of_row], mask[of_row], labels).logits, labels)

    def generate(
        self, prompts: Tensor | PromptOutput, rows: Tensor, input_ids: Tensor, attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """Generate label tokens; see `Backbone.generate`."""
        encoded, mask = self._encode((prompts, rows, input_ids, attention_mask))
        tokens = self.model.generate(encoder_outputs=encoded, attention_mask=mask, **options)
        return tokens[:, 1:]  # without the decoder's start token
