"""Exiting with a message."""

import os
import sys
import time
from typing import NoReturn

# Seconds after which a process that fails alone prints its message.
PATIENCE = 10.0


def fail(message: str) -> NoReturn:
    """Print one message and exit; of several processes that fail for the same reason, only the first one prints."""
    if int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or 0) > 0:
        parent = os.getppid()
        time.sleep(PATIENCE)  # when the first process fails, torchrun and srun end this one
        if os.getppid() != parent:  # with Lightning's own launcher the parent is the first process
            raise SystemExit(2)
    print(f"mpt: error: {message}", file=sys.stderr)
    raise SystemExit(2)
