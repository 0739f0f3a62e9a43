"""Untrained checkpoints of every kind on the tiny models."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from peft import PeftModel
from stages import BERT
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from mpt_lightning import ContextPrompt, MultitaskPrompt, SoftPrompt, load_backbone
from mpt_lightning.backbones import Backbone
from mpt_lightning.checkpoint import KEY
from mpt_lightning.checkpoint.format import metadata
from mpt_lightning.prompts import EmptyPrompt, EncodedPrompt, Prompt, SuperposedPrompt
from tests.backbones.architectures import build_tiny
from tests.backbones.masked import build_tokenizer

TASKS = ["glue/one", "two"]
STAGES = ["PromptTuning", "MPTSource", "MPTTarget"]
IDS = [11, 12, 13, 14, 20, 30, 1, 2, 11, 15, 16, 20, 31, 32, 1, 2]
TYPES = [1, 2, 2, 2, 3, 4, 4, 0, 5, 6, 6, 7, 8, 8, 8, 0]
CARD = {
    "name": "glue/one", "path": "nyu-mll/glue", "subset": "sst2", "input": "film: {sentence}", "metrics": ["accuracy"],
    "choices": ["negative", "positive"], "language": "en",
}  # fmt: skip


def make_prompt(stage: str, dim: int = 32) -> Prompt:
    torch.manual_seed(7)
    prompt: Prompt = {
        "PromptTuning": lambda: SoftPrompt(2, 5, dim, TASKS),
        "MPTSource": lambda: MultitaskPrompt(2, 5, dim, 3, TASKS, "normal"),
        "MPTTarget": lambda: MultitaskPrompt(1, 5, dim, 1, ["glue/one"]),
        "Adapters": lambda: EmptyPrompt(2, dim, TASKS),
        "CPT": lambda: ContextPrompt(IDS, TYPES, dim, ["glue/one"]),
        "encoded": lambda: EncodedPrompt(2, 5, dim, TASKS, "lstm"),
        "superposed": lambda: SuperposedPrompt(2, 5, dim, [[5, 6, 7], [8, 9, 10]], TASKS),
    }[stage]()
    with torch.no_grad():
        for value in prompt.parameters():
            value.copy_(torch.randn_like(value))
    return prompt


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """Return a function that builds a quiet trainer."""

    def make(**options: Any) -> L.Trainer:
        defaults = {
            "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
            "default_root_dir": str(tmp_path),
        }  # fmt: skip
        return L.Trainer(**(defaults | options))

    return make


@pytest.fixture(scope="session")
def backbones(
    model_folder: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Backbone]:
    """Return a function that loads a tiny model by its kind; "bert" is the embedded one."""
    loaded: dict[str, Backbone] = {}

    def folder(kind: str) -> str:
        if kind != "modernbert":
            return BERT if kind == "bert" else model_folder(kind)
        folder = tmp_path_factory.mktemp(kind)
        build_tiny(kind, "masked").float().save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        return str(folder)

    def load(kind: str) -> Backbone:
        if kind not in loaded:
            loaded[kind] = load_backbone(folder(kind)).eval()
        return loaded[kind]

    return load


@pytest.fixture
def checkpoint(backbones: Callable[[str], Backbone], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a checkpoint as the modules do, and returns its path."""

    def make(kind: str, stage: str, card: dict[str, Any] = CARD, **more: Any) -> Path:
        backbone = backbones(kind)
        prompt = make_prompt(stage, backbone.dim)
        prompt.attach(backbone.embeddings)
        name = {"encoded": "PromptTuning", "superposed": "PromptTuning"}.get(stage, stage)
        content = {
            KEY: metadata(name, backbone.name, backbone.fingerprint, prompt, {"glue/one": card}),
            "state_dict": {f"prompt.{key}": value for key, value in prompt.state_dict().items()},
            "hyper_parameters": {"lr": 0.3, "source": "/secret/place.ckpt", "backbone": backbone.name},
            "datamodule_hyper_parameters": {"answer_prefix": "is", "data_root": "/secret/data", "seed": 1},
            "callbacks": {"ModelCheckpoint{}": {
                "monitor": "val/average", "best_k_models": {f"/secret/{stage}.ckpt": torch.tensor(0.75)},
            }},
        }  # fmt: skip
        path = tmp_path / "source" / f"{stage}.ckpt"
        path.parent.mkdir(exist_ok=True)
        torch.save(content | more, path)
        return path

    return make


def run_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run the README's examples in its folder; return their variables."""
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    made: list[dict[str, Any]] = []
    for block in blocks:
        made.append({})
        exec(block, made[-1])
    return made


def with_peft(backbone: Backbone, folder: Path) -> PeftModel:
    """Return a new copy of the model with the exported folder, loaded by PEFT."""
    cls = AutoModelForSeq2SeqLM if backbone.family == "seq2seq" else AutoModelForCausalLM
    return PeftModel.from_pretrained(cls.from_pretrained(backbone.name), str(folder)).eval()


ROWS = torch.tensor([[11, 25, 40, 31, 17], [90, 8, 33, 52, 61], [7, 7, 21, 14, 100]])


def assert_same_model(backbone: Backbone, prompt: torch.Tensor, peft: PeftModel, **options: Any) -> None:
    """Assert that a prompt `[P, H]` gives PEFT's logits and greedy answers."""
    labels = torch.tensor([[12, 40, 1], [9, 60, 1], [80, 3, 1]])
    mask, rows, length = torch.ones_like(ROWS), torch.zeros(len(ROWS), dtype=torch.long), len(prompt)
    generation = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    with torch.no_grad():
        ours = backbone(prompt[None], rows, ROWS, mask, labels).logits
        if backbone.family == "seq2seq":
            theirs = peft(input_ids=ROWS, attention_mask=mask, labels=labels, **options).logits
        else:
            whole = torch.cat([ROWS, labels], dim=1)
            theirs = peft(input_ids=whole, attention_mask=torch.ones_like(whole), **options).logits
            theirs = theirs[:, length + ROWS.shape[1] - 1 : -1]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        made = backbone.generate(prompt[None], rows, ROWS, mask, **generation)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Position ids are not supported")  # raised by PEFT at each step
            answers = peft.generate(input_ids=ROWS, attention_mask=mask, **options, **generation)
    skip = 1 if backbone.family == "seq2seq" else ROWS.shape[1]
    assert made.tolist() == answers[:, skip:].tolist()
    assert len(set(map(tuple, made.tolist()))) > 1
