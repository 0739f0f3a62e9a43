"""What two ranks send each other: the gradients of what is trained, the loss with its label tokens, and two numbers."""

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from peft import LoraConfig
from processes import launch
from stages import T5, data, make, trainer
from torch.profiler import ProfilerActivity, profile

from mpt_lightning import PEFTModule, PromptTuning
from mpt_lightning.modules import PromptModule

pytestmark = pytest.mark.slow

# Each stage with the terms of its loss.
STAGES = {"prompt_tuning": 1, "source": 4, "cpt": 3, "lora": 1, "superposition": 1}
SIZES = {"float": 4, "long int": 8, "int": 4, "unsigned char": 1}


class Traffic(L.Callback):
    """Records each tensor that gloo receives: before the first step, and in one full step (the fourth)."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[str, str, int]]] = {}

    def _start(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.profile.start()

    def _stop(self, name: str) -> None:
        self.profile.stop()
        self.found[name] = [
            (event.name.removeprefix("gloo:"), kind, SIZES[kind] * torch.Size(shape).numel())
            for event in self.profile.events()
            if event.name.startswith("gloo:")
            for kind, shape in zip(event.input_dtypes, event.input_shapes, strict=True)
        ]

    def setup(self, *_: Any, **__: Any) -> None:
        self._start()

    def on_train_start(self, *_: Any) -> None:
        self._stop("start")

    def on_train_batch_end(self, *arguments: Any) -> None:
        batch = arguments[-1]
        if batch == 2:
            self._start()
        if batch == 3:
            self._stop("step")


def build(stage: str, folder: Path) -> PromptModule:
    """Build the module of a stage or of another method."""
    if stage == "lora":
        return PEFTModule(T5, LoraConfig(r=2))
    if stage == "superposition":
        return PromptTuning(T5, prompt_length=4, reparameterization="superposition")
    return make(stage, folder)


def record(folder: str) -> None:
    """Train four steps of each stage, with different random numbers on each rank."""
    for stage in STAGES:
        L.seed_everything(int(os.environ["RANK"]))
        traffic = Traffic()
        saving = {"enable_checkpointing": False} if stage != "prompt_tuning" else {"default_root_dir": folder}
        run = trainer(2, max_steps=4, limit_val_batches=0, callbacks=[traffic], **saving)
        module = build(stage, Path(folder))
        run.fit(module, datamodule=data(stage, 2, Path(folder)))
        if stage == "prompt_tuning":
            run.save_checkpoint(Path(folder, "prompt_tuning.ckpt"))
        tensors = dict(module.prompt.named_parameters()) | dict(module.prompt.named_buffers())
        found = {"config": module.prompt.config(), "tensors": {name: t.detach() for name, t in tensors.items()}}
        torch.save(found, Path(folder, f"{stage}.{run.global_rank}"))
        if run.is_global_zero:
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
            Path(folder, f"{stage}.json").write_text(json.dumps({"trained": trained, **traffic.found}))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traffic")
    launch(record, str(folder))
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_sends_the_gradients_of_what_is_trained(stage: str, recorded: Path) -> None:
    found = json.loads((recorded / f"{stage}.json").read_text())
    floats = [size for kind, dtype, size in found["step"] if (kind, dtype) == ("all_reduce", "float")]
    # First the number of label tokens and the sums of the loss's terms, which the gradients' weights need.
    assert floats[0] == 4 * (1 + STAGES[stage])
    assert sum(floats[1:]) == 4 * found["trained"]
    # Whether the system ends the run: Lightning tells what rank 0 knows, SaveOnTermination asks all.
    rest = [entry for entry in found["step"] if entry[:2] != ["all_reduce", "float"]]
    assert sorted(rest) == [["all_reduce", "long int", 8], ["broadcast", "long int", 8]]


@pytest.mark.parametrize("stage", STAGES)
def test_the_start_sends_what_is_trained(stage: str, recorded: Path) -> None:
    found = json.loads((recorded / f"{stage}.json").read_text())
    sent = [size for kind, dtype, size in found["start"] if (kind, dtype) == ("broadcast", "float")]
    assert sum(sent) == 4 * found["trained"]
    # The rest is a state of the random numbers, and the shapes that DDP compares.
    assert sum(size for _, dtype, size in found["start"] if dtype != "float") < 8192


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_have_the_same_prompt_in_all_its_parts(stage: str, recorded: Path) -> None:
    one, two = (torch.load(recorded / f"{stage}.{rank}") for rank in (0, 1))
    assert one["config"] == two["config"]  # the tokens that it was made of, too
    assert one["tensors"].keys() == two["tensors"].keys()
    for name, value in one["tensors"].items():
        assert torch.equal(two["tensors"][name], value), name
