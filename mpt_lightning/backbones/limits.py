"""What the check at load time does not detect, since it runs short texts: results that change with the length."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from mpt_lightning.errors import MPTError

# Masked language models that the check at load time would accept, and why they are refused.
_MASKED = {
    "big_bird": "attends to blocks of long texts until it reads a short one, and to all tokens from then on; with "
    "attention_type: original_full in its config.json it attends to all tokens always",
    "longformer": "pads texts to its window, so that gradients are not finite",
    "mra": "approximates attention, which is zero without its GPU kernels",
    "perceiver": "does not read token embeddings",
    "reformer": "attends to random buckets of long texts",
    "roc_bert": "reads each token's shape and pronunciation, which a prompt lacks",
}


@dataclass(frozen=True)
class Limit:
    """A length in columns, padding included, that prompt, text and answer together must not exceed.

    `reason` is what the model does beyond it, as the end of a sentence about the model.
    """

    columns: int
    reason: str


def check_masked(config: PreTrainedConfig) -> None:
    """Raise if a masked language model's results with prompts would be wrong at some lengths."""
    reason = _MASKED.get(config.model_type)
    if reason and getattr(config, "attention_type", "") != "original_full":
        raise MPTError(f"A backbone of the type {config.model_type!r} {reason}. Use another masked language model.")


def length_limit(config: PreTrainedConfig) -> Limit | None:
    """Return the length beyond which a decoder-only model treats a prompt and its rows differently, or None."""
    # A window counts columns, so that beyond it the attended tokens of a row would depend on padding.
    windows = [Limit(size, f"attends to the last {size} only") for size in attention_windows(config)]
    return min((*windows, *rotation_limits(config)), key=lambda limit: limit.columns, default=None)


def attention_windows(config: Any) -> list[int]:
    """Return the sizes of the layers' attention windows; empty if every layer attends to all tokens."""
    layers = getattr(config, "layer_types", None)
    # In some models each layer has a window of its own (NeoMME).
    owners = getattr(config, "per_layer_config", None) or [config]
    slides = layers is None or "sliding_attention" in layers
    sizes = [getattr(owner, "sliding_window", None) if slides else None for owner in owners]
    if "local" in (getattr(config, "attention_layers", None) or []):  # GPT-Neo
        sizes.append(config.window_size)
    return [size for size in sizes if size and size > 0]


def rotation_limits(config: Any) -> Iterator[Limit]:
    """Yield the lengths beyond which a model's rotary embedding changes.

    The longest row of a pass determines the frequencies of all its positions (`transformers.modeling_rope_utils`), so
    that a prompt's cached keys, and shorter rows of the same batch, would be rotated by other angles than alone.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = [found for found in parameters.values() if isinstance(found, Mapping)]
    for found in by_layer or [parameters]:
        kind, size = found.get("rope_type"), getattr(config, "max_position_embeddings", None)
        if kind == "longrope":
            size = found.get("original_max_position_embeddings") or size
        if kind in ("dynamic", "longrope") and size:
            yield Limit(size, f"changes its rotary embedding beyond {size}")
