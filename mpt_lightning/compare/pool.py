"""Silent worker processes of one thread each, for runs that are too small to use several cores."""

import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, ParamSpec, TypeVar

import datasets
import lightning.pytorch  # noqa: F401  # before rich, whose `float | int` makes jsonargparse read Lightning's 1 as 1.0
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tqdm import tqdm

P = ParamSpec("P")
T = TypeVar("T")


class WorkerPool:
    """Processes that call functions; they end with the process that started them, and at once if it is interrupted."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._executor = self._start()

    def _start(self) -> Executor:
        return ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"), initializer=_initialize)

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call a function in one of the processes; if one of them has died, in a new pool."""
        try:
            return self._executor.submit(function, *args, **kwargs)
        except BrokenProcessPool:
            self._executor = self._start()
            return self._executor.submit(function, *args, **kwargs)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error is not None:
            for process in multiprocessing.active_children():
                process.kill()
        self._executor.shutdown(wait=True, cancel_futures=True)


def _initialize() -> None:
    # Ctrl-C reaches all processes; the parent decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # tqdm's own lock is shared by processes, and a killed process would leave it behind with a warning.
    tqdm.set_lock(threading.RLock())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Dozens of short runs would repeat the libraries' messages.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()  # type: ignore[attr-defined]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def progress_bar(console: Console) -> Progress:
    """Return a progress bar that counts runs."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console)
