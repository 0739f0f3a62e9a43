"""The check at load time: refused models, disabled forward paths, and models that pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)

from mpt_lightning.backbones import CausalBackbone, load_backbone, probe
from mpt_lightning.backbones.load import wrap_model
from mpt_lightning.backbones.miniature import miniature
from tests.backbones.architectures import build_tiny
from tests.conftest import VOCABULARY, build_model, make_batch


def logits(backbone: CausalBackbone, length: int, **options: Any) -> torch.Tensor:
    prompts = torch.randn(1, length, 32, dtype=backbone.dtype, generator=torch.Generator().manual_seed(0))
    batch = make_batch()
    rows = torch.zeros_like(batch["task_ids"])
    return backbone(prompts, rows, batch["input_ids"], batch["attention_mask"], batch["labels"], **options).logits


@pytest.mark.parametrize(
    ("kind", "ways"),
    [
        ("llama", {"packed", "shared"}),
        ("deepseek_v3", {"packed"}),  # keys are computed from a latent tensor in the cache
        ("diffllama", {"packed"}),  # values are changed after they are read from the cache
        ("mistral", set()),  # a sliding window
    ],
)
def test_a_wrong_forward_path_is_disabled(kind: str, ways: set[str]) -> None:
    backbone = wrap_model(build_tiny(kind), kind)
    assert isinstance(backbone, CausalBackbone)
    assert backbone.ways == ways


def test_a_model_with_scaled_inputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown architecture that scales the embeddings of ids but not `inputs_embeds`."""
    model = build_model("llama")
    table = model.get_input_embeddings()
    whole = type(model.model).forward

    def forward(self: Any, input_ids: Any = None, inputs_embeds: Any = None, **options: Any) -> Any:
        return whole(self, inputs_embeds=2 * table(input_ids) if inputs_embeds is None else inputs_embeds, **options)

    monkeypatch.setattr(type(model.model), "forward", forward)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM \(other\).*off by .* other logits for embeddings than for"):
        wrap_model(model, "other")
    assert isinstance(wrap_model(model, "other", check=False), CausalBackbone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
def test_good_models_pass_in_any_precision(kind: str, dtype: Any, model_folder: Callable[[str], str]) -> None:
    backbone = load_backbone(model_folder(kind), dtype=dtype)
    assert backbone.ways == (set() if kind == "t5" else {"packed", "shared"})


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
def test_a_large_model_is_checked_on_its_miniature(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = build_model(kind), 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    model.register_forward_pre_hook(count)
    monkeypatch.setattr(probe, "SMALL", 1000)
    state = torch.random.get_rng_state()
    wrap_model(model, kind)
    assert passes == 0
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(probe, "SMALL", 10**9)
    wrap_model(model, kind)
    assert passes > 0


@pytest.mark.parametrize("kind", ["diffllama", "deepseek_v3", "gemma2", "falcon", "qwen2_moe", "gpt_neox"])
def test_a_miniature_behaves_as_its_model(kind: str) -> None:
    model = build_tiny(kind)
    small = CausalBackbone(miniature(model), kind)
    large = CausalBackbone(model, kind)
    assert small.ways == large.ways
    for backbone in (small, large):
        probe.check_backbone(backbone)
    assert small.ways == large.ways


def test_dropout_is_off_in_the_check_and_kept_after() -> None:
    backbone = wrap_model(build_model("t5"), "t5", dropout=True)
    assert backbone.model.training


def test_a_model_of_another_kind_is_refused(tmp_path) -> None:
    ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'vit', which is neither an encoder-decoder, nor .* nor a masked"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("name", ["Seq2Seq", "Causal", "Masked"])
def test_an_architecture_of_ones_own_is_loaded(name: str, tmp_path) -> None:
    """One that is registered with transformers' Auto classes, and unknown to transformers itself."""
    base, kind, auto = {
        "Seq2Seq": (T5Config, T5ForConditionalGeneration, AutoModelForSeq2SeqLM),
        "Causal": (LlamaConfig, LlamaForCausalLM, AutoModelForCausalLM),
        "Masked": (BertConfig, BertForMaskedLM, AutoModelForMaskedLM),
    }[name]
    config_class = type(f"{name}Config", (base,), {"model_type": f"own_{name.lower()}"})
    model_class = type(f"{name}Model", (kind,), {"config_class": config_class})
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    auto.register(config_class, model_class, exist_ok=True)
    built = build_model({"Seq2Seq": "t5", "Causal": "llama", "Masked": "bert"}[name])
    own = model_class(config_class(**{k: v for k, v in built.config.to_dict().items() if k != "model_type"}))
    own.save_pretrained(tmp_path)
    assert type(load_backbone(str(tmp_path))).__name__ == f"{name}Backbone"


def test_an_encoder_without_its_head_is_refused(tmp_path) -> None:
    """A new head would be random and frozen."""
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 6 of the weights of BertForMaskedLM \(cls.predictions.bias, \.\.\.\)"):
        load_backbone(str(tmp_path))
    BertForPreTraining(config).save_pretrained(tmp_path)
    assert load_backbone(str(tmp_path)).family == "masked"


def test_a_model_without_its_head_is_refused(tmp_path) -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 1 of the weights of LlamaForCausalLM \(lm_head.weight, \.\.\.\)"):
        load_backbone(str(tmp_path))


ROTATIONS: dict[str, dict[str, Any]] = {
    "llama": {
        "max_position_embeddings": 24,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    },
    "phi3": {
        "original_max_position_embeddings": 24, "sliding_window": None,
        "rope_parameters": {
            "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "rope_theta": 10000.0,
            "factor": 4.0,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("gradients", [True, False])
def test_rotations_that_change_with_length_are_refused(kind: str, gradients: bool) -> None:
    """24 tokens give the bare model's result; one more would rotate the prompt by other angles."""
    model = build_tiny(kind, **ROTATIONS[kind])
    backbone = wrap_model(model, "rotating").eval()
    assert backbone.max_positions == 24
    batch = make_batch()
    room = 24 - batch["input_ids"].shape[1] - batch["labels"].shape[1] + 1
    with torch.set_grad_enabled(gradients):
        fits = logits(backbone, room)
        with pytest.raises(ValueError, match="changes its rotary embedding beyond 24"):
            logits(backbone, room + 1)
    prompt = torch.randn(1, room, 32, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    text, answer = batch["input_ids"][0], batch["labels"][0]
    whole = torch.cat([prompt[0], backbone.embed(text), backbone.embed(answer[:-1])])[None]
    torch.testing.assert_close(fits[0], model(inputs_embeds=whole).logits[0, -3:], rtol=1e-9, atol=1e-9)


def test_gpt_neos_local_window_is_respected() -> None:
    backbone = wrap_model(build_tiny("gpt_neo", window_size=16), "neo").eval()
    assert backbone.max_positions == 16
    assert logits(backbone, 7).isfinite().all()
    with pytest.raises(ValueError, match="attends to the last 16 only"):
        logits(backbone, 8)
    ids = torch.ones(1, 4, dtype=torch.long)
    prompts = torch.zeros(1, 4, 32, dtype=torch.double)
    with pytest.raises(ValueError, match="attends to the last 16 only"):
        backbone.generate(prompts, torch.tensor([0]), ids, torch.ones_like(ids), max_new_tokens=9)


def test_prompts_are_not_changed_in_place() -> None:
    """CTRL scales `inputs_embeds` in place."""
    backbone = wrap_model(build_tiny("ctrl"), "ctrl").eval()
    prompts = torch.randn(2, 4, 32, dtype=torch.double)
    kept = prompts.clone()
    with torch.no_grad():
        backbone.encode_prompts(prompts)
    assert torch.equal(prompts, kept)


@pytest.mark.parametrize("kind", ["gemma", "marian"])
def test_embeddings_are_what_the_layers_receive(kind: str) -> None:
    backbone = wrap_model(build_tiny(kind, "seq2seq" if kind == "marian" else "causal"), kind)
    raw = backbone.model.get_input_embeddings().weight
    torch.testing.assert_close(backbone.embeddings, raw * 32**0.5)
    assert backbone.embeddings.shape == (VOCABULARY, 32)
