"""One run through the command line, with its costs."""

import ctypes
import gc
import math
import re
import shlex
import shutil
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint

from mpt_lightning.compare.environment import describe
from mpt_lightning.compare.results import Outcome
from mpt_lightning.compare.runs import option_words
from mpt_lightning.compare.search import Values, best_trial, comparable
from mpt_lightning.errors import MPTError, find_error
from mpt_lightning.modules.batch import Batch
from mpt_lightning.objectives import IGNORE
from mpt_lightning.recipes import MPTCLI


def work(
    words: Sequence[str], folder: Path, trials: Sequence[Values], *, fit: bool, test: bool, select: str, keep: bool
) -> Outcome:
    """Run `mpt fit` for each trial, and `mpt test` with the best one's checkpoint; return errors as well.

    Args:
        words: Arguments of both commands.
        folder: Of the run's files; it is emptied.
        trials: Further arguments of each trial.
        fit: Whether anything is trained.
        test: Whether to test.
        select: The checkpoint of a trial that counts, "best" or "last".
        keep: Whether to keep the checkpoint.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outcome, before, begin = Outcome(), _reset_peak_memory(), time.perf_counter()
    with (folder / "log.txt").open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            if fit:
                outcome = _search(words, folder, trials, select)
            if test:
                arguments, checkpoint = [*words, *option_words(outcome.chosen)], outcome.checkpoint
                selected = ["--ckpt_path", checkpoint] if checkpoint else []
                cli = RunCLI(["test", *arguments, *selected], folder / "test")
                if checkpoint:
                    selected[1] = str(Path(cli.recipe_folder or folder) / Path(checkpoint).name)
                outcome.commands.append(shlex.join(["mpt", "test", *arguments, *selected]))
                metrics = cli.trainer.callback_metrics
                outcome.metrics = {name.removeprefix("test/"): float(value) for name, value in metrics.items()}
                outcome.environment = describe(cli.model)
        except Exception as error:
            outcome.error = _report(error)
    outcome.seconds = round(time.perf_counter() - begin, 2)
    outcome.peak_memory_bytes = _peak_memory(before)
    if not keep or outcome.error:
        outcome.checkpoint = None
        _remove_checkpoints(folder)
    return outcome


def _search(words: Sequence[str], folder: Path, trials: Sequence[Values], select: str) -> Outcome:
    """Return the outcome of the best trial, with the scores of all; only its checkpoint is left.

    A trial that fails, such as one with a learning rate at which training diverges, is recorded and never the best.
    """
    outcomes, errors = [], []
    for number, values in enumerate(trials):
        place = folder / str(number) if len(trials) > 1 else folder
        try:
            outcome = _fit([*words, *option_words(values)], place, select)
        except Exception as error:
            errors.append(error)
            outcome = Outcome(trials=[{"score": math.nan, "loss": math.nan, "error": _report(error)}])
        outcome.trials[0]["values"] = values
        outcomes.append(outcome)
    if len(errors) == len(trials):
        raise errors[0]
    records = [record for outcome in outcomes for record in outcome.trials]
    best = best_trial([records])
    for number in set(range(len(trials))) - {best}:
        _remove_checkpoints(folder / str(number))
    outcome = outcomes[best]
    outcome.trials, outcome.chosen = records, trials[best]
    return outcome


def _report(error: Exception) -> str:
    """Print where an error that is being handled was raised, and return its message in one line."""
    traceback.print_exc()
    return " ".join(str(find_error(error) or f"{type(error).__name__}: {error}").split())


def _remove_checkpoints(folder: Path) -> None:
    for file in folder.rglob("*.ckpt"):
        file.unlink()


def _fit(words: Sequence[str], folder: Path, select: str) -> Outcome:
    recorder = Recorder()
    cli = RunCLI(["fit", *words], folder, recorder)
    trainer, saved = cli.trainer, cli.trainer.checkpoint_callback
    if not isinstance(saved, ModelCheckpoint) or saved.best_model_score is None or saved.mode != "max":
        raise MPTError(
            "The run has no best checkpoint; the recipe needs a ModelCheckpoint that monitors a metric with mode: max."
        )
    monitor = str(saved.monitor)
    if select == "best":
        checkpoint = Path(saved.best_model_path)
        # The first of equal ones, as in Lightning.
        step = max(recorder.metrics, key=lambda step: comparable(recorder.metrics[step][monitor]))
    else:
        checkpoint, step = folder / "last.ckpt", trainer.global_step
        trainer.save_checkpoint(checkpoint)
        if step not in recorder.metrics:
            trainer.validate(cli.model, cli.datamodule, verbose=False)
    found = recorder.metrics[step]
    steps = trainer.global_step
    return Outcome(
        commands=[shlex.join(["mpt", "fit", *words])],
        trials=[{"score": found[monitor], "loss": found.get("val/loss", math.nan)}],
        steps=steps,
        seconds_per_step=median(recorder.seconds) * len(recorder.seconds) / steps if recorder.seconds else None,
        trained_parameters=sum(p.numel() for p in cli.model.parameters() if p.requires_grad),
        checkpoint=str(checkpoint),
        checkpoint_bytes=checkpoint.stat().st_size,
        train_rows=recorder.rows,
        train_tokens=recorder.tokens,
        train_loss=recorder.loss,
        train_seconds=round(sum(recorder.seconds), 2),
        environment=describe(cli.model),
    )


class RunCLI(MPTCLI):
    """The command line with all files in the run's own folder, and without progress bars.

    Attributes:
        recipe_folder: Where the recipe saves its checkpoints; None if it does not name a folder.
    """

    def __init__(self, words: Sequence[str], folder: Path, *callbacks: L.Callback) -> None:
        self.folder = folder
        self.recipe_folder: str | None = None
        # The configuration is not saved: the results contain the commands, and a file per run would take time.
        super().__init__(words, save_config_callback=None, trainer_defaults={"callbacks": list(callbacks)})

    def before_instantiate_classes(self) -> None:
        """Redirect the run's files to its folder."""
        options = self.config[self.config.subcommand].trainer
        folder = str(self.folder)
        options.default_root_dir = folder
        options.enable_progress_bar = options.enable_model_summary = False
        logger = Namespace(save_dir=folder, name="", version="")
        options.logger = Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=logger)
        callbacks = options.callbacks if isinstance(options.callbacks, list) else [options.callbacks]
        for callback in callbacks:
            if callback is not None and "dirpath" in (callback.get("init_args") or {}):
                self.recipe_folder = self.recipe_folder or callback.init_args.dirpath
                callback.init_args.dirpath = folder


class Recorder(L.Callback):
    """Times and counts the training batches, and records the metrics of each validation.

    Attributes:
        seconds: Of each batch.
        rows: Number of rows in the batches.
        tokens: Number of their tokens, of inputs and answers.
        loss: Of the last training step; None without one.
        metrics: By the step of the validation, the metrics by name.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.rows = self.tokens = 0
        self.loss: float | None = None
        self.metrics: dict[int, dict[str, float]] = {}
        self._begin = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the timer."""
        _synchronize()
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Record the batch's time and size."""
        _synchronize()
        self.seconds.append(time.perf_counter() - self._begin)
        self.rows += len(batch["labels"])
        self.tokens += int(batch["attention_mask"].sum() + (batch["labels"] != IGNORE).sum())

    def on_train_end(self, trainer: L.Trainer, _: L.LightningModule) -> None:
        """Record the loss."""
        self.loss = float(trainer.callback_metrics.get("train/loss", math.nan))

    def on_validation_end(self, trainer: L.Trainer, _: L.LightningModule) -> None:
        """Record the metrics, unless they are those of Lightning's check before training."""
        if trainer.sanity_checking:
            return
        self.metrics[trainer.global_step] = {name: float(value) for name, value in trainer.callback_metrics.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak_memory() -> int | None:
    """Reset the peak and return the process's memory in bytes, or None if the system does not report it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    gc.collect()
    with suppress(OSError, AttributeError):
        # Memory that earlier runs have freed would hide what this one takes.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except OSError:
        return None


def _peak_memory(before: int | None) -> int | None:
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return peak
    return None if before is None else _resident("VmHWM") - before


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) * 1024 if found else 0
