"""Results on disk: one whole JSON file per finished run, in the folder of one comparison."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from mpt_lightning.compare.plan import Run
from mpt_lightning.errors import MPTError

# The column of the mean over tasks.
AVERAGE = "average"
MARK = "comparison.json"


@dataclass
class Result:
    """What a run came to.

    Attributes:
        method: the method's name; "prepare" for a run that others start from.
        task: the card's name.
        k: training rows; None for the full data.
        seed: the seed.
        status: "done" or "failed".
        fingerprint: the run's (`Run.fingerprint`): a result with another one is of another run.
        commands: what was run, as one types it.
        error: one line, where it failed.
        metric: name of the compared test metric.
        value: its value.
        metrics: all test metrics by name.
        trained_parameters: their number.
        checkpoint_bytes: size of the best checkpoint; 0 where nothing is trained.
        steps: optimizer steps.
        seconds_per_step: median time of a training step, without loading data, validating and saving.
        peak_memory_bytes: the most memory at one time: on the GPU, else of the process beyond what it had before the
            run; None where the system does not tell.
        seconds: of the whole run.
        checkpoint: the best checkpoint, where it was kept.
    """

    method: str
    task: str | None
    k: int | None
    seed: int | None
    status: Literal["done", "failed"]
    fingerprint: str
    commands: list[str] = field(default_factory=list)
    error: str | None = None
    metric: str | None = None
    value: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    trained_parameters: int = 0
    checkpoint_bytes: int = 0
    steps: int = 0
    seconds_per_step: float | None = None
    peak_memory_bytes: int | None = None
    seconds: float = 0.0
    checkpoint: str | None = None


def failure(run: Run, error: str, commands: Sequence[str] = (), seconds: float = 0.0) -> Result:
    """Make the result of a run that failed."""
    return Result(
        run.method, run.task, run.k, run.seed, "failed", run.fingerprint, list(commands), error, seconds=seconds
    )


class Store:
    """The folder of a comparison's results.

    Args:
        output: the folder; made where it does not exist.
        name: the comparison's.

    Raises:
        MPTError: the folder is another comparison's, or holds something else.
    """

    def __init__(self, output: Path, name: str) -> None:
        self.output = output
        mark = output / MARK
        if output.exists() and not output.is_dir():
            raise MPTError(f"--output {output} is a file; give a folder.")
        if mark.is_file():
            found = _read(mark).get("name")
            if found != name:
                raise MPTError(f"--output {output} has the results of the comparison {found!r}, and this is {name!r}.")
        elif output.exists() and any(output.iterdir()):
            raise MPTError(f"--output {output} is not empty and holds no comparison; give another folder.")
        else:
            _write(mark, {"name": name})

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes out.

        Raises:
            MPTError: one is there.
        """
        try:
            with FileLock(self.output / ".lock", timeout=0):
                yield
        except Timeout:
            raise MPTError(f"Another `mpt compare` is running in {self.output}; wait for it.") from None

    def work(self, run: Run) -> Path:
        """Give the folder for a run's checkpoints and logs."""
        return self.output / "runs" / run.place

    def read(self, run: Run) -> Result | None:
        """Give a run's result; None where there is none, or it is of other arguments, or its checkpoint is gone."""
        values = _read(self._file(run))
        if values.get("fingerprint") != run.fingerprint:
            return None
        try:
            result = Result(**values)
        except TypeError:  # a file of another version
            return None
        gone = run.task is None and result.checkpoint is not None and not Path(result.checkpoint).is_file()
        return None if gone else result

    def write(self, run: Run, result: Result) -> None:
        """Write a result, whole or not at all."""
        _write(self._file(run), asdict(result))

    def _file(self, run: Run) -> Path:
        return self.output / "results" / f"{run.place}.json"


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, file)


def title(k: int | None) -> str:
    """Give a k's name in titles."""
    return "full data" if k is None else f"k = {k}"
