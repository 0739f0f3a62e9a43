"""Exports give the same model in PEFT, are imported again bit for bit, and are written completely or not at all."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpt_lightning import export_peft, import_peft
from mpt_lightning.backbones import Backbone
from mpt_lightning.checkpoint import PromptCheckpoint, read_checkpoint
from mpt_lightning.checkpoint.io import CheckedCheckpointIO
from mpt_lightning.interop import export_prompt_embeds
from tests.conftest import KINDS
from tests.interop.conftest import STAGES, TASKS, assert_same_model, make_prompt, with_peft

Make = Callable[..., Path]
Load = Callable[[str], Backbone]
ALL = [(kind, stage) for kind in KINDS for stage in STAGES] + [("gpt2", "CPT"), ("llama", "CPT")]


def assert_equal(got: PromptCheckpoint, expected: PromptCheckpoint) -> None:
    """Assert that two checkpoints are equal, except for local paths."""
    assert got.state_dict.keys() == expected.state_dict.keys()
    for name, value in expected.state_dict.items():
        assert got.state_dict[name].dtype == value.dtype
        assert torch.equal(got.state_dict[name], value)
    for name in ("stage", "backbone", "fingerprint", "prompt_class", "prompt_config", "cards", "metrics"):
        assert getattr(got, name) == getattr(expected, name), name
    assert got.hyper_parameters == {k: v for k, v in expected.hyper_parameters.items() if k != "source"}
    assert got.data == expected.data | {"data_root": "<local files>"}


@pytest.mark.parametrize(("kind", "stage"), ALL)
def test_peft_runs_each_task_as_we_do(kind: str, stage: str, checkpoint: Make, backbones: Load, tmp_path: Path) -> None:
    source, backbone = checkpoint(kind, stage), backbones(kind)
    tasks = read_checkpoint(str(source)).tasks
    for number, task in enumerate(tasks):
        export_peft(source, tmp_path / f"export/{number}", task)
    source.unlink()
    prompt = make_prompt(stage)
    prompt.attach(backbone.embeddings)
    for number, task in enumerate(tasks):
        folder = tmp_path / f"export/{number}"
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"
        assert load_file(folder / "adapter_model.safetensors").keys() == {"prompt_embeddings"}
        assert_same_model(backbone, prompt.fold(task), with_peft(backbone, folder))
        alone = import_peft(folder, backbone).prompt(backbone.embeddings)
        assert alone.tasks == [task]
        assert torch.equal(alone.fold(task), prompt.fold(task))


def test_only_the_umask_limits_who_may_read(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("t5", "PromptTuning")
    before = os.umask(0o027)
    try:
        CheckedCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "made" / "a.ckpt")
        export_peft(source, tmp_path / "made" / "peft")
        export_prompt_embeds(source, tmp_path / "made" / "embeds")
    finally:
        os.umask(before)
    made = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "made").rglob("*")}
    assert len(made) > 12
    assert {path: mode for path, mode in made.items() if mode != (0o750 if path.is_dir() else 0o640)} == {}


@pytest.mark.parametrize(("kind", "stage"), ALL)
def test_all_tasks_are_imported_again_and_run_in_peft(
    kind: str, stage: str, checkpoint: Make, backbones: Load, tmp_path: Path
) -> None:
    source, backbone = checkpoint(kind, stage), backbones(kind)
    expected = read_checkpoint(str(source))
    folder = export_peft(str(source), tmp_path / "deep/export")
    shutil.rmtree(source.parent)
    assert_equal(import_peft(folder), expected)
    assert_equal(read_checkpoint(str(folder), folder=True, backbone=backbone), expected)
    assert "/secret" not in (folder / "mpt_lightning.json").read_text()
    prompt = expected.prompt(backbone.embeddings)
    if stage in ("MPTSource", "MPTTarget"):
        numbers = json.loads((folder / "tasks.json").read_text())
        assert list(numbers) == expected.tasks
        model = with_peft(backbone, folder)
        for task, number in numbers.items():
            assert_same_model(backbone, prompt.fold(task), model, task_ids=torch.full((3,), number))
    elif stage == "PromptTuning":
        for task in TASKS:
            assert_same_model(backbone, prompt.fold(task), with_peft(backbone, folder / task))
            assert import_peft(folder / task).tasks == [task]
    else:
        assert_same_model(backbone, prompt.fold("glue/one"), with_peft(backbone, folder))


@pytest.mark.parametrize("stage", ["encoded", "superposed"])
def test_reparameterized_prompts_are_exported_folded(
    stage: str, checkpoint: Make, backbones: Load, tmp_path: Path
) -> None:
    source, backbone = checkpoint("llama", stage), backbones("llama")
    expected = read_checkpoint(str(source))
    folder = export_peft(source, tmp_path / "export")
    assert_equal(import_peft(folder), expected)
    prompt = expected.prompt(backbone.embeddings)
    for task in TASKS:
        assert_same_model(backbone, prompt.fold(task), with_peft(backbone, folder / task))
        assert torch.equal(import_peft(folder / task).prompt(backbone.embeddings).fold(task), prompt.fold(task))


def test_an_export_can_be_exported_again(checkpoint: Make, tmp_path: Path) -> None:
    first = export_peft(checkpoint("t5", "MPTSource"), tmp_path / "first")
    second = export_peft(first, tmp_path / "second", "two")
    third = export_peft(import_peft(first), tmp_path / "third", "two")
    for name in ("adapter_model.safetensors", "mpt_lightning.json", "README.md", "adapter_config.json"):
        assert (second / name).read_bytes() == (third / name).read_bytes()
    assert import_peft(second).prompt_class == "MultitaskPrompt"


OUTSIDE = ["../out", "/out", "a/../../out", "", "a//b", "..", "a\\..\\b", "a/./b", "nul\0", " a"]


@pytest.mark.parametrize("task", OUTSIDE)
def test_a_tasks_name_cannot_leave_the_folder(task: str, checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("t5", "PromptTuning")
    content = torch.load(source, weights_only=True)
    content["mpt_lightning"]["prompt_config"]["tasks"] = ["fine", task]
    torch.save(content, source)
    with pytest.raises(ValueError, match="cannot name a folder"):
        export_peft(source, tmp_path / "export")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    assert import_peft(export_peft(source, tmp_path / "export", task)).tasks == [task]


def test_names_that_differ_only_in_case_raise(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("t5", "PromptTuning")
    content = torch.load(source, weights_only=True)
    content["mpt_lightning"]["prompt_config"]["tasks"] = ["A", "a"]
    torch.save(content, source)
    with pytest.raises(ValueError, match="differ in case alone"):
        export_peft(source, tmp_path / "export")


def test_an_existing_path_is_not_overwritten(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("t5", "MPTSource")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        for replace in (False, True):
            with pytest.raises(ValueError, match=f"{name} exists"):
                export_peft(source, tmp_path / name, replace=replace)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link", "source"]
    export_peft(source, tmp_path / "export")
    with pytest.raises(ValueError, match="export exists"):
        export_peft(source, tmp_path / "export")
    export_peft(source, tmp_path / "export", "two", replace=True)
    assert import_peft(tmp_path / "export").tasks == ["two"]


def test_a_failed_export_leaves_no_files(checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint("t5", "MPTSource")
    kept = export_peft(source, tmp_path / "kept")
    before = (kept / "adapter_model.safetensors").read_bytes()

    def fail(*_: object, **__: object) -> str:
        assert list(tmp_path.rglob("adapter_model.safetensors"))
        raise OSError("disk full")

    monkeypatch.setattr("mpt_lightning.interop.peft.model_card", fail)
    for dest, replace in (("new", False), ("kept", True)):
        with pytest.raises(OSError, match="disk full"):
            export_peft(source, tmp_path / dest, replace=replace)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "source"]
    assert (kept / "adapter_model.safetensors").read_bytes() == before


def test_mistakes_get_one_message(checkpoint: Make, backbones: Load, tmp_path: Path) -> None:
    source = checkpoint("llama", "MPTSource")
    (tmp_path / "other.txt").write_text("text")
    for arguments, options, message in [
        ((source, tmp_path / "e", "three"), {}, "Unknown task 'three'. This prompt has: glue/one, two"),
        ((tmp_path / "no.ckpt", tmp_path / "e"), {}, "no.ckpt: there is no such file"),
        ((tmp_path / "other.txt", tmp_path / "e"), {}, "other.txt cannot be read"),
        ((tmp_path, tmp_path / "e"), {}, "is not a PEFT folder: it has no adapter_config.json"),
        ((source, tmp_path / "e"), {"backbone": backbones("gpt2")}, "was trained on the backbone"),
    ]:
        with pytest.raises(ValueError, match=message):
            export_peft(*arguments, **options)
    adapter = checkpoint("llama", "Adapters", state_dict={"backbone.model.lora_A": torch.ones(2)})
    with pytest.raises(ValueError, match="was saved by Adapters and contains no prompt, but trained weights"):
        export_peft(adapter, tmp_path / "e")
    gone = checkpoint("llama", "CPT")
    content = torch.load(gone, weights_only=True)
    content["mpt_lightning"]["backbone"] = str(tmp_path / "gone")
    torch.save(content, gone)
    with pytest.raises(ValueError, match="looks like a folder, which does not exist"):
        export_peft(gone, tmp_path / "e")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "source"]


def add_one(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, folder / "adapter_model.safetensors")


SMALLER = {"num_tasks": 1, "length": 9, "dim": 32, "rank": 3, "tasks": ["a"]}
OTHER = "does not fit this model. Its tensors differ"
OWN = {
    "later": (lambda f: describe(f, format=2), "has the export format 2; this version reads 1"),
    "damaged": (lambda f: (f / "mpt_lightning.json").write_text("{}"), "has the export format None"),
    "changed": (add_one, "was changed after the export"),
    "gone": (lambda f: (f / "adapter_model.safetensors").unlink(), "is missing or was changed"),
    "other shape": (lambda f: describe(f, prompt_config=SMALLER), OTHER),
}


def describe(folder: Path, **values: object) -> None:
    file = folder / "mpt_lightning.json"
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("case", OWN)
def test_a_wrong_export_raises(case: str, checkpoint: Make, tmp_path: Path) -> None:
    folder = export_peft(checkpoint("t5", "MPTSource"), tmp_path / "export")
    change, message = OWN[case]
    change(folder)
    with pytest.raises(ValueError, match=message):
        import_peft(folder)
