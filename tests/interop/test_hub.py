"""Cards say what was exported with code that runs, embeddings feed plain transformers, and folders get pushed."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from mpt_lightning import export_peft
from mpt_lightning.backbones import Backbone
from mpt_lightning.checkpoint import read_checkpoint
from mpt_lightning.interop import export_prompt_embeds, hub, model_card, push
from tests.conftest import KINDS
from tests.interop.conftest import CARD, TASKS, make_prompt

Give = Callable[[str], Backbone]
Make = Callable[..., Path]


def run_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run the README's examples where its reader would; give their variables."""
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    made: list[dict[str, Any]] = []
    for block in blocks:
        made.append({})
        exec(block, made[-1])
    return made


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("task", [None, "glue/one"])
@pytest.mark.parametrize(
    ("kind", "stage"),
    [("t5", "PromptTuning"), ("t5", "MPTTarget"), ("gpt2", "MPTSource"), ("gpt2", "CPT"), ("llama", "superposed")],
)
def test_an_exports_readme_has_code_that_runs(
    kind: str, stage: str, task: str | None, checkpoint: Make, backbones: Give, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = export_peft(checkpoint(kind, stage), tmp_path / "export", task)
    with_peft, ours = run_code(folder, monkeypatch)
    assert type(with_peft["model"]).__name__.startswith("PeftModel")
    prompt = make_prompt(stage)
    prompt.attach(backbones(kind).embeddings)
    assert torch.equal(ours["prompt"], prompt.fold("glue/one"))
    numbers = {"task_ids": torch.tensor([0])} if "tasks" in with_peft else {}
    got = with_peft["model"].get_prompt(1, **numbers)[0]
    torch.testing.assert_close(got, prompt.fold("glue/one"))


def test_a_card_says_what_there_is(checkpoint: Make, tmp_path: Path) -> None:
    text = model_card(read_checkpoint(str(checkpoint("t5", "MPTSource"))))
    _, front, body = text.split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["library_name"] == "peft"
    assert found["datasets"] == ["nyu-mll/glue"]
    assert found["language"] == ["en"]
    assert "base_model" not in found  # a folder of this machine is no model of the Hub
    for words in (
        "Multitask prompt tuning, source training", "2303.02861", "MultitaskPrompt, 5 tokens of width 32",
        "| Trained parameters | 382 |", "**glue/one**: nyu-mll/glue sst2; input `film: {sentence}`; answers: negative",
        "- **two**", "| val/average | 0.7500 |", "Trained with lr 0.3, seed 1", "tasks.json", "--model.source",
        "After every input stands `is`",
    ):  # fmt: skip
        assert words in body, words
    context = model_card(read_checkpoint(str(checkpoint("gpt2", "CPT"))))
    assert "The prompt is made of training examples" in context
    assert "| Trained parameters | 288 |" in context  # nine of sixteen tokens move


def test_a_card_names_models_of_the_hub_and_embedded_ones(checkpoint: Make) -> None:
    source = checkpoint("t5", "PromptTuning")
    content = torch.load(source, weights_only=True)
    for name, base in (("google-t5/t5-base", "google-t5/t5-base"), ("mpt_lightning/demo/t5", None)):
        content["mpt_lightning"]["backbone"] = name
        torch.save(content, source)
        text = model_card(read_checkpoint(str(source)), is_encoder_decoder=True)
        assert yaml.safe_load(text.split("---\n")[1]).get("base_model") == base
        assert ("backbone_path('mpt_lightning/demo/t5')" in text) == (base is None)
    assert "/secret" not in text


def test_scores_are_those_of_this_file_alone(checkpoint: Make) -> None:
    source = checkpoint("t5", "PromptTuning")
    assert read_checkpoint(str(source)).metrics == {"val/average": 0.75}
    copy = shutil.copy(source, source.with_name("last.ckpt"))
    assert read_checkpoint(str(copy)).metrics == {}
    assert "## Metrics" not in model_card(read_checkpoint(str(copy)))


CASES = [(kind, stage) for kind in KINDS for stage in ("PromptTuning", "MPTSource")] + [
    ("gpt2", "CPT"),
    ("llama", "CPT"),
]


@pytest.mark.parametrize(("kind", "stage"), CASES)
def test_embeddings_feed_plain_transformers(
    kind: str, stage: str, checkpoint: Make, backbones: Give, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, backbone = checkpoint(kind, stage), backbones(kind)
    folder = export_prompt_embeds(source, tmp_path / "embeds")
    source.unlink()
    index = json.loads((folder / "prompt_embeds.json").read_text())
    prompt = make_prompt(stage)
    prompt.attach(backbone.embeddings)
    assert list(index["tasks"]) == prompt.tasks
    assert (index["length"], index["width"], index["dtype"]) == (prompt.length, 32, "float32")
    cls = AutoModelForSeq2SeqLM if index["is_encoder_decoder"] else AutoModelForCausalLM
    model = cls.from_pretrained(index["backbone"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(index["tokenizer"])
    labels = torch.tensor([[7, 9, 1]])
    for task, entry in index["tasks"].items():
        assert entry["template"] == (CARD["input"] if task == "glue/one" else None)
        assert entry["choices"] == (CARD["choices"] if task == "glue/one" else None)
        assert entry["answer_prefix"] == "is"
        tensors = load_file(folder / entry["file"])
        assert tensors.keys() == {"prompt_embeds"}
        assert torch.equal(tensors["prompt_embeds"], prompt.fold(task))
        ids = tokenizer("the film was good is", return_tensors="pt")["input_ids"]
        embeds = torch.cat([tensors["prompt_embeds"], model.get_input_embeddings()(ids[0])])[None]
        mask, rows = torch.ones_like(ids), torch.tensor([0])
        with torch.no_grad():
            ours = backbone(prompt.fold(task)[None], rows, ids, mask, labels).logits
            if index["is_encoder_decoder"]:
                theirs = model(inputs_embeds=embeds, labels=labels).logits
            else:
                whole = torch.cat([embeds, model.get_input_embeddings()(labels[:, :-1])], dim=1)
                theirs = model(inputs_embeds=whole).logits[:, -3:]
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
            made = backbone.generate(prompt.fold(task)[None], rows, ids, mask, **options)
            theirs = model.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), **options)
        assert made.tolist() == (theirs[:, 1:] if index["is_encoder_decoder"] else theirs).tolist()
    (example,) = run_code(folder, monkeypatch)
    assert example["embeds"].shape == (1, prompt.length + example["ids"].shape[1], 32)


def test_embeddings_of_one_task(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("llama", "PromptTuning")
    folder = export_prompt_embeds(source, tmp_path / "one", "two")
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.*")) == [
        "README.md", "prompt_embeds.json", "two.safetensors",
    ]  # fmt: skip
    assert list(json.loads((folder / "prompt_embeds.json").read_text())["tasks"]) == ["two"]
    for dest, task, message in (("one", None, "one exists"), ("more", "three", "Unknown task 'three'")):
        with pytest.raises(ValueError, match=message):
            export_prompt_embeds(source, tmp_path / dest, task)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "source"]


class LocalHub:
    """The Hub as a folder."""

    root: Path
    calls: list[dict[str, Any]]

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        LocalHub.calls.append(options)
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id, __str__=lambda: repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)


def test_an_export_is_pushed_as_it_is(checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", LocalHub)
    LocalHub.root, LocalHub.calls = tmp_path / "hub", []
    folder = export_peft(checkpoint("t5", "PromptTuning"), tmp_path / "export")
    push(folder, "me/prompts", private=True)
    assert LocalHub.calls == [{"private": True, "exist_ok": True}]
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert {f"{task}/adapter_model.safetensors" for task in TASKS} < set(names)
    for name in names:
        assert (LocalHub.root / "me/prompts" / name).read_bytes() == (folder / name).read_bytes()


def test_what_cannot_be_pushed_is_told(checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"is no export: it has no README\.md"):
        push(tmp_path, "me/prompts")
    folder = export_peft(checkpoint("t5", "MPTSource"), tmp_path / "export")
    with pytest.raises(ValueError, match=r"was not pushed to 'a/b/c': Repo id must be in the form"):
        push(folder, "a/b/c")

    class Unreachable(LocalHub):
        def upload_folder(self, **_: Any) -> None:
            raise ConnectionError("no route\nmore")

    monkeypatch.setattr(hub, "HfApi", Unreachable)
    LocalHub.root, LocalHub.calls = tmp_path / "hub", []
    with pytest.raises(ValueError, match=r"was not pushed to 'me/prompts': no route\. Check the repository's name"):
        push(folder, "me/prompts")
