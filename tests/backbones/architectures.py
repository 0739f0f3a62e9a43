"""Tiny random models of many architectures, and whether they take prompts.

`python -m tests.backbones.architectures` writes the table of docs/architectures.md.
"""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from mpt_lightning.backbones.base import Family
from mpt_lightning.backbones.load import BACKBONES

# The names of sizes and settings in configurations. Scaled embeddings are enabled if a model has them.
TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "dim_model"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("ffn_hidden_size", "inner_dim", "dim_ff", "dff", "d_inner", "ffn_hidden_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 96),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 96),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "dim_head"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_head_dim"), 16),
    **dict.fromkeys(("sliding_window", "local_attention", "window_size"), 64),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), 1),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **dict.fromkeys(("dropout", "activation_dropout", "attention_dropout"), 0.0),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    "emb_dim": 32,
    "vocab_size": 120,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "rotary_dim": 4,
    "initializer_factor": 2.0,
    "scale_embedding": True,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}
ALWAYS = {"pad_token_id": 0, "decoder_start_token_id": 0}

LATENT = {"head_dim": None, "num_key_value_heads": 4}  # keys and values from a common latent: no groups of heads
OWN: dict[Family, dict[str, dict[str, Any]]] = {
    "causal": {
        "bert": {"is_decoder": True},
        "roberta": {"is_decoder": True},
        "roformer": {"is_decoder": True},
        "xlm-roberta": {"is_decoder": True},
        "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
        **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), LATENT),
    },
    "seq2seq": {"pegasus_x": {"block_size": 8, "num_global_tokens": 4}},
    "masked": {
        "albert": {"embedding_size": 16},
        "electra": {"embedding_size": 16},
        "roformer": {"embedding_size": 16},
        "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
        "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32},
        "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        # As in DeBERTa-v3, with the convolution of the larger v2.
        "deberta-v2": {
            "relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_buckets": 16, "conv_kernel_size": 3,
            "conv_act": "gelu",
        },
        "modernbert": {"num_hidden_layers": 4, "local_attention": 8},
        "ultrabert": {"num_hidden_layers": 4, "sliding_window": 4},
        "luke": {"entity_vocab_size": 10},
        "esmc": {"num_key_value_heads": 4},
        "reformer": {"axial_pos_embds": False, "is_decoder": False, "attn_layers": ["local", "lsh"]},
        "neomme": {"head_dim": 16, "sliding_window": 4, "embedding_rank": 16},
        "xmod": {"default_language": "en_XX"},
    },
}  # fmt: skip

EXACT: dict[Family, list[str]] = {
    "causal": """
afmoe apertus arcee aria_text axk1 beam bert biogpt bitnet bloom codegen cohere cohere2 cohere2_moe ctrl cwm deepseek_v2
deepseek_v3 diffllama doge ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon flex_olmo flint gemma gemma2 gemma3_text
glm glm4 glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss
gptj granite granite_swa granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe internlm3 jais2 jetmoe
llama mellum minicpm3 minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder nanochat nemotron olmo olmo2
olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2
vaultgemma xglm youtu
""".split(),
    "seq2seq": "bart bigbird_pegasus led longt5 marian mbart mt5 mvp pegasus pegasus_x plbart t5 umt5".split(),
    "masked": """
albert bert camembert data2vec-text deberta deberta-v2 distilbert electra ernie eurobert flaubert gte
jina_embeddings_v3 layoutlm luke megatron-bert mobilebert modernbert mpnet nomic_bert rembert roberta
roberta-prelayernorm roformer squeezebert tapas ultrabert xlm xlm-roberta xlm-roberta-xl xmod
""".split(),
}
# In transformers, gradients of a text that LED pads to its window are not finite; training stops with an error.
NO_GRADIENTS = ("led",)
# A part of each refused model's error message.
REFUSED: dict[Family, dict[str, str]] = {
    "causal": {
        **dict.fromkeys(("roberta", "roformer", "xlm-roberta", "bert-generation", "mpt"), "logits are off by"),
        **dict.fromkeys(("bart", "marian", "pegasus", "blenderbot"), "neither an encoder-decoder|logits are off by"),
        **dict.fromkeys(("openai-gpt", "rwkv", "xlstm", "cpmant", "whisper", "trocr"), "it fails"),
        **dict.fromkeys(("mamba", "jamba", "recurrent_gemma", "falcon_h1", "qwen3_5_text"), "layers of the"),
        **dict.fromkeys(("llama4_text", "kimi_linear", "minimax", "nemotron_h", "olmo_hybrid"), "layers of the"),
        "qwen3_next": "layers of the",
    },
    "seq2seq": {
        "prophetnet": "depend on the padding",
        **dict.fromkeys(("blenderbot", "blenderbot-small", "m2m_100", "nllb-moe"), "prepare_decoder_input_ids"),
        **dict.fromkeys(("seamless_m4t", "seamless_m4t_v2"), "prepare_decoder_input_ids"),
        **dict.fromkeys(("switch_transformers", "fsmt"), "it fails"),
    },
    "masked": {
        **dict.fromkeys(("convbert", "funnel", "fnet", "nystromformer", "esm", "ibert", "yoso"), "off by|it fails"),
        "esmc": "it fails",
        "neomme": "does not take embeddings instead of ids",
        # The check at load time runs short texts.
        "big_bird": "attends to blocks of long texts",
        "longformer": "gradients are not finite",
        "mra": "approximates attention",
        "perceiver": "does not read token embeddings",
        "reformer": "attends to random buckets of long texts",
        "roc_bert": "reads each token's shape and pronunciation",
    },
}
AUTO = {kind.family: kind.auto_model for kind in BACKBONES}
TITLES: dict[Family, str] = {"causal": "decoder-only", "seq2seq": "encoder-decoder", "masked": "masked"}


def build_tiny(kind: str, family: Family = "causal", **changes: Any) -> PreTrainedModel:
    """Build a tiny model with large random weights; in float64 if its kernels support it."""
    torch.manual_seed(0)
    config_class = CONFIG_MAPPING[kind]
    default = config_class()
    values = default.to_dict()
    known = set(values) | set(getattr(config_class, "attribute_map", {}))
    sizes = {name: value for name, value in TINY.items() if name in known and not isinstance(values.get(name), dict)}
    options = sizes | ALWAYS | OWN[family].get(kind, {}) | changes
    config = config_class(**{name: value for name, value in options.items() if (name, value) != ("head_dim", None)})
    model = AUTO[family].from_config(config).eval()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    experts = any("Expert" in type(module).__name__ for module in model.modules())
    return model if experts or kind == "xglm" else model.double()


def table() -> str:
    """Render the table of docs/architectures.md."""
    lines = ["| architecture | family | prompts |", "|---|---|---|"]
    for family, title in TITLES.items():
        known = dict.fromkeys(EXACT[family], "exact") | dict.fromkeys(REFUSED[family], "refused")
        known |= dict.fromkeys(set(NO_GRADIENTS) & set(known), "exact, without training")
        lines += [f"| `{kind}` | {title} | {known[kind]} |" for kind in sorted(known)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
