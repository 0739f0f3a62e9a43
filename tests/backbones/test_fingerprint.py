"""The fingerprint of a backbone depends on every tensor, but not on precision, device and tied weights."""

from collections.abc import Callable
from dataclasses import replace

import peft
import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from mpt_lightning import load_backbone
from mpt_lightning.backbones.fingerprint import fingerprint
from mpt_lightning.checkpoint import PromptCheckpoint
from mpt_lightning.prompts import SoftPrompt
from tests.conftest import KINDS, build_model

Folder = Callable[[str], str]


def checkpoint(of: str) -> PromptCheckpoint:
    prompt = SoftPrompt(1, 2, 8, ["one"])
    return PromptCheckpoint("x.ckpt", "PromptTuning", "gpt2", of, "SoftPrompt", prompt.config(), prompt.state_dict())


@pytest.mark.parametrize("kind", [*KINDS, "bart"])
def test_every_tensor_changes_the_fingerprint(kind: str) -> None:
    small = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16}
    model = BartForConditionalGeneration(BartConfig(**small)) if kind == "bart" else build_model(kind)
    whole = fingerprint(model)
    assert fingerprint(model) == whole
    for name, tensor in model.state_dict().items():  # with saved buffers, such as BART's final_logits_bias
        last = tensor.view(-1)[-1:]
        kept = last.clone()
        last += 1
        assert fingerprint(model) != whole, name
        last.copy_(kept)
    assert fingerprint(model) == whole


@pytest.mark.parametrize("place", [slice(0, 1), slice(1, 2), slice(1501, 1502), slice(2999, 3000)])
@pytest.mark.parametrize("axis", [0, 1])
def test_each_part_of_a_large_table_changes_the_fingerprint(place: slice, axis: int) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=3000, n_embd=32, n_layer=1, n_head=2, n_positions=8))
    whole, table = fingerprint(model), model.get_input_embeddings().weight.data
    changed = table[place] if axis == 0 else table[:, place.start % 32]
    changed += 0.1
    assert fingerprint(model) != whole


def test_precision_and_ties_do_not_change_the_fingerprint(model_folder: Folder) -> None:
    for kind in KINDS:
        plain = load_backbone(model_folder(kind)).fingerprint
        assert load_backbone(model_folder(kind), dtype="bfloat16").fingerprint == plain
        held = load_backbone(model_folder(kind)).double()
        held.model.set_attn_implementation("eager")
        assert held.fingerprint == plain
        head = held.model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())  # untied, and equal
        assert fingerprint(held.model) == plain


@pytest.mark.parametrize("change", ["merged LoRA", "tuned head"])
def test_a_changed_model_is_refused(change: str, model_folder: Folder) -> None:
    backbone = load_backbone(model_folder("llama"))
    saved = checkpoint(backbone.fingerprint)
    saved.check_backbone("gpt2", backbone.fingerprint, "--ckpt_path")
    if change == "merged LoRA":
        adapted = peft.get_peft_model(backbone.model, peft.LoraConfig(r=1, target_modules=["q_proj"]))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        model = adapted.merge_and_unload()
    else:
        model = backbone.model
        nn.init.normal_(model.lm_head.weight)
    with pytest.raises(ValueError, match=r"but this run has 'gpt2' \(fingerprint .*\): other weights"):
        saved.check_backbone("gpt2", fingerprint(model), "--ckpt_path")


def test_linear_layers_are_not_compared_with_quantized_ones(model_folder: Folder) -> None:
    model = load_backbone(model_folder("llama")).model
    whole = fingerprint(model)
    model.is_quantized = True  # as transformers marks such a model
    small = fingerprint(model)
    assert small == whole.partition("-")[0] + "-quantized"
    for one, other in ((whole, small), (small, whole), (small, small)):
        checkpoint(one).check_backbone("llama", other, "--ckpt_path")
    nn.init.normal_(model.lm_head.weight)  # quantization does not change the head
    with pytest.raises(ValueError, match="other weights"):
        checkpoint(whole).check_backbone("llama", fingerprint(model), "--ckpt_path")


def test_a_fingerprint_of_embeddings_only_is_refused() -> None:
    old = replace(checkpoint(""), fingerprint="0123456789abcdef")
    with pytest.raises(ValueError, match=r"saved by an earlier version, .* covers the embeddings of 'gpt2' alone"):
        old.check_backbone("gpt2", "0123456789ab-0123456789ab", "--ckpt_path")
