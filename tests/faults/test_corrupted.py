"""Damaged and hostile checkpoints are refused with a clear message by everything that reads one."""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from safetensors.torch import save

from mpt_lightning import MPTSource, MPTTarget, Predictor, PromptTuning
from mpt_lightning.checkpoint import KEY, read_checkpoint
from mpt_lightning.cli.main import main
from tests.faults.conftest import STAGES, Outcome, Payload, World
from tests.faults.damage import Change, Damage, drop, flip, put, saved, zipped
from tests.modules.conftest import AnyData

pytestmark = pytest.mark.usefixtures("own_folder")


def inside(name: str, part: str) -> Callable[[bytes, Random], int]:
    """Return a function that chooses a position in one of the archive's files, in its header or its content."""

    def find(content: bytes, random: Random) -> int:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = archive.infolist()
            (info,) = [i for i in infos if i.filename.endswith(name)][:1]
            end = min([i.header_offset for i in infos if i.header_offset > info.header_offset] + [archive.start_dir])
        name_length, extra_length = struct.unpack_from("<HH", content, info.header_offset + 26)
        data = info.header_offset + 30 + name_length + extra_length
        if part == "header":
            return info.header_offset + random.randrange(30)
        if part == "content":
            return data + random.randrange(info.file_size)
        if part == "padding":
            return data - 1 - random.randrange(8)
        return min(data + info.file_size + random.randrange(8), end - 1)  # the checksum after the content

    return find


def from_end(low: int, high: int) -> Callable[[bytes, Random], int]:
    return lambda content, random: len(content) - random.randrange(low, high)


def as_folder(content: bytes, random: Random) -> bytes:
    """Set the bit of the archive's directory for which torch would leave a tensor uninitialised."""
    place = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0")) + 38
    return content[:place] + bytes([content[place] | 0x10]) + content[place + 1 :]


def byte_damages() -> Iterator[tuple[str, Damage]]:
    for size in (0, 1, 100):
        yield f"first {size} bytes", lambda c, r, size=size: c[:size]
    for less in (1, 22, 400):
        yield f"last {less} bytes gone", lambda c, r, less=less: c[:-less]
    yield "cut at random", lambda c, r: c[: r.randrange(1, len(c))]
    for number in range(12):
        yield f"bit at random {number}", flip(lambda c, r: r.randrange(len(c)))
    for name in ("data.pkl", "data/0", "version"):
        for part in ("header", "content", "checksum"):
            yield f"bit in {part} of {name.replace('/', ' ')}", flip(inside(name, part))
    yield "bit in padding", flip(inside("data/0", "padding"))
    for number in range(6):
        yield f"bit in directory {number}", flip(from_end(100, 1000))
    for number in range(6):
        yield f"bit in directory's end {number}", flip(from_end(1, 99))
    yield "a tensor marked as a folder", as_folder
    yield "byte before", lambda c, r: b"\0" + c
    yield "byte after", lambda c, r: c + b"\0"
    yield "text after", lambda c, r: c + b"more than there was" * 9
    yield "twice", lambda c, r: c + c
    yield "byte lost", lambda c, r: c[: (at := r.randrange(len(c)))] + c[at + 1 :]
    yield "byte more", lambda c, r: c[: (at := r.randrange(len(c)))] + b"x" + c[at:]
    yield "block of zeros", lambda c, r: c[: (at := r.randrange(len(c) - 512))] + bytes(512) + c[at + 512 :]
    yield "blocks swapped", lambda c, r: c[512:1024] + c[:512] + c[1024:]
    yield "random bytes", lambda c, r: r.randbytes(len(c))
    yield "text", lambda c, r: b"prompt\n" * 30
    yield "safetensors", lambda c, r: save({"prompt.prompt_embeddings": torch.zeros(2, 4, 32)})
    yield "another zip", lambda c, r: zipped({"readme.txt": b"text"})
    yield "bare pickle", lambda c, r: pickle.dumps({KEY: {}})
    yield "a tensor", lambda c, r: saved(torch.zeros(3))
    yield "a state dict", lambda c, r: saved({"weight": torch.zeros(3)})


ENTRIES = ("load", "predictor", "export", "teachers", "source", "init", "fit", "test")


def read_by(entry: str, path: Path, stage: str, world: World) -> object:
    """Pass a checkpoint to one of the functions and commands that read one."""
    backbone = world.backbones["llama" if stage == "CPT" else "t5"]
    trainer = partial(
        L.Trainer, accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    if entry == "read":
        return read_checkpoint(str(path))
    if entry == "load":
        return STAGES[stage].load_from_checkpoint(str(path))
    if entry == "predictor":
        return Predictor.from_checkpoint(str(path))
    if entry == "export":
        return main(["export", str(path), "export", "--to", "peft"])
    if entry in ("fit", "test"):
        more = ["--trainer.max_steps", "3"] if entry == "fit" else []
        return main([entry, "--config", str(world.recipes[stage]), "--ckpt_path", str(path), *more])
    modules = {
        "teachers": lambda: MPTSource(backbone, teachers=str(path), prompt_length=4),
        "source": lambda: MPTTarget(backbone, source=str(path)),
        "init": lambda: PromptTuning(backbone, prompt_length=4, prompt_init="checkpoint", init_checkpoint=str(path)),
    }
    return trainer().fit(modules[entry](), datamodule=AnyData(["one", "two"]))


def equal_content(left: Any, right: Any) -> bool:
    """Return whether two contents are equal, tensors bit by bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.dtype == right.dtype
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal_content(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal_content, left, right))
    return bool(left == right)


BYTE_CASES = [
    pytest.param(name, damage, list(STAGES)[number % 3], ENTRIES[number % 8], id=name)
    for number, (name, damage) in enumerate(byte_damages())
]


@pytest.mark.parametrize(("name", "damage", "stage", "entry"), BYTE_CASES)
def test_changed_bytes(
    name: str, damage: Damage, stage: str, entry: str, world: World, tmp_path: Path, outcome: Outcome
) -> None:
    whole = world.checkpoints[stage].read_bytes()
    path = tmp_path / "best.ckpt"
    path.write_bytes(damage(whole, Random(f"{name} {stage}")))
    assert path.read_bytes() != whole
    message = outcome(lambda: read_by("read", path, stage, world))
    if message is None:
        # Accepted only if the content is unchanged.
        assert equal_content(torch.load(path, weights_only=True), world.plain(stage))
        return
    assert str(path) in message
    again = outcome(lambda: read_by(entry, path, stage, world))
    assert again is not None
    assert str(path) in again


def test_a_sealed_checkpoint_of_an_earlier_version_loads(world: World, tmp_path: Path) -> None:
    """Earlier versions wrote a digest into the archive's comment."""
    comment, path = b"sha256:" + b"0" * 64, tmp_path / "sealed.ckpt"
    path.write_bytes(saved(world.plain("PromptTuning"))[:-2] + struct.pack("<H", len(comment)) + comment)
    assert read_checkpoint(str(path)).tasks == ["one", "two"]


def tensor(change: Callable[[torch.Tensor], Any], name: str = "prompt.prompt_embeddings") -> Callable[[Any], None]:
    """Return a function that changes a trained tensor."""

    def run(content: Any) -> None:
        content["state_dict"][name] = change(content["state_dict"][name])

    return run


def with_one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(values: torch.Tensor) -> torch.Tensor:
        values.view(-1)[7] = value
        return values

    return change


def nan_in_the_optimizer(content: Any) -> None:
    next(iter(content["optimizer_states"][0]["state"].values()))["exp_avg"].view(-1)[3] = float("nan")


CONFIG = (KEY, "prompt_config")


def content_damages() -> Iterator[tuple[str, str, str, Change]]:
    """Yield the mistake's name, the stage, the reader that must refuse it, and the change."""
    for number, value in enumerate([None, "1", 2]):
        yield f"format {number}", "PromptTuning", "read", put(KEY, "format", value=value)
    for field, value in {"num_tasks": 3, "length": 5, "dim": 31}.items():
        yield f"another {field}", "PromptTuning", "read", put(*CONFIG, field, value=value)
    yield "an unknown prompt", "PromptTuning", "read", put(KEY, "prompt_class", value="Nothing")
    yield "another prompt", "PromptTuning", "read", put(KEY, "prompt_class", value="MultitaskPrompt")
    yield "token beyond the vocabulary", "CPT", "predictor", put(*CONFIG, "token_ids", 3, value=9999)
    yield "another stage's class", "MPTSource", "load", put(KEY, "stage", value="PromptTuning")
    yield "a stage that is a module", "PromptTuning", "load", put(KEY, "stage", value="base")
    yield "a backbone that is gone", "PromptTuning", "predictor", put(KEY, "backbone", value="/gone")
    yield "another fingerprint", "PromptTuning", "predictor", put(KEY, "fingerprint", value="0" * 16)
    yield "another fingerprint", "MPTSource", "load", put(KEY, "fingerprint", value="0" * 16)
    yield "another fingerprint", "PromptTuning", "teachers", put(KEY, "fingerprint", value="0" * 16)
    yield "another fingerprint", "MPTSource", "source", put(KEY, "fingerprint", value="0" * 16)
    yield "other tasks", "PromptTuning", "teachers", put(*CONFIG, "tasks", value=["three", "four"])
    yield "other tasks", "PromptTuning", "test", put(*CONFIG, "tasks", value=["three", "four"])
    for name in (KEY, "state_dict"):
        yield f"no {name}", "PromptTuning", "read", drop(name)
    table = "prompt.prompt_embeddings"
    for what, change in {
        "NaN": with_one(float("nan")), "inf": with_one(float("inf")), "flat": lambda v: v.flatten(),
        "one row": lambda v: v[:1].clone(), "wider": lambda v: torch.cat([v, v], dim=-1),
    }.items():  # fmt: skip
        yield f"tensor {what}", "PromptTuning", "read", tensor(change)
    yield "NaN in a factor", "MPTSource", "source", tensor(with_one(float("nan")), "prompt.prefix_task_rows")
    yield "NaN in a perturbation", "CPT", "export", tensor(with_one(float("nan")), "prompt.delta_embedding")
    yield "tensor missing", "PromptTuning", "read", drop("state_dict", table)
    yield "tensor missing", "MPTSource", "export", drop("state_dict", "prompt.prefix_task_cols")
    yield "tensor too many", "PromptTuning", "load", put("state_dict", "prompt.more", value=torch.zeros(2))
    yield "foreign tensor", "PromptTuning", "load", put("state_dict", "backbone.more", value=torch.zeros(2))
    yield "NaN in the optimizer", "PromptTuning", "fit", nan_in_the_optimizer
    for name, value in {
        "loops": {}, "optimizer_states": [{}], "lr_schedulers": [5],
    }.items():  # fmt: skip
        yield f"{name} is {value!r}", "PromptTuning", "fit", put(name, value=value)
    for name in ("loops", "optimizer_states", "lr_schedulers"):
        yield f"no {name}", "PromptTuning", "fit", drop(name)
    yield "no optimizer groups", "CPT", "fit", put("optimizer_states", 0, "param_groups", value=[])
    yield "no fit loop", "MPTSource", "fit", drop("loops", "fit_loop")
    yield "no progress", "PromptTuning", "fit", drop("loops", "fit_loop", "epoch_progress", "current")
    yield "progress as text", "PromptTuning", "fit", put("loops", "fit_loop", "epoch_progress", value="half")
    for number, value in enumerate([[{}], [{"epoch": "x", "batches": 1, "rows": 4}], [5], [{"batches": -1}]]):
        where = ("loops", "fit_loop", "state_dict", "combined_loader")
        yield f"state of the loader {number}", "PromptTuning", "fit", put(*where, value=value)
    for name, value in {
        "backbone": 5, "tasks": "one", "prompt_length": "four", "optimizer": 3, "warmup_steps": "x", "unheard_of": 1,
        "prompt_init": ["text"], "lr": None,
    }.items():  # fmt: skip
        entry = ("load", "test")[len(name) % 2]
        yield f"{name}={value!r} in the arguments", "PromptTuning", entry, put("hyper_parameters", name, value=value)
    yield "an instantiator", "PromptTuning", "load", put("hyper_parameters", "_instantiator", value="os.system")
    for name, value in {"max_input_length": "x", "answer_prefix": 5}.items():
        change = put("datamodule_hyper_parameters", name, value=value)
        yield f"{name}={value!r} of the data", "PromptTuning", "predictor", change


CONTENT_CASES = [
    pytest.param(stage, entry, change, id=f"{name}-{stage}-{entry}") for name, stage, entry, change in content_damages()
]


@pytest.mark.parametrize(("stage", "entry", "change"), CONTENT_CASES)
def test_changed_content(
    stage: str, entry: str, change: Change, world: World, tmp_path: Path, outcome: Outcome
) -> None:
    content, path = world.plain(stage), tmp_path / "best.ckpt"
    change(content)
    torch.save(content, path)
    assert outcome(lambda: read_by(entry, path, stage, world)) is not None


@pytest.mark.parametrize("entry", ["read", *ENTRIES])
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "nested"])
def test_code_is_never_run(kind: str, entry: str, world: World, tmp_path: Path, outcome: Outcome) -> None:
    trap, path = Payload(tmp_path / "sprung"), tmp_path / "trap.ckpt"
    content: Any = world.plain("PromptTuning")
    if kind == "nested":
        content["state_dict"]["prompt.prompt_embeddings"] = trap
    else:
        content["trap"] = trap
    if kind == "pickle":
        path.write_bytes(pickle.dumps({KEY: {}, "state_dict": {}, "trap": trap}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    assert outcome(lambda: read_by(entry, path, "PromptTuning", world)) is not None
    assert not (tmp_path / "sprung").exists()
