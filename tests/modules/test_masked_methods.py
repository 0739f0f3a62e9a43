"""Every method on a masked model equals transformers and PEFT, run on one row at a time, in float64."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import peft
import pytest
import torch
from stages import BERT, doubled
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM

from mpt_lightning import Adapters, DePT, FineTuning, MultitaskDataModule, PEFTModule, PromptTuning
from mpt_lightning.data.card import load_card
from mpt_lightning.data.template import Pattern
from mpt_lightning.modules import PromptModule
from mpt_lightning.modules.peft import orthogonality
from mpt_lightning.resources import backbone_path

# Three prompt tokens before, between and after the words.
PLACES = {
    "demo/voice": "[prompt*2] sentence : {sentence} [prompt*1] [MASK]",
    "demo/topic": "sentence [prompt*1] : {sentence} [MASK] [prompt*2]",
}
NETWORKS = ["residual", "mlp", "lstm", "superposition"]
PEFT = {
    "LoRA": peft.LoraConfig(r=4),
    "IA3": peft.IA3Config(),
    "AdaLoRA": peft.AdaLoraConfig(init_r=4, target_r=2, tinit=0, tfinal=0, total_step=1),
}
METHODS: dict[str, Callable[[], PromptModule]] = {
    **{kind: lambda kind=kind: PromptTuning(BERT, prompt_length=3, reparameterization=kind) for kind in NETWORKS},
    "DePT": lambda: DePT(BERT, prompt_length=3, rank=2, text_length=6),
    **{name: lambda config=config: PEFTModule(BERT, config) for name, config in PEFT.items()},
    "houlsby": lambda: Adapters(BERT, size=4),
    "pfeiffer": lambda: Adapters(BERT, size=4, places="pfeiffer"),
    "fine-tuning": lambda: FineTuning(BERT),
    "fine-tuning of the head": lambda: FineTuning(BERT, train="head"),
}


class WithAdapter(nn.Linear):
    """A linear layer, and a bottleneck of four features on its output."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.requires_grad_(False)
        self.adapter = nn.ModuleDict({"down": nn.Linear(outputs, 4), "up": nn.Linear(4, outputs)})

    def forward(self, states: Tensor) -> Tensor:
        states = super().forward(states)
        return states + self.adapter["up"](self.adapter["down"](states).relu())


def reference(method: str) -> nn.Module:
    """Build transformers' model, changed by PEFT or by hand as a method changes it; it has gradients where trained."""
    model = BertForMaskedLM(BertConfig.from_pretrained(backbone_path(BERT))).eval()
    if method in PEFT:
        return peft.get_peft_model(model, PEFT[method]).base_model.model.double()
    model.requires_grad_(method == "fine-tuning")
    for layer in model.bert.encoder.layer:
        for part in {"houlsby": [layer.attention.output, layer.output], "pfeiffer": [layer.output]}.get(method, []):
            part.dense = WithAdapter(part.dense.in_features, part.dense.out_features)
    if method == "fine-tuning of the head":
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        head.requires_grad_(True)
    return model.double()


def by_hand(model: Any, batch: dict[str, Any], prompts: Tensor, shift: Tensor | None, mask_id: int) -> Tensor:
    """Return the logits `[B, V]` at the mask, for prompts `[T, P, H]` and a shift `[T, S, H]` of the words."""
    found = []
    for ids, mask, task in zip(batch["input_ids"], batch["attention_mask"], batch["task_ids"], strict=True):
        ids = ids[mask == 1]
        assert sorted(ids[ids < 0].tolist(), reverse=True) == [-1, -2, -3][: prompts.shape[1]]
        words = model.get_input_embeddings()(ids[ids >= 0])
        if shift is not None:
            moved = shift[task][: len(words)]
            words = torch.cat([words[: len(moved)] + moved, words[len(moved) :]])
        rest = iter(words)
        embeds = torch.stack([prompts[task][-1 - token] if token < 0 else next(rest) for token in ids.tolist()])
        found.append(model(inputs_embeds=embeds[None]).logits[0, ids.tolist().index(mask_id)])
    return torch.stack(found)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_equals_transformers(method: str, cache: Path, trainer: Callable[..., L.Trainer]) -> None:
    torch.manual_seed(0)
    module, cards = METHODS[method](), [load_card(name) for name in PLACES]
    if method in [*NETWORKS, "DePT"]:
        cards = [replace(card, masked=Pattern(PLACES[card.name])) for card in cards]
    data = MultitaskDataModule(cards, sampling="all", batch_size=6, max_train_rows=6, cache_dir=str(cache))
    trainer(max_steps=1).fit(doubled(module), datamodule=data)
    (backbone, prompt), batch = module.parts(), next(iter(data.train_dataloader()))
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.05 * torch.randn_like(parameter)

    model = reference(method)
    model.load_state_dict(backbone.model.state_dict())
    own = {name: value.detach().clone().requires_grad_() for name, value in prompt.named_parameters()}
    output = functional_call(prompt, own, torch.arange(2))
    logits = by_hand(model, batch, output.embeddings, output.shift, backbone.tokenizer.mask_token_id)
    words = [backbone.tokenizer.convert_tokens_to_ids(card.choices) for card in data.cards.values()]
    losses = [
        functional.cross_entropy(row[words[task]], torch.tensor(words[task].index(int(label[0]))))
        for row, task, label in zip(logits, batch["task_ids"].tolist(), batch["labels"], strict=True)
    ]
    expected = torch.stack(losses).mean() + (0.5 * orthogonality(model) if method == "AdaLoRA" else 0.0)
    expected.backward()

    module.zero_grad()
    loss = module.losses(batch)["loss"]
    loss.backward()
    torch.testing.assert_close(module(batch)[:, 0], logits, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-8)
    theirs = {f"backbone.model.{name}": value for name, value in model.named_parameters() if value.requires_grad}
    theirs |= {f"prompt.{name}": value for name, value in own.items()}
    assert trained.keys() == theirs.keys()
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float64
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-7, atol=1e-9)
        assert parameter.grad.abs().max() > 0, name
