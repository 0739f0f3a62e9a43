"""The families of language models that have a backbone here."""

from typing import Any, Literal

Family = Literal["seq2seq", "causal"]


def family_of(config: Any) -> Family:
    """Return the family of a model by its configuration.

    Args:
        config: A `PreTrainedConfig` of a supported model; see `load.check_kind`.
    """
    return "seq2seq" if config.is_encoder_decoder else "causal"
