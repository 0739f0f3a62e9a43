"""A compiled backbone equals an uncompiled one, and is not compiled again for every length."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import OPTConfig, OPTForCausalLM

from mpt_lightning import load_backbone
from mpt_lightning.backbones import Backbone, CausalBackbone, Seq2SeqBackbone
from mpt_lightning.objectives import token_cross_entropy
from tests.conftest import KINDS, VOCABULARY, build_model, make_batch

# While torch traces, it reads the gradient of every tensor, which causes its own warning.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:`torch.jit.script_method` is deprecated"
)

COMPILED = {
    "llama": {"input_layernorm", "post_attention_layernorm", "mlp"},
    "gpt2": {"mlp"},  # its norms are torch's own
    "t5": {"layer_norm", "1", "2"},  # T5LayerFF is layer 1 of an encoder block and layer 2 of a decoder block
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace without generating machine code, which takes most of the time."""
    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_with(self, backend="eager", **options))
    monkeypatch.setattr("mpt_lightning.backbones.load.check_compiler", lambda device: None)


def pair(kind: str, **options: Any) -> tuple[Backbone, Backbone]:
    cls = Seq2SeqBackbone if kind == "t5" else CausalBackbone
    plain, compiled = cls(build_model(kind, 0.5), kind), cls(build_model(kind, 0.5), kind, compiled=True, **options)
    return plain.train(), compiled.train()


def outputs(backbone: Backbone, rows: int, length: int, labels: int) -> dict[str, torch.Tensor]:
    """Return the outputs of training, a teacher's pass, ranking and generation, called as in the modules."""
    batch = make_batch(rows, length, labels)
    prompts = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inputs = (batch["task_ids"], batch["input_ids"], batch["attention_mask"])
    choices = torch.randint(3, VOCABULARY, (rows, 3, 3), generator=torch.Generator().manual_seed(2))
    output = backbone(prompts, *inputs, batch["labels"], hidden_states=True)
    loss = token_cross_entropy(output.logits, batch["labels"])
    (loss + sum(segment.layers[-1].square().mean() for segment in output.hidden.values())).backward()
    with torch.no_grad():
        encoded = backbone.encode_prompts(prompts)
        teacher = backbone(encoded[torch.arange(3)], *inputs, batch["labels"]).logits
    with torch.inference_mode():
        encoded = backbone.encode_prompts(prompts)
        score = backbone.score(encoded, *inputs, choices)
        one = backbone.score(encoded[torch.tensor([1])], torch.zeros_like(inputs[0]), *inputs[1:], choices)
        generated = [
            backbone.generate(encoded, *inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, num_beams=beams)
            for beams in (1, 2)
        ]
    return {
        "loss": loss.detach(), "gradient": prompts.grad, "teacher": teacher, "score": score, "one prompt": one,
        "greedy": generated[0].float(), "beams": generated[1].float(),
    }  # fmt: skip


def assert_same(plain: Backbone, compiled: Backbone, *shape: int) -> None:
    expected, found = outputs(plain, *shape), outputs(compiled, *shape)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def assert_results(kind: str, **options: Any) -> None:
    """Assert that every length has the same results, with the code compiled for the first length."""
    plain, compiled = pair(kind, **options)
    assert_same(plain, compiled, 5, 7, 3)
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 20
    assert not counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((5, 9, 3), (4, 12, 4), (7, 5, 3), (12, 20, 5)):
            assert_same(plain, compiled, *shape)
    assert_same(plain, compiled, 1, 1, 1)
    assert_same(plain, compiled, 1, 6, 2)
    assert counters["stats"]["unique_graphs"] <= 32  # torch's limit per function; these are two or three


@pytest.mark.parametrize("kind", [pytest.param("t5", marks=pytest.mark.slow), "gpt2", "llama"])
def test_every_length_equals_eager_without_recompiling(kind: str) -> None:
    assert_results(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("quick")
def test_with_gradient_checkpointing(kind: str) -> None:
    assert_results(kind, gradient_checkpointing=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("quick")
def test_compiled_parts_keep_their_names(kind: str) -> None:
    plain, compiled = pair(kind)
    names = [name for name, module in compiled.named_modules() if module._compiled_call_impl is not None]
    assert {name.rpartition(".")[2] for name in names} == COMPILED[kind]
    assert len(names) == {"llama": 6, "gpt2": 2, "t5": 10}[kind]
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in compiled.named_modules()] == [name for name, _ in plain.named_modules()]


def test_a_missing_compiler_raises_one_message(
    monkeypatch: pytest.MonkeyPatch, model_folder: Callable[[str], str]
) -> None:
    def fails(function: object) -> Callable:
        def run(*_: object) -> None:
            raise RuntimeError("InvalidCxxCompiler: No working C++\ncompiler found")

        return run

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(
        ValueError,
        match=r"backbone_compile=True: torch.compile does not work here.*backbone_compile=False.*No working C\+\+",
    ):
        load_backbone(model_folder("t5"), compiled=True)


def test_a_model_with_nothing_to_compile_raises() -> None:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    )
    with pytest.raises(ValueError, match=r"OPTForCausalLM \(opt\) has no part .* Set backbone_compile=False"):
        CausalBackbone(OPTForCausalLM(config).eval(), "opt", compiled=True)
