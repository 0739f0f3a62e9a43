"""README's Python examples run, with the embedded model and task in place of those from the Hub."""

import re
import sys
from functools import wraps
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def snippet(word: str) -> str:
    """Return the one example that contains a word, with the embedded model and task."""
    (found,) = [text for text in SNIPPETS if word in text]
    return found.replace("google-t5/t5-base", "mpt_lightning/demo/t5").replace("glue/rte", "demo/topic")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[L.Trainer]:
    """Limit every Trainer to two steps in a temporary folder, and return the list of Trainers."""
    made = []
    initialise = L.Trainer.__init__

    @wraps(initialise)  # LightningCLI reads the signature
    def short(self: L.Trainer, **options: object) -> None:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        limits = {"limit_train_batches": 2, "limit_val_batches": 1, "max_epochs": 1, "accelerator": "cpu"}
        made.append(self)
        initialise(self, **(options | quiet | limits))

    monkeypatch.setattr(L.Trainer, "__init__", short)
    monkeypatch.chdir(tmp_path)
    return made


def test_plain_script(quick: list[L.Trainer]) -> None:
    exec(snippet("load_task("), {})
    assert quick[0].global_step == 2
    assert 0 <= float(quick[0].callback_metrics["val/demo/topic/accuracy"]) <= 1


@pytest.mark.parametrize("prompt", ["PromptTuning", "MPTTarget"])
def test_stock_command_line(prompt: str, quick: list[L.Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["fit", "--seed_everything", "1", "--model.backbone", "mpt_lightning/demo/t5", "--data.card", "demo/topic"]
    words += ["--data.max_train_rows", "64", "--data.cache_dir", "cache"]
    if prompt == "PromptTuning":
        words += ["--model.prompt_length", "4"]
    else:
        source = 'MPTSource("mpt_lightning/demo/t5", logits_weight=0, hidden_weight=0, prompt_length=100)'
        exec(re.sub(r"PromptTuning\(.*\)", source, snippet("load_task(")).replace("PromptTuning", "MPTSource"), {})
        quick[0].save_checkpoint("source.ckpt")
        words += ["--model.source", "source.ckpt"]
    monkeypatch.setattr(sys, "argv", ["main.py", *words])
    exec(snippet("LightningCLI(").replace("MPTTarget", prompt), {})
    assert quick[-1].global_step == 2
    assert 0 <= float(quick[-1].callback_metrics["val/demo/topic/accuracy"]) <= 1


def test_pieces_without_the_modules() -> None:
    batch = {"input_ids": torch.tensor([[5, 6, 1]] * 2), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    given = batch | {"task_ids": torch.tensor([4, 0]), "labels": torch.tensor([[7, 1]] * 2)}
    exec(snippet("MultitaskPrompt("), given)
    assert given["logits"].shape == (2, 2, len(given["backbone"].embeddings))
