"""Results of runs: one JSON file for each, in the folder of one comparison."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mpt_lightning.compare.runs import Run
from mpt_lightning.errors import MPTError
from mpt_lightning.io import write_file


@dataclass(kw_only=True)
class Outcome:
    """What a run returned; costs are those of the best trial, `seconds` of all.

    `peak_memory_bytes` is the GPU's peak memory, or else the memory that the process took beyond what it had before the
    run; None if the system does not report it.
    """

    error: str | None = None  # the message, in one line, of a run that failed
    # For each trial its `values`, and the `score` and `loss` of its selected checkpoint on the rows that select.
    trials: list[dict[str, Any]] = field(default_factory=list)
    chosen: dict[str, Any] = field(default_factory=dict)  # the values of the best trial
    commands: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)  # all test metrics by name
    trained_parameters: int = 0
    checkpoint_bytes: int = 0  # of the best checkpoint; 0 without training
    steps: int = 0
    train_rows: int = 0  # that were in a training batch, each time counted
    train_tokens: int = 0  # of these rows, inputs and answers
    train_loss: float | None = None  # of the last step
    train_seconds: float = 0.0  # of all training steps
    seconds_per_step: float | None = None  # median training step, without loading data, validating and saving
    peak_memory_bytes: int | None = None
    seconds: float = 0.0
    checkpoint: str | None = None  # path of the best checkpoint if it was kept
    environment: dict[str, Any] = field(default_factory=dict)  # model, versions and machine; see `environment.describe`


@dataclass(kw_only=True)
class Result(Outcome):
    """The outcome of a `Run`; `value` is the compared test metric's, None if the run failed."""

    method: str
    task: str | None
    k: int | None
    seed: int | None
    fingerprint: str = ""
    metric: str | None = None
    value: float | None = None

    @classmethod
    def of(cls, run: Run, outcome: Outcome, metric: str = "") -> "Result":
        """Return a run's result, with the value of `metric`."""
        return cls(
            method=run.method, task=run.task, k=run.k, seed=run.seed, fingerprint=run.fingerprint, metric=metric,
            value=outcome.metrics.get(metric), **vars(outcome),
        )  # fmt: skip

    @property
    def status(self) -> str:
        """Either "done", "failed" or "missing"."""
        if self.error:
            return "failed"
        return "done" if self.metrics or self.checkpoint or self.trials else "missing"


class Store:
    """The folder of a comparison's results, created if it does not exist."""

    def __init__(self, output: Path, name: str) -> None:
        self.output = output
        mark = output / "comparison.json"
        if mark.is_file():
            found = _read(mark).get("name")
            if found != name:
                raise MPTError(f"--output {output} has the results of the comparison {found!r}, and this is {name!r}.")
        elif output.exists() and any(output.iterdir()):
            raise MPTError(f"--output {output} is not empty and contains no comparison; give another folder.")
        else:
            _write(mark, {"name": name})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder."""
        try:
            with FileLock(self.output / ".lock", timeout=0):
                yield
        except Timeout:
            raise MPTError(f"Another `mpt compare` is running in {self.output}; wait for it.") from None

    def read(self, run: Run) -> Result:
        """Return a run's result; it is missing if outdated, or if the checkpoint of a prepared run was removed."""
        missing = Result.of(run, Outcome())
        values = _read(self._file(run))
        values.pop("status", None)
        try:
            result = Result(**values)
        except TypeError:  # missing, incomplete, or written by another version
            return missing
        removed = run.task is None and result.checkpoint is not None and not Path(result.checkpoint).is_file()
        return missing if removed or result.fingerprint != run.fingerprint else result

    def write(self, run: Run, result: Result) -> None:
        """Write a result atomically."""
        _write(self._file(run), {"status": result.status, **asdict(result)})

    def _file(self, run: Run) -> Path:
        return self.output / "results" / f"{run.place}.json"


def _read(file: Path) -> dict[str, Any]:
    """Return a file's mapping; an empty one if there is no such file, or it is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(file: Path, content: object) -> None:
    write_file(file, json.dumps(content, indent=1) + "\n")
