"""A small model of the same kind as a large one, to test the large one's behaviour at no cost."""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mpt_lightning.errors import MPTError

LAYERS, HEADS, HEAD_DIM, VOCABULARY = 2, 4, 8, 128
HIDDEN, INNER = HEADS * HEAD_DIM, 2 * HEADS * HEAD_DIM
# The names of sizes in configurations. All others are settings, and are kept.
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), INNER),
    **dict.fromkeys(("ffn_hidden_size", "inner_dim", "moe_intermediate_size"), INNER),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "kv_lora_rank", "q_lora_rank"), HEAD_DIM),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), HEAD_DIM),
    "shared_expert_intermediate_size": INNER,
    "vocab_size": VOCABULARY,
    "rotary_dim": HEAD_DIM // 2,
    "qk_head_dim": 2 * HEAD_DIM,
}


def miniature(model: PreTrainedModel) -> PreTrainedModel:
    """Build a model of the same class and settings, with few narrow layers; raise if its sizes do not fit each other.

    Its random weights are large so that every part affects the logits. The global random state does not change.
    """
    if model.config.sub_configs:
        raise MPTError(f"{type(model).__name__} is made of several models, whose sizes are unknown here")
    config = _small(model.config)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), no_init_weights():
        small: Any = type(model)._from_config(config, dtype=torch.float32)
    small.tie_weights()  # `no_init_weights` skips this too
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            is_scale = parameter.dim() == 1 and name.endswith("weight")  # of a norm, which starts at 1
            parameter.normal_(float(is_scale), 0.2, generator=generator)
    return small.eval()


def _small(config: PreTrainedConfig) -> PreTrainedConfig:
    values = config.to_dict()
    changed: dict[str, Any] = {name: size for name, size in SIZES.items() if type(values.get(name)) is int}
    heads = next((values[name] for name in ("num_attention_heads", "n_head") if values.get(name)), None)
    for name in ("num_key_value_heads", "num_kv_heads"):
        if (found := values.get(name)) is not None:
            changed[name] = HEADS if found == heads else min(found, HEADS // 2)
    if kinds := values.get("layer_types"):
        # The first layer of each kind, and the same layers' items of other lists.
        kept = sorted({kind: kinds.index(kind) for kind in kinds}.values())
        kept += [layer for layer in range(len(kinds)) if layer not in kept][: max(0, LAYERS - len(kept))]
        changed["num_hidden_layers"] = len(kept)
        for name, value in values.items():
            if isinstance(value, list) and len(value) == len(kinds):
                changed[name] = [value[layer] for layer in kept]
    for name, value in values.items():
        if name.endswith("token_id") and type(value) is int:
            changed[name] = value % VOCABULARY
    return type(config)(**values | changed)
