"""Folders saved by PEFT become checkpoints with the same logits, and wrong folders raise."""

import json
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from peft import (
    CPTConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from mpt_lightning import MPTSource, MPTTarget, PromptTuning, export_peft, import_peft, load_backbone
from mpt_lightning.backbones import Backbone
from mpt_lightning.checkpoint import read_checkpoint
from tests.conftest import KINDS, build_model, build_tokenizer
from tests.interop.conftest import IDS, TYPES, assert_same_model
from tests.modules.conftest import TASKS, AnyData

Load = Callable[[str], Backbone]
Make = Callable[..., Path]


def save_with_peft(
    backbone: Backbone, kind: str, folder: Path, safe: bool = True, submodules: int | None = 1
) -> PeftModel:
    """Save a trained adapter with PEFT."""
    seq2seq = backbone.family == "seq2seq"
    common = {
        "task_type": TaskType.SEQ_2_SEQ_LM if seq2seq else TaskType.CAUSAL_LM,
        "num_virtual_tokens": 4,
        "num_transformer_submodules": submodules,
    }
    torch.manual_seed(3)
    config = {
        "PROMPT_TUNING": lambda: PromptTuningConfig(**common),
        "MULTITASK_PROMPT_TUNING": lambda: MultitaskPromptTuningConfig(**common, num_tasks=3, num_ranks=2),
        "CPT": lambda: CPTConfig(
            task_type=TaskType.CAUSAL_LM, cpt_token_ids=IDS, cpt_tokens_type_mask=TYPES, cpt_mask=[1] * len(IDS),
            opt_projection_epsilon=3.0, opt_projection_format_epsilon=2.0,
        ),
        "LORA": lambda: LoraConfig(task_type=common["task_type"], target_modules=["q_proj"]),
    }[kind]()  # fmt: skip
    model = build_model(Path(backbone.name).name)
    model.load_state_dict(backbone.model.state_dict())
    model.name_or_path = backbone.name
    wrapped = get_peft_model(model, config)
    if kind != "LORA":
        for value in wrapped.prompt_encoder["default"].parameters():
            if value.requires_grad:
                value.data.copy_(torch.randn_like(value))
    wrapped.save_pretrained(str(folder), safe_serialization=safe)
    return wrapped.eval()


CASES = [(name, kind) for name in KINDS for kind in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING")]
CASES += [("gpt2", "CPT"), ("llama", "CPT")]


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_peft_folder_has_the_same_logits(name: str, kind: str, safe: bool, backbones: Load, tmp_path: Path) -> None:
    backbone = backbones(name)
    model = save_with_peft(backbone, kind, tmp_path / "peft", safe)
    assert (tmp_path / f"peft/adapter_model.{'safetensors' if safe else 'bin'}").is_file()
    found = import_peft(tmp_path / "peft", backbone)
    prompt = found.prompt(backbone.embeddings)
    assert found.stage == "PEFT"
    assert found.fingerprint == backbone.fingerprint
    assert found.tasks == ["0", "1", "2"][: prompt.num_tasks]
    for number, task in enumerate(found.tasks):
        options = {"task_ids": torch.full((3,), number)} if kind == "MULTITASK_PROMPT_TUNING" else {}
        assert_same_model(backbone, prompt.fold(task), model, **options)
    if kind == "CPT":
        assert prompt.token_types == TYPES
        assert (prompt.epsilon, prompt.template_epsilon) == (3.0, 2.0)
        prompt.project()  # PEFT's perturbation is within our balls
        assert_same_model(backbone, prompt.fold("0"), model)
    again = import_peft(export_peft(found, tmp_path / "ours"), backbone)
    assert all(torch.equal(again.state_dict[key], value) for key, value in found.state_dict.items())


def test_a_folder_without_a_fingerprint_can_be_exported_too(backbones: Load, tmp_path: Path, other: str) -> None:
    backbone = backbones("t5")
    save_with_peft(backbone, "MULTITASK_PROMPT_TUNING", tmp_path / "peft")
    folder = export_peft(tmp_path / "peft", tmp_path / "ours")
    assert import_peft(folder).fingerprint == ""
    assert import_peft(folder, backbone).fingerprint == backbone.fingerprint
    export_peft(import_peft(folder), tmp_path / "again", "1", backbone=backbone)
    with pytest.raises(ValueError, match=r"was made for a model of width 32, and .* has 16"):
        import_peft(folder, load_backbone(other))


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"])
def test_the_encoders_half_is_imported(kind: str, backbones: Load, tmp_path: Path) -> None:
    """PEFT's default for an encoder-decoder also has rows for the decoder, which its `generate` does not use."""
    backbone = backbones("t5")
    model = save_with_peft(backbone, kind, tmp_path, submodules=None)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].shape == (8, 32)
    with pytest.warns(UserWarning, match="rows for the decoder too"):
        found = import_peft(tmp_path, backbone)
    prompt = found.prompt()
    assert prompt.length == 4
    rows, ids = torch.zeros(2, dtype=torch.long), torch.tensor([[5, 9, 1], [8, 3, 1]])
    options = {"max_new_tokens": 5, "do_sample": False}
    more = {"task_ids": rows} if kind == "MULTITASK_PROMPT_TUNING" else {}
    theirs = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **more, **options)
    made = backbone.generate(prompt.fold("0")[None], rows, ids, torch.ones_like(ids), **options)
    assert made.tolist() == theirs[:, 1:].tolist()


def test_a_mapping_file_names_the_tasks(backbones: Load, tmp_path: Path) -> None:
    save_with_peft(backbones("t5"), "MULTITASK_PROMPT_TUNING", tmp_path)
    for content, message in [
        ({"b": 1, "a": 0}, "must map each of 3 tasks to its number"),
        ({"b": 1, "a": 0, "c": 3}, "must map each of 3 tasks to its number"),
        ({"b": 1, "a": 0, "c": "x"}, "must map each of 3 tasks to its number"),
        (["a", "b", "c"], "cannot be read as a JSON object: it is a list"),
    ]:
        (tmp_path / "tasks.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            import_peft(tmp_path)
    (tmp_path / "tasks.json").write_text('{"b": 1, "a": 0, "c": 2}')
    assert import_peft(tmp_path).tasks == ["a", "b", "c"]


def test_target_tasks_start_from_pefts_multitask_folder(
    backbones: Load, tmp_path: Path, trainer: Callable[..., L.Trainer]
) -> None:
    backbone = backbones("t5")
    save_with_peft(backbone, "MULTITASK_PROMPT_TUNING", tmp_path / "peft")
    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    module = MPTTarget(backbone.name, source=str(tmp_path / "peft"), shared_lr=0.0, task_lr=0.0)
    trainer(max_steps=1).fit(module, datamodule=AnyData(["new"]))
    assert torch.equal(module.prompt.prompt_embeddings.detach(), tensors["prompt_embeddings"])
    torch.testing.assert_close(module.prompt.prefix_task_rows[0].detach(), tensors["prefix_task_rows"].mean(dim=0))
    picked = MPTTarget(backbone.name, source=str(tmp_path / "peft"), start="2", task_lr=0.0)
    trainer(max_steps=1).fit(picked, datamodule=AnyData(["new"]))
    assert torch.equal(picked.prompt.prefix_task_cols[0].detach(), tensors["prefix_task_cols"][2])


def test_teachers_and_initial_prompts_can_be_folders(
    backbones: Load, tmp_path: Path, trainer: Callable[..., L.Trainer], checkpoint: Make
) -> None:
    backbone = backbones("llama")
    for task in TASKS:
        save_with_peft(backbone, "PROMPT_TUNING", tmp_path / task)
    table = load_file(tmp_path / "two/adapter_model.safetensors")["prompt_embeddings"]
    folders = {task: str(tmp_path / task) for task in TASKS}
    source = MPTSource(backbone.name, teachers=folders, prompt_length=4)
    trainer(max_steps=1).fit(source, datamodule=AnyData())
    assert torch.equal(source.teacher_prompts[1], table)
    with pytest.raises(ValueError, match=r"The task 'one' has no teacher: --model.teachers .* has 0"):
        trainer().fit(MPTSource(backbone.name, teachers=folders["two"], prompt_length=4), datamodule=AnyData())
    save_with_peft(backbone, "CPT", tmp_path / "context")
    for folder in (tmp_path / "context", export_peft(checkpoint("llama", "CPT"), tmp_path / "ours")):
        module = PromptTuning(
            backbone.name, prompt_length=16, prompt_init="checkpoint", init_checkpoint=str(folder), lr=0.0
        )
        trainer(max_steps=1).fit(module, datamodule=AnyData(["one"]))
        expected = import_peft(folder, backbone).prompt(backbone.embeddings)(torch.tensor([0])).embeddings
        assert torch.equal(module.prompt.prompt_embeddings.detach(), expected.detach())


def test_a_folder_cannot_be_resumed(checkpoint: Make, tmp_path: Path) -> None:
    folder = str(export_peft(checkpoint("t5", "MPTSource"), tmp_path / "export"))
    for attempt in (lambda: MPTSource.load_from_checkpoint(folder), lambda: read_checkpoint(folder)):
        with pytest.raises(ValueError, match="is a folder, which holds no training state"):
            attempt()


@pytest.fixture
def other(tmp_path: Path) -> str:
    """A T5 of another width."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=120, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "other")
    build_tokenizer("t5").save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def test_another_backbone_raises(
    backbones: Load, tmp_path: Path, other: str, trainer: Callable[..., L.Trainer], checkpoint: Make
) -> None:
    save_with_peft(backbones("t5"), "MULTITASK_PROMPT_TUNING", tmp_path / "peft")
    wrong = MPTTarget(other, source=str(tmp_path / "peft"))
    with pytest.raises(
        ValueError, match=r"was made for .*embeddings of width 32\), and this run has .* \(SEQ_2_SEQ_LM, 16\)"
    ):
        trainer().fit(wrong, datamodule=AnyData(["new"]))
    with pytest.raises(ValueError, match=r"SEQ_2_SEQ_LM, .* and this run has .* \(CAUSAL_LM, 32\)"):
        import_peft(tmp_path / "peft", backbones("llama"))
    ours = export_peft(checkpoint("t5", "MPTSource"), tmp_path / "ours")
    with pytest.raises(ValueError, match=r"was trained on the backbone .* A prompt fits only the model"):
        trainer().fit(MPTTarget(other, source=str(ours)), datamodule=AnyData(["new"]))
    # A model of equal width is recognised by CPT's frozen tokens, but not by a plain prompt.
    for kind in ("CPT", "PROMPT_TUNING"):
        save_with_peft(backbones("gpt2"), kind, tmp_path / kind)
    with pytest.raises(ValueError, match="the embeddings of its labels and separators"):
        import_peft(tmp_path / "CPT", backbones("llama"))
    with pytest.warns(UserWarning, match="make sure that they are one model"):
        import_peft(tmp_path / "PROMPT_TUNING", backbones("llama"))


def edit(folder: Path, **values: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def tensors(folder: Path, change: Callable[[dict], object]) -> None:
    content = load_file(folder / "adapter_model.safetensors")
    change(content)
    save_file(content, folder / "adapter_model.safetensors")


BAD = {
    "no config": (
        lambda f: (f / "adapter_config.json").unlink(),
        "is not a PEFT folder: it has no adapter_config.json",
    ),
    "broken config": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read as a JSON object"),
    "another type": (
        lambda f: edit(f, peft_type="P_TUNING"),
        "has the peft_type 'P_TUNING'. Expected PROMPT_TUNING or",
    ),
    "no type": (lambda f: edit(f, peft_type=None), "has the peft_type None"),
    "another task": (lambda f: edit(f, task_type="SEQ_CLS"), "has the task_type 'SEQ_CLS'"),
    "no length": (lambda f: edit(f, num_virtual_tokens=None), "has no number as num_virtual_tokens"),
    "another length": (lambda f: edit(f, num_virtual_tokens=7), r"got .*\[4, 32\].*; expected .*\[7, 32\]"),
    "three parts": (lambda f: edit(f, num_transformer_submodules=3), r"got .*\[4, 32\].*; expected .*\[12, 32\]"),
    "other tasks": (lambda f: edit(f, num_tasks=9), r"expected .*'prefix_task_cols': \[9, 4, 2\]"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no tensors. Expected adapter_model"),
    "cut off": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 9),
        "adapter_model.safetensors cannot be",
    ),
    "missing": (
        lambda f: tensors(f, lambda t: t.pop("prefix_task_cols")),
        "does not contain what its adapter_config.json",
    ),
    "missing table": (lambda f: tensors(f, lambda t: t.pop("prompt_embeddings")), "got {'prefix_task_cols.*; expected"),
    "extra": (lambda f: tensors(f, lambda t: t.update(head=torch.ones(2))), r"got {'head': \[2\], 'prefix"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_folder_raises(case: str, backbones: Load, tmp_path: Path) -> None:
    save_with_peft(backbones("t5"), "MULTITASK_PROMPT_TUNING", tmp_path)
    change, message = BAD[case]
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        import_peft(tmp_path)


def test_folders_of_other_kinds_raise(backbones: Load, tmp_path: Path) -> None:
    save_with_peft(backbones("llama"), "LORA", tmp_path / "lora")
    with pytest.raises(ValueError, match=r"has the peft_type 'LORA'\. Expected PROMPT_TUNING or MULTITASK"):
        import_peft(tmp_path / "lora")
    with pytest.raises(ValueError, match="there is no such folder"):
        import_peft(tmp_path / "nothing")
    save_with_peft(backbones("llama"), "CPT", tmp_path / "cpt")
    edit(tmp_path / "cpt", cpt_token_ids=IDS[1:])
    with pytest.raises(ValueError, match="has 15 cpt_token_ids; expected 16"):
        import_peft(tmp_path / "cpt")
    edit(tmp_path / "cpt", cpt_token_ids=IDS, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="needs its backbone ''"):
        import_peft(tmp_path / "cpt")
    edit(tmp_path / "cpt", base_model_name_or_path="/gone")
    with pytest.raises(ValueError, match="looks like a folder, which does not exist"):
        import_peft(tmp_path / "cpt")
    save_with_peft(backbones("llama"), "PROMPT_TUNING", tmp_path / "bin", safe=False)
    (tmp_path / "bin/adapter_model.bin").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"adapter_model\.bin cannot be read"):
        import_peft(tmp_path / "bin")


def test_code_in_a_folder_is_not_run(backbones: Load, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "sprung"), "w"))

    save_with_peft(backbones("llama"), "PROMPT_TUNING", tmp_path / "bin", safe=False)
    torch.save({"prompt_embeddings": Trap()}, tmp_path / "bin/adapter_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        import_peft(tmp_path / "bin")
    assert not (tmp_path / "sprung").exists()
