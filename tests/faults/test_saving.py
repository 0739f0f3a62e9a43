"""Files of runs that end early, by SIGTERM, a full disk or a non-finite loss."""

import errno
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mpt_lightning import MultitaskDataModule, PromptTuning
from mpt_lightning.callbacks import LastCheckpoint
from mpt_lightning.checkpoint import read_checkpoint
from mpt_lightning.checkpoint.io import CheckedCheckpointIO
from mpt_lightning.cli.main import main
from mpt_lightning.cli.trainer import run

T5 = "mpt_lightning/demo/t5"
TASKS = ["demo/voice", "demo/advice"]


class ActOnce(L.Callback):
    """Calls a function once, in one hook of one step."""

    def __init__(self, hook: str, step: int, action: Callable[[L.LightningModule], None]) -> None:
        self.step, self.action, self.done = step, action, False
        setattr(self, hook, self.act)

    def act(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step and not self.done:
            self.done = True
            self.action(module)


class Steps(L.Callback):
    """Records each step's rows, and each validation's step and score."""

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}
        self.scores: dict[int, float] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: dict[str, Any], index: int) -> None:
        self.rows[trainer.global_step] = batch["row_ids"]

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        self.scores[trainer.global_step] = float(trainer.callback_metrics["val/loss"])


def train(
    folder: Path, *callbacks: L.Callback, ckpt_path: Any = None, max_steps: int = 8, monitor: str = "val/average",
    **options: Any,
) -> tuple[PromptTuning, Steps]:  # fmt: skip
    L.seed_everything(0, verbose=False)
    data = MultitaskDataModule(TASKS, max_train_rows=16, batch_size=8, max_eval_rows=12, eval_batch_size=4)
    best = ModelCheckpoint(folder, "best", monitor=monitor, mode="max")
    steps, module = Steps(), PromptTuning(T5, prompt_length=4, lr=0.3)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=max_steps, val_check_interval=2, check_val_every_n_epoch=None, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[best, LastCheckpoint(str(folder)), steps, *callbacks], **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, steps


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., tuple[PromptTuning, Steps]]:
    return partial(train, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[PromptTuning, Steps]:
    return train(tmp_path_factory.mktemp("uninterrupted"))


def terminate(_: L.LightningModule) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("hook", "step", "left_after"),
    [
        ("on_train_batch_start", 2, 3),  # in the middle of an epoch, no validation due
        ("on_train_batch_start", 3, 4),  # a validation is due, and the epoch ends
        ("on_validation_start", 4, 5),  # during a validation: the run ends after the next step
        ("on_train_epoch_end", 4, 5),
        ("on_before_zero_grad", 5, 6),
    ],
)
def test_sigterm_saves_and_the_run_resumes_exactly(
    hook: str, step: int, left_after: int, fit: Any, uninterrupted: tuple[PromptTuning, Steps], tmp_path: Path
) -> None:
    whole, all_steps = uninterrupted
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        fit(ActOnce(hook, step, terminate))
    assert signal.getsignal(signal.SIGTERM) == before
    saved = tmp_path / "last-terminated.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == left_after
    resumed, steps = fit(ckpt_path="last")
    assert steps.rows == {number: rows for number, rows in all_steps.rows.items() if number >= left_after}
    assert steps.scores == {number: score for number, score in all_steps.scores.items() if number > left_after}
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_command_exits_with_the_status_of_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L.Trainer, "fit", _raise(SIGTERMException()))
    words = ["fit", "--model", "PromptTuning", "--model.backbone", T5, "--data", "TaskDataModule"]
    with pytest.raises(SystemExit) as left:
        run([*words, "--data.card", "demo/voice", "--trainer.default_root_dir", str(tmp_path)])
    assert left.value.code == 143


def _raise(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let every write beyond `size` bytes of a file fail, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def content(step: int = 0) -> dict[str, Any]:
    return {"state_dict": {"prompt": torch.full((64, 64), float(step))}, "global_step": step}


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    disk, file = CheckedCheckpointIO(), tmp_path / "last.ckpt"
    disk.save_checkpoint(content(1), file)
    with (
        files_of_at_most(4096),
        pytest.raises(ValueError, match=r"last\.ckpt \(.* bytes\) cannot be written: File"),
    ):
        disk.save_checkpoint(content(2), file)
    assert disk.load_checkpoint(file)["global_step"] == 1
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_keeps_the_last_checkpoint(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, file = CheckedCheckpointIO(), tmp_path / "last.ckpt"
    disk.save_checkpoint(content(1), file)
    monkeypatch.setattr(os, call, _raise(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(ValueError, match=r"written: No space left on device; earlier ones are whole"):
        disk.save_checkpoint(content(2), file)
    assert disk.load_checkpoint(file)["global_step"] == 1
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_full_disk_ends_the_run_with_one_message(fit: Any, tmp_path: Path) -> None:
    def fill(_: L.LightningModule) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(ValueError, match=r"cannot be written: File too large.*resume with --ckpt_path last"):
            fit(ActOnce("on_train_batch_start", 5, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    _, steps = fit(ckpt_path="last")
    assert list(steps.rows) == [4, 5, 6, 7]


def test_an_unwritable_folder_gets_one_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()  # the recipe's folders are in runs/
    with pytest.raises(SystemExit) as left:
        main(["fit", "--config", "baselines/prompt_tuning", "--trainer.max_steps", "1"])
    assert left.value.code == 2
    assert re.search(r"^mpt: error: \S*runs\S*: Not a directory. Check the path", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_loss_names_the_rows(value: float, fit: Any, tmp_path: Path) -> None:
    class Spoil(L.Callback):
        """Gives the third row of the fifth step's batch a non-finite loss."""

        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: dict[str, Any], index: int) -> None:
            if trainer.global_step == 5:
                self.task, self.row = module.tasks[batch["task_ids"][2]], batch["row_ids"][2]
                own = batch["input_ids"][2].tolist()
                handle = module.backbone.model.lm_head.register_forward_hook
                handle(lambda _, given, logits: logits.index_fill(0, torch.tensor([2]), value) if own else None)

    spoil = Spoil()
    with pytest.raises(ValueError, match=r"The loss is not finite at step 5, batch \d") as error:
        fit(spoil)
    assert f"Rows: {spoil.task} {spoil.row}." in str(error.value)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_non_finite_prompt_is_not_saved(fit: Any, tmp_path: Path) -> None:
    def spoil(module: L.LightningModule) -> None:
        with torch.no_grad():
            next(module.prompt.parameters())[0, 0, 0] = torch.inf

    with pytest.raises(ValueError, match=r"prompt\.\S+ has values that are not finite at step 6"):
        fit(ActOnce("on_validation_end", 6, spoil))
    assert read_checkpoint(str(tmp_path / "last.ckpt")).tasks == TASKS
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_custom_checkpoint_io_is_kept(fit: Any) -> None:
    class CustomIO(TorchCheckpointIO):
        pass

    class RecordIO(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
            self.found = type(trainer.strategy.checkpoint_io)

    ours, theirs = RecordIO(), RecordIO()
    fit(ours)
    fit(theirs, plugins=[CustomIO()])
    assert (ours.found, theirs.found) == (CheckedCheckpointIO, CustomIO)


@pytest.mark.parametrize("steps", [7, 8])
def test_the_last_checkpoint_is_of_the_last_step(steps: int, fit: Any, tmp_path: Path) -> None:
    class Worse(L.Callback):
        """Gives each validation a worse score than the one before."""

        def on_validation_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
            module.log("val/worse", -float(trainer.global_step))

    _, seen = fit(Worse(), max_steps=steps, monitor="val/worse")
    saved = {name: torch.load(tmp_path / name, weights_only=True) for name in ("best.ckpt", "last.ckpt")}
    assert [saved[name]["global_step"] for name in saved] == [2, steps]
    assert sorted(seen.scores) == [2, 4, 6, 8][: steps // 2]
