"""Runs a function of a test file in several fresh processes, as torchrun would start them.

Fresh, because a forked process inherits a thread pool without its threads, and waits for them for ever.
"""

import json
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


def launch(function: Callable[..., None], *arguments: Any, ranks: int = 2, seconds: float = 240) -> None:
    """Call a module-level `function(*arguments)` in every rank; RANK and the like are in the environment.

    Args:
        function: the function; the file it is in is run anew in each process.
        *arguments: what JSON can hold.
        ranks: number of processes.
        seconds: how long they may take.

    Raises:
        RuntimeError: a process failed, or took too long; the message ends with what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = [sys.executable, __file__, function.__code__.co_filename, function.__name__, json.dumps(arguments)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            job, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    deadline = time.monotonic() + seconds
    try:
        for rank, process in enumerate(processes):
            printed, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            if process.returncode:
                raise RuntimeError(f"rank {rank} ended with {process.returncode}:\n{printed[-3000:]}")
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the ranks did not end within {seconds} seconds") from error
    finally:
        for process in processes:
            process.kill()
            process.communicate()


if __name__ == "__main__":
    file, name, given = sys.argv[1:]
    runpy.run_path(file)[name](*json.loads(given))
    # Gloo's threads now and then abort a process that takes itself down.
    sys.stdout.flush()
    os._exit(0)
