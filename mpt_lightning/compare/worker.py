"""One run in a process that is reused: the recipe through the command line, and what it took."""

import ctypes
import gc
import logging
import os
import re
import shlex
import shutil
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import lightning.pytorch as L
import torch
import transformers
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from tqdm import tqdm

from mpt_lightning.errors import MPTError, find_error
from mpt_lightning.recipes import MPTCLI

ERROR = "mpt: error: "


def start() -> None:
    """Prepare a process: one thread, and the end when the process that started it ends."""
    # An interruption reaches all processes; the one that started this one decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # Its own lock is one between processes, which outlives a killed one, with a warning.
    tqdm.set_lock(threading.RLock())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@dataclass
class Outcome:
    """What a run gives back; see `Result` for the fields they have in common."""

    error: str | None = None
    commands: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    trained_parameters: int = 0
    checkpoint_bytes: int = 0
    steps: int = 0
    seconds_per_step: float | None = None
    peak_memory_bytes: int | None = None
    seconds: float = 0.0
    checkpoint: str | None = None


def work(words: Sequence[str], folder: Path, fit: bool = True, test: bool = True, keep: bool = False) -> Outcome:
    """Run `mpt fit` and `mpt test` with the best checkpoint.

    Args:
        words: their arguments.
        folder: for checkpoints, logs and all that is printed; emptied first.
        fit: train; without it nothing is loaded for the test.
        test: test.
        keep: keep the checkpoints.

    Returns:
        The outcome; a failure is one with an error.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outcome, before, begin = Outcome(), _memory_before(), time.perf_counter()
    with (folder / "log.txt").open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log), quiet():
        try:
            if fit:
                _fit(words, folder, outcome)
            if test:
                checkpoint = ["--ckpt_path", outcome.checkpoint] if outcome.checkpoint else []
                outcome.commands.append(shlex.join(["mpt", "test", *words, *checkpoint]))
                tested = RunCLI(["test", *words, *checkpoint], folder)
                outcome.metrics = {
                    name.removeprefix("test/"): float(value)
                    for name, value in tested.trainer.callback_metrics.items()
                    if name.startswith("test/")
                }
        except Exception as error:
            traceback.print_exc()
            cause = find_error(error)
            name = "" if cause is not None else f"{type(error).__name__}: "
            outcome.error = name + " ".join(str(cause or error).split())
    outcome.seconds = time.perf_counter() - begin
    outcome.peak_memory_bytes = _peak_memory(before)
    if not keep or outcome.error:
        outcome.checkpoint = None
        for file in folder.rglob("*.ckpt"):
            file.unlink()
    return outcome


def _fit(words: Sequence[str], folder: Path, outcome: Outcome) -> None:
    clock = Clock()
    outcome.commands.append(shlex.join(["mpt", "fit", *words]))
    cli = RunCLI(["fit", *words], folder, clock)
    outcome.steps = cli.trainer.global_step
    outcome.trained_parameters = sum(p.numel() for p in cli.model.parameters() if p.requires_grad)
    if outcome.steps and clock.seconds:
        outcome.seconds_per_step = median(clock.seconds) * len(clock.seconds) / outcome.steps
    saved = cli.trainer.checkpoint_callback
    best = saved.best_model_path if isinstance(saved, ModelCheckpoint) else ""
    if not best:
        raise MPTError("the run saved no best checkpoint; the recipe needs a ModelCheckpoint that monitors a metric.")
    outcome.checkpoint, outcome.checkpoint_bytes = best, Path(best).stat().st_size


def _last_error(path: Path, log: Any) -> str:
    log.flush()
    lines = path.read_text(encoding="utf-8").splitlines()
    errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    return errors[-1] if errors else f"the run ended early; see {path}"


class RunCLI(MPTCLI):
    """The command line as it is, with files in the run's own folder and nothing drawn on the terminal.

    Args:
        words: the command and its arguments.
        folder: for checkpoints and logs.
        clock: times the training steps.
    """

    def __init__(self, words: Sequence[str], folder: Path, clock: L.Callback | None = None) -> None:
        self.folder = folder
        # Hundreds of files that say what the results' commands say would take a tenth of a short run.
        callbacks = [] if clock is None else [clock]
        super().__init__(words, save_config_callback=None, trainer_defaults={"callbacks": callbacks})

    def before_instantiate_classes(self) -> None:
        """Put the run's files into its folder."""
        options = self.config[self.config.subcommand].trainer
        folder = str(self.folder)
        options.default_root_dir = folder
        options.enable_progress_bar = options.enable_model_summary = False
        options.logger = Namespace(
            class_path="lightning.pytorch.loggers.CSVLogger",
            init_args=Namespace(
                save_dir=folder, name="", version="", prefix="", flush_logs_every_n_steps=100
            ),
        )  # fmt: skip
        callbacks = options.callbacks if isinstance(options.callbacks, list) else [options.callbacks]
        for callback in callbacks:
            if callback is not None and "dirpath" in (callback.get("init_args") or {}):
                callback.init_args.dirpath = folder


class Clock(L.Callback):
    """Times the training batches."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start."""
        _synchronize()
        self._begin = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop."""
        _synchronize()
        self.seconds.append(time.perf_counter() - self._begin)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _memory_before() -> int | None:
    """Give the process's memory in bytes, and let its peak be counted from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    gc.collect()
    with suppress(OSError, AttributeError):
        # What an earlier run has freed would hide what this one takes.
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


def _resident(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) * 1024 if found else 0


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what dozens of short runs would print; the progress bar tells how far they are."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers.utils.logging.enable_progress_bar()
        datasets.enable_progress_bars()  # type: ignore[attr-defined]
