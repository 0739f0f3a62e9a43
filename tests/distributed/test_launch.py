"""Runs over two machines, by torchrun and by SLURM, with the scripts of docs/ as they are."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from machines import Machine, family, free_port, kill, two_machines
from processes import launch

from mpt_lightning.cli import main as command_line
from mpt_lightning.cli.main import main

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs"
ROWS, BATCH, EPOCHS = 64, 8, 4
STEPS = EPOCHS * ROWS // BATCH
SECONDS = 120
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
VARIABLES = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "OMP_NUM_THREADS": "1",
}


def recipe(folder: Path, batch_size: int = BATCH // 2) -> str:
    """Write a recipe whose runs write all their files to the folder, and return its path."""
    # In double precision the order in which ranks' gradients are added does not show.
    callbacks = {
        "lightning.pytorch.callbacks.ModelCheckpoint": {
            "dirpath": str(folder), "filename": "best", "monitor": "val/average", "mode": "max",
            "enable_version_counter": False,
        },
        "mpt_lightning.callbacks.LastCheckpoint": {"dirpath": str(folder)},
        "recorder.Recorder": {"folder": str(folder)},
    }  # fmt: skip
    content = {
        "model": {
            "class_path": "mpt_lightning.PromptTuning",
            "init_args": {"backbone": "mpt_lightning/demo/t5", "prompt_length": 4, "lr": 0.3, "warmup_steps": 2},
        },
        "data": {
            "class_path": "mpt_lightning.TaskDataModule",
            "init_args": {
                "card": "demo/voice", "max_train_rows": ROWS, "max_eval_rows": 9, "batch_size": batch_size,
                "cache_dir": str(folder.parent / "cache"),
            },
        },
        "trainer": {
            "precision": "64-true", "max_epochs": EPOCHS, "val_check_interval": 6, "check_val_every_n_epoch": None,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "logs"}},
            "enable_progress_bar": False, "enable_model_summary": False,
            "default_root_dir": str(folder),
            "callbacks": [{"class_path": name, "init_args": options} for name, options in callbacks.items()],
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


def recorded(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """Return the steps that the recorder wrote."""
    file = folder / f"steps.rank{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def weights(checkpoint: Path) -> torch.Tensor:
    (value,) = torch.load(checkpoint, weights_only=True)["state_dict"].values()
    assert value.dtype == torch.float64
    return value


def wait_for(condition: Callable[[], bool], *processes: subprocess.Popen[bytes]) -> None:
    """Wait until the condition holds, while the processes run."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)


def end(*processes: subprocess.Popen[bytes]) -> list[int]:
    """Wait until the processes end, and return their exit codes."""
    return [process.wait(SECONDS) for process in processes]


class Torchrun:
    """docs/torchrun.sh on two machines; the second one is HEAD, and the first one has rank 0 because of its address."""

    def __init__(self, machines: list[Machine], folder: Path) -> None:
        self.machines, self.folder, self.port = machines, folder, free_port()
        self.recipe = recipe(folder)

    def start(self, number: int) -> subprocess.Popen[bytes]:
        machine = self.machines[number]
        settings = {
            "HEAD": self.machines[1].address, "PORT": str(self.port), "NODES": "2", "GPUS": "1",
            "PET_LOCAL_ADDR": machine.address, "PET_RDZV_CONF": f"is_host={number},keep_alive_interval=1",
        }  # fmt: skip
        command = ["bash", str(DOCS / "torchrun.sh"), self.recipe, "--trainer.accelerator", "cpu"]
        return machine.start(command, self.log(number), VARIABLES | settings)

    def log(self, number: int) -> Path:
        return self.folder / f"machine{number}.log"


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Machine]]:
    with two_machines() as pair:
        yield pair


def fit(folder: str) -> None:
    main(["fit", "--config", recipe(Path(folder)), "--config", "trainer/cpu", *TWO])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an undisturbed run of two processes."""
    folder = tmp_path_factory.mktemp("launch") / "whole"
    launch(fit, str(folder))
    return folder


def test_two_processes_train_as_one(whole: Path) -> None:
    alone = whole.parent / "alone"
    main(["fit", "--config", recipe(alone, BATCH), "--config", "trainer/cpu"])
    one, first, second = recorded(alone), recorded(whole), recorded(whole, 1)
    assert [line["step"] for line in one] == [*range(1, STEPS + 1)]
    for line, *parts in zip(one, first, second, strict=True):
        assert sorted(line["rows"]) == sorted(parts[0]["rows"] + parts[1]["rows"])
        assert abs(line["loss"] - (parts[0]["loss"] + parts[1]["loss"]) / 2) < 1e-10
    for start in range(0, STEPS, ROWS // BATCH):
        epoch = one[start : start + ROWS // BATCH]
        assert len({row for line in epoch for row in line["rows"]}) == ROWS
    torch.testing.assert_close(weights(whole / "last.ckpt"), weights(alone / "last.ckpt"), rtol=0, atol=1e-10)


def test_a_machine_is_lost_and_comes_back(whole: Path, machines: list[Machine]) -> None:
    run = Torchrun(machines, whole.parent / "lost")
    lost, other = run.start(0), run.start(1)
    wait_for(lambda: len(recorded(run.folder)) >= 15, lost, other)
    kill(lost)
    assert len(recorded(run.folder, 1)) < STEPS
    assert end(other, run.start(0)) == [0, 0], run.log(1).read_text()[-3000:]
    # The checkpoint was that of step 12, or of a later validation.
    steps = [line["step"] for line in recorded(run.folder)]
    again = next(place for place, step in enumerate(steps) if place and step != steps[place - 1] + 1)
    assert steps[:again] == [*range(1, again + 1)]
    assert steps[again:] == [*range(steps[again], STEPS + 1)]
    assert 12 <= steps[again] - 1 <= again
    assert torch.equal(weights(run.folder / "last.ckpt"), weights(whole / "last.ckpt"))
    # The first rank writes alone, and reports once, at the first start, that there was no checkpoint.
    log = run.log(0).read_text() + run.log(1).read_text()
    assert log.count("there is no last checkpoint available") == 1
    assert {file.name for file in run.folder.iterdir()} == {
        "best.ckpt", "last.ckpt", "logs", "recipe.yaml", "machine0.log", "machine1.log",
        "steps.rank0.jsonl", "steps.rank1.jsonl",
    }  # fmt: skip
    assert sorted({file.name for file in (run.folder / "logs").rglob("*")}) == [
        "config.yaml", "hparams.yaml", "metrics.csv", "version_0", "version_1"
    ]  # fmt: skip


# The tasks are forked, so that they share one import.
SRUN = f"""#!{sys.executable}
import os, signal, sys, time
import mpt_lightning.cli.trainer, transformers.models.t5.modeling_t5
from lightning.fabric.utilities.rank_zero import rank_zero_only
from mpt_lightning.cli.main import main
tasks = {{}}
for task in range(int(os.environ["SLURM_NTASKS"])):
    if not (pid := os.fork()):
        os.environ.update(SLURM_PROCID=str(task), SLURM_NODEID=str(task), SLURM_LOCALID="0")
        rank_zero_only.rank, sys.argv = task, sys.argv[sys.argv.index("mpt"):]
        sys.exit(main())
    tasks[pid] = None
signal.signal(signal.SIGUSR1, lambda number, _: [os.kill(task, number) for task in tasks])
while None in tasks.values():
    pid, status = os.wait()
    tasks[pid] = os.waitstatus_to_exitcode(status)
    if tasks[pid]:
        [os.kill(task, signal.SIGTERM) for task, code in tasks.items() if code is None]
sys.exit(max(tasks.values(), key=abs))
"""


class Slurm:
    """docs/slurm.sbatch with stand-ins for srun and scontrol, which simulate two machines with one task each."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine, self.folder, self.recipe, self.job = (
            machine,
            folder,
            recipe(folder),
            str(free_port(16000, 24999) - 15000),
        )
        bin = folder / "bin"
        bin.mkdir()
        for name, content in {"srun": SRUN, "scontrol": f'#!/bin/sh\nsleep 0.3; echo "$@" >> {folder}/calls\n'}.items():
            (bin / name).write_text(content)
            (bin / name).chmod(0o755)
        self.settings = VARIABLES | {
            "PATH": f"{bin}{os.pathsep}{VARIABLES['PATH']}", "SLURM_JOB_ID": self.job, "SLURM_JOB_NAME": "mpt",
            "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": machine.address,
        }  # fmt: skip

    def start(self) -> subprocess.Popen[bytes]:
        command = ["bash", str(DOCS / "slurm.sbatch"), self.recipe, "--trainer.accelerator", "cpu"]
        return self.machine.start(command, self.folder / "log", self.settings)


def test_a_requeued_slurm_job_continues_exactly(whole: Path, machines: list[Machine]) -> None:
    run = Slurm(machines[0], whole.parent / "slurm")
    job = run.start()
    wait_for(lambda: len(recorded(run.folder)) >= 15, job)
    os.kill(family(job.pid)[1], signal.SIGUSR1)  # to srun's tasks, as `#SBATCH --signal` does
    assert end(job) == [128 + signal.SIGTERM]
    assert (run.folder / "calls").read_text() == f"requeue {run.job}\n"
    done = len(recorded(run.folder))
    assert 15 <= done < STEPS
    for name in ("hpc_ckpt_1.ckpt", "last-terminated.ckpt"):
        assert torch.load(run.folder / name, weights_only=True)["global_step"] == done
    assert end(run.start()) == [0], (run.folder / "log").read_text()[-3000:]
    for rank in (0, 1):
        assert [line["step"] for line in recorded(run.folder, rank)] == [*range(1, STEPS + 1)]
    assert torch.equal(weights(run.folder / "last.ckpt"), weights(whole / "last.ckpt"))
    assert (run.folder / "log").read_text().count("Restored all states") == 1


def resume(folder: str) -> None:
    """Resume on two machines that do not share their checkpoints, where only the first one has a checkpoint."""
    command_line.PATIENCE = 0
    words = ["fit", "--config", recipe(Path(folder, os.environ["RANK"])), "--config", "trainer/cpu", *TWO]
    printed = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stderr(printed):
        main([*words, "--ckpt_path", "last"])
    assert f"Rank 0 starts from step {STEPS}, and rank 1 from the beginning" in printed.getvalue()


def test_machines_that_see_different_checkpoints_stop(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    shutil.copy(whole / "last.ckpt", tmp_path / "0")
    launch(resume, str(tmp_path))
