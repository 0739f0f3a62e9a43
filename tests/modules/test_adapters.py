"""Bottleneck adapters: the identity at the start, and the only trained weights."""

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from mpt_lightning import Adapters, load_backbone
from mpt_lightning.backbones import CausalBackbone
from mpt_lightning.backbones.bottleneck import Bottleneck, add_adapters
from tests.backbones.masked import ANSWERS, TEXTS, wrap
from tests.conftest import KINDS
from tests.modules.checks import assert_loads_equal, assert_resumes_exactly
from tests.modules.conftest import AnyData

Folder = Callable[[str], str]
MakeTrainer = Callable[..., L.Trainer]


@pytest.mark.parametrize(("places", "count"), [("houlsby", {"t5": 10}), ("pfeiffer", {"t5": 4})])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_start_as_identity_and_each_changes_the_logits(
    kind: str, places: str, count: dict[str, int], model_folder: Folder, batch: dict[str, torch.Tensor]
) -> None:
    backbone = load_backbone(model_folder(kind)).eval()

    def logits() -> torch.Tensor:
        inputs = (batch["task_ids"], batch["input_ids"], batch["attention_mask"], batch["labels"])
        return backbone(torch.zeros(3, 0, 32), *inputs).logits

    with torch.no_grad():
        plain = logits()
        adapters = add_adapters(backbone, 3, places)
        assert len(adapters) == count.get(kind, 4 if places == "houlsby" else 2)  # two layers; T5 has two stacks
        assert torch.equal(logits(), plain)
    for adapter in adapters:
        torch.nn.init.normal_(adapter.up.weight)
    logits().sum().backward()
    assert all(adapter.up.weight.grad.abs().sum() > 0 for adapter in adapters)
    assert not any(p.requires_grad for n, p in backbone.named_parameters() if ".adapter." not in n)


@pytest.mark.parametrize(
    "kind", ["albert", "bert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta"]
)
def test_each_adapter_of_a_masked_model_changes_the_logits(kind: str) -> None:
    backbone = wrap(kind)
    ids = TEXTS[0][None]

    def logits() -> torch.Tensor:
        inputs = (torch.tensor([0]), ids, torch.ones_like(ids), ANSWERS[0][None])
        return backbone(torch.zeros(1, 0, backbone.dim, dtype=torch.float64), *inputs).logits

    layers = 1 if kind == "albert" else backbone.model.config.num_hidden_layers  # ALBERT's layers are one module
    plain, adapters = logits(), add_adapters(backbone, 16)
    assert len(adapters) == 2 * layers
    assert torch.equal(logits(), plain)
    for adapter in adapters:
        torch.nn.init.normal_(adapter.up.weight)
    logits().square().sum().backward()
    assert all(adapter.up.weight.grad.abs().sum() > 0 for adapter in adapters)


def test_an_adapter_equals_its_formula() -> None:
    adapter, hidden = Bottleneck(8, 3), torch.randn(2, 5, 8)
    torch.nn.init.normal_(adapter.up.weight)
    inside = (hidden @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
    torch.testing.assert_close(adapter(hidden), hidden + inside @ adapter.up.weight.T)
    half = adapter(hidden.bfloat16())
    assert half.dtype == torch.bfloat16
    assert adapter.up.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_contains_only_the_adapters(
    kind: str, model_folder: Folder, data: AnyData, trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = Adapters(model_folder(kind), size=3, dropout=0.1, lr=0.05)
    fitted = trainer(max_epochs=2)
    fitted.fit(module, datamodule=data)
    module.train()
    dropout = {n: m.training for n, m in module.backbone.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {on for name, on in dropout.items() if "adapter" in name} == {True}
    assert not any(on for name, on in dropout.items() if "adapter" not in name)
    assert_loads_equal(module, fitted, tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    ends = {"down.weight": (3, 32), "down.bias": (3,), "up.weight": (32, 3), "up.bias": (32,)}
    for name, value in state.items():
        before, _, end = name.partition(".adapter.")
        assert before.startswith("backbone.model.")
        assert tuple(value.shape) == ends[end]
    assert len(state) == 4 * (10 if kind == "t5" else 4)
    with pytest.raises(ValueError, match=r"was trained with {'size': 3, 'places': 'houlsby'}, and this run has"):
        Adapters.load_from_checkpoint(str(tmp_path / "last.ckpt"), places="pfeiffer")


def test_resuming_is_exact(model_folder: Folder, trainer: MakeTrainer, tmp_path: Path) -> None:
    folder = model_folder("t5")
    assert_resumes_exactly(lambda: Adapters(folder, size=4, lr=0.01, gradient_checkpointing=True), trainer, tmp_path)


def test_gradient_checkpointing_changes_nothing(model_folder: Folder, data: AnyData, trainer: MakeTrainer) -> None:
    trained = []
    folder = model_folder("gpt2")
    for checkpointing in (False, True):
        L.seed_everything(0)
        module = Adapters(folder, size=4, lr=0.01, gradient_checkpointing=checkpointing)
        trainer().fit(module, datamodule=data)
        trained.append(module.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name])


def test_a_model_of_another_structure_raises() -> None:
    config = OPTConfig(
        vocab_size=50, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, ffn_dim=32, word_embed_proj_dim=16
    )
    backbone = CausalBackbone(OPTForCausalLM(config), "opt")
    with pytest.raises(ValueError, match=r"OPTForCausalLM \(opt\) has no known attention or feed-forward layers"):
        add_adapters(backbone, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size: got 0, expected a whole number at least 1"),
        ({"places": "here"}, "places: got 'here', expected one of houlsby, pfeiffer"),
        ({"dropout": 1.0}, "dropout: got 1.0, expected a number at least 0 and below 1"),
    ],
)
def test_invalid_values_raise(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adapters("anything", **arguments)
