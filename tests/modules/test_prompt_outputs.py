"""Prompts that return more than embeddings (DePT, prefix tuning), in comparisons and where embeddings are needed."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional

from mpt_lightning import Adapters, DePT, MPTSource, PrefixTuning, PromptTuning, export_peft
from mpt_lightning.callbacks import PEFTExport, SimilarityPicture, prompt_similarity
from mpt_lightning.modules import PromptModule
from mpt_lightning.prompts import DecomposedPrompt, PrefixPrompt, Prompt, SoftPrompt
from tests.modules.conftest import AnyData

MakeTrainer = Callable[..., L.Trainer]
SHAPE = {"num_tasks": 3, "length": 2, "layers": 2, "heads": 2, "width": 4}
PROMPTS: dict[str, Callable[[], Prompt]] = {
    "embeddings": lambda: SoftPrompt(3, 2, 8),
    "DePT": lambda: DecomposedPrompt(3, 2, 8, text_length=4, rank=2),
    "prefix": lambda: PrefixPrompt(**SHAPE),
    "prefix through a network": lambda: PrefixPrompt(**SHAPE, projection=5),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_similarity_is_the_cosine_of_the_outputs(kind: str) -> None:
    torch.manual_seed(0)
    prompt = PROMPTS[kind]()
    for parameter in prompt.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        made = [prompt(torch.tensor([task])) for task in range(3)]
    if kind == "DePT":
        assert all(output.shift is not None for output in made)
    if kind in ("embeddings", "DePT"):
        made = [output.embeddings for output in made]
    else:
        made = [torch.stack([torch.stack(pair) for pair in output.layers]) for output in made]
    expected = [
        functional.cosine_similarity(made[a].flatten(), made[b].flatten(), 0) for a, b in product(range(3), repeat=2)
    ]
    torch.testing.assert_close(prompt_similarity(prompt), torch.stack(expected).view(3, 3), rtol=1e-5, atol=1e-6)
    assert prompt_similarity(prompt)[0, 1].abs() < 0.99


def make(method: str, backbone: str) -> PromptModule:
    if method == "DePT":
        return DePT(backbone, prompt_length=4, rank=2)
    return PrefixTuning(backbone, prompt_length=4) if method == "PrefixTuning" else Adapters(backbone, size=2)


@pytest.mark.parametrize(
    ("method", "content"),
    [
        ("DePT", "embeddings and a shift of the text's embeddings"),
        ("PrefixTuning", "keys and values for every layer"),
        ("Adapters", "no prompt, but trained weights of the backbone"),
    ],
)
def test_initialization_teachers_and_export_need_embeddings(
    method: str, content: str, model_folder: Callable[[str], str], data: AnyData, trainer: MakeTrainer, tmp_path: Path
) -> None:
    backbone, path = model_folder("llama"), str(tmp_path / "saved.ckpt")
    run = trainer(callbacks=[SimilarityPicture()])
    run.fit(make(method, backbone), datamodule=data)
    assert (tmp_path / "prompt_similarity.png").is_file() == (method != "Adapters")
    run.save_checkpoint(path)
    start = PromptTuning(backbone, prompt_length=4, prompt_init="checkpoint", init_checkpoint=path)
    for module, argument in (
        (start, "init_checkpoint"),
        (MPTSource(backbone, teachers=path, prompt_length=4), "teachers"),
    ):
        with pytest.raises(ValueError, match=f"--model.{argument} .* was saved by {method} and contains {content};"):
            trainer().fit(module, datamodule=data)
    with pytest.raises(ValueError, match=f"was saved by {method} and contains {content}"):
        export_peft(path, tmp_path / "export")
    run = trainer(callbacks=[PEFTExport(), ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    with pytest.raises(ValueError, match=f"{method} trains {content}. Remove PEFTExport"):
        run.fit(make(method, backbone), datamodule=data)
    assert run.global_step == 0
