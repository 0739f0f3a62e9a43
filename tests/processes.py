"""Run functions of the tests in separate processes, forked from a server that has imported what they need.

The server does nothing but import, so that it has no threads: a forked process would lack them, and wait for them.
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([
    "pytest", "torch.profiler", "torch.distributed.fsdp", "torch.nn.parallel", "datasets.io.generator",
    "datasets.io.parquet", "mpt_lightning.callbacks", "mpt_lightning.cli.trainer", "mpt_lightning.data",
    "mpt_lightning.distributed", "mpt_lightning.interop", "mpt_lightning.modules",
    "transformers.models.llama.modeling_llama", "transformers.models.t5.modeling_t5",
    "transformers.models.t5.tokenization_t5",
])  # fmt: skip


def start(
    function: Callable[..., None], *arguments: Any, variables: Mapping[str, str] | None = None
) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    """Start `function(*arguments)`, of an importable module, in a new process with additional environment variables.

    Returns:
        The process, and what it sends: nothing, or the traceback of its error.
    """
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_run, args=(function, arguments, os.environ | (variables or {}), sender))
    process.start()
    sender.close()
    return process, receiver


def _run(
    function: Callable[..., None], arguments: tuple[Any, ...], variables: dict[str, str], sender: Connection
) -> None:
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)
    rank_zero_only.rank = int(variables.get("RANK", 0))  # Lightning reads it when it is imported
    try:
        function(*arguments)
        status = 0
    except BaseException:
        sender.send(traceback.format_exc())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # Gloo's threads sometimes abort a process that ends by itself.


def finish(*started: tuple[multiprocessing.process.BaseProcess, Connection], seconds: float = 60) -> None:
    """Wait until all processes have ended.

    Raises:
        RuntimeError: If one fails or takes too long; the message ends with its traceback.
    """
    deadline = time.monotonic() + seconds
    try:
        for number, (process, receiver) in enumerate(started):
            process.join(max(1.0, deadline - time.monotonic()))
            if process.exitcode is None:
                raise RuntimeError(f"process {number} did not end within {seconds} seconds")
            if process.exitcode:
                text = receiver.recv() if receiver.poll() else ""
                raise RuntimeError(f"process {number} ended with {process.exitcode}:\n{text}")
    finally:
        for process, receiver in started:
            process.kill()
            process.join()
            receiver.close()


def launch(function: Callable[..., None], *arguments: Any, ranks: int = 2, seconds: float = 240) -> None:
    """Call a module-level `function(*arguments)` in every rank, with the environment that torchrun would set.

    Raises:
        RuntimeError: If a rank fails or takes too long; the message ends with its traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    finish(
        *[
            start(function, *arguments, variables=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ],
        seconds=seconds,
    )
