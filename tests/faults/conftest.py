"""A small run of each kind through the command line, and a fixture that returns a call's clear error."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mpt_lightning.checkpoint import read_checkpoint
from mpt_lightning.cli.main import main
from mpt_lightning.errors import MPTError
from mpt_lightning.modules import CPT, MPTSource, PromptTuning

STAGES = {"PromptTuning": PromptTuning, "MPTSource": MPTSource, "CPT": CPT}
CARD = {
    "name": "film", "path": "someone/film", "input": "sentence : {text}", "metrics": ["accuracy"],
    "choices": ["negative", "positive"],
}  # fmt: skip
ROWS = [
    {"text": f"a {word} film", "label": number % 2} for number, word in enumerate("bad good boring fun".split() * 2)
]
TRAINER = {
    "accelerator": "cpu", "max_steps": 2, "max_epochs": -1, "logger": False, "enable_progress_bar": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1, "val_check_interval": 1,
    "check_val_every_n_epoch": None,
}  # fmt: skip


@dataclass
class World:
    """Finished runs, with their recipes."""

    folder: Path
    recipes: dict[str, Path]
    checkpoints: dict[str, Path]
    backbones: dict[str, str]

    @property
    def data_root(self) -> str:
        return str(self.folder / "data")

    def plain(self, stage: str) -> dict[str, Any]:
        """Return a new copy of a checkpoint's content."""
        return torch.load(self.checkpoints[stage], weights_only=True)


@pytest.fixture(scope="package")
def world(model_folder: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> World:
    """Train each stage for two steps."""
    folder = tmp_path_factory.mktemp("world")
    data = folder / "data" / "film"
    data.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    cards = []
    for name in ("one", "two"):
        cards.append(str(folder / f"{name}.yaml"))
        content = {
            "class_path": "mpt_lightning.data.TaskDataModule", "init_args": {"card": CARD | {"name": name}}
        }  # fmt: skip
        Path(cards[-1]).write_text(yaml.safe_dump(content))
    made = World(folder, {}, {}, {kind: model_folder(kind) for kind in ("t5", "llama")})
    for stage in STAGES:
        kind = "llama" if stage == "CPT" else "t5"
        options = {"data_root": made.data_root, "cache_dir": str(folder / "cache"), "batch_size": 4}
        options["max_input_length"] = 16
        model = {"backbone": made.backbones[kind]}
        if stage == "CPT":
            options |= {"card": cards[0], "context_shots": 2, "context_per": "task", "separator": "."}
        else:
            options["tasks"] = cards
            model |= {"prompt_length": 4}
        if stage == "MPTSource":
            model["teachers"] = str(made.checkpoints["PromptTuning"])
        saver = {"dirpath": str(folder / stage), "filename": "best", "monitor": "val/average", "mode": "max"}
        recipe = {
            "trainer": TRAINER
            | {"default_root_dir": str(folder / stage)}
            | {"callbacks": [{"class_path": "ModelCheckpoint", "init_args": saver}]},
            "model": {"class_path": stage, "init_args": model},
            "data": {"class_path": "TaskDataModule" if stage == "CPT" else "MultitaskDataModule", "init_args": options},
        }
        made.recipes[stage] = folder / f"{stage}.yaml"
        made.recipes[stage].write_text(yaml.safe_dump(recipe))
        main(["fit", "--config", str(made.recipes[stage])])
        made.checkpoints[stage] = folder / stage / "best.ckpt"
        read_checkpoint(str(made.checkpoints[stage]))
    return made


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a temporary working directory, and a command line without arguments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mpt"])


class Payload:
    """A payload: unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (str(self.path), "w"))


Outcome = Callable[[Callable[[], object]], str | None]


@pytest.fixture
def outcome(capsys: pytest.CaptureFixture[str]) -> Outcome:
    """Return a function that returns a call's clear error, or None if there is none; other errors fail the test."""

    def run(call: Callable[[], object]) -> str | None:
        capsys.readouterr()
        try:
            call()
        except SystemExit as leaving:
            lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mpt: error: ")]
            if leaving.code != 2 or len(lines) != 1:
                raise
            message = lines[0]
        except MPTError as error:
            message = str(error)
        else:
            return None
        assert 20 < len(message) < 3000
        assert "Traceback" not in message
        return message

    return run
