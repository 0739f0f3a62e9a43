"""From one process to many: rows per second, exchanged bytes, and a model of both for 8, 64 and 512 GPUs.

    python benchmarks/scaling.py [--only speed traffic model] [--steps 8] [--rounds 2]

Four methods on one model (a T5 of t5-small's shape, random weights): prompt tuning of six tasks, MPTSource with their
teachers, LoRA (r=8, PEFT's choice of layers) and full fine-tuning. All run through the Trainer.

- **speed**: rows per second of training with 1 and 2 processes, one thread each (CPU, gloo, DDP), B rows per process:
  weak scaling. Runs with 1 and 2 processes alternate; the first two steps of a run are not counted.
- **traffic**: the bytes that processes exchange, counted per operator at the calls of torch.distributed in a run of two
  processes: before the first step, and in each step. The table also shows the expected 4 bytes per trained parameter,
  and the same for t5-base's true shape, counted on modules on the meta device.
- **model**: the cost of a step of t5-base's shape at N GPUs, from measured parts (the FLOPs of a real step, its bytes,
  the seconds of the data) and assumed ones, which are arguments and are printed with the table: see `scaling_model.py`.
"""

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import lightning.pytorch as L
import scaling_model
import torch
import transformers
from measure import RESULTS
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scaling_methods import METHODS, T5_SMALL, TASKS, TINY, Rows, trained_parameters
from t5_base import T5_BASE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import T5Config, T5ForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

UNCOUNTED = 2  # first steps of a run, in which memory is allocated and DDP rebuilds its buckets


# -- one run, in separate processes ---------------------------------------------------------------------------------


class Clock(L.Callback):
    """Measures the time from the end of the uncounted steps to the end of the last one, including loading."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Record the time."""
        self.times.append(time.perf_counter())

    def seconds_per_step(self) -> float:
        """Return the mean seconds; a step ends on all processes together, since they exchange gradients."""
        counted = self.times[UNCOUNTED - 1 :]
        return (counted[-1] - counted[0]) / (len(counted) - 1)


class Traffic(TorchDispatchMode, L.Callback):
    """Counts the bytes that this process passes to torch.distributed, before the first step and in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[Counter[str]] = [Counter()]

    def on_train_batch_start(self, *args: Any) -> None:
        """Start the count of a step."""
        self.bytes.append(Counter())

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            self.bytes[-1][function._opname.rstrip("_")] += sum(t.nbytes for t in tensors if isinstance(t, Tensor))
        return function(*args, **(kwargs or {}))


def work(options: argparse.Namespace) -> None:
    """Train one method and write the measurements in the first process; Lightning starts the other processes."""
    torch.set_num_threads(1)
    quiet()
    L.seed_everything(0)
    steps = 3 if options.count else options.steps + UNCOUNTED
    vocabulary = T5Config.from_pretrained(options.folder).vocab_size
    rows = Rows(options.rows * options.processes * steps, options.length, vocabulary)
    clock, traffic = Clock(), Traffic()
    trainer = L.Trainer(
        accelerator="cpu", devices=options.processes, strategy="ddp" if options.processes > 1 else "auto",
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[traffic] if options.count else [clock],
    )  # fmt: skip
    module = METHODS[options.work](options.folder)
    loader = DataLoader(rows, batch_size=options.rows)
    if options.count:
        with traffic:
            trainer.fit(module, loader)
        found: dict[str, Any] = {"start": dict(traffic.bytes[0]), "steps": [dict(step) for step in traffic.bytes[1:]]}
    else:
        trainer.fit(module, loader)
        found = {"rows_per_second": options.rows * options.processes / clock.seconds_per_step()}
    if trainer.is_global_zero:
        found["trained"] = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        found["parameters"] = sum(parameter.numel() for parameter in module.parameters())
        Path(options.folder, "found.json").write_text(json.dumps(found), encoding="utf-8")


def run(method: str, processes: int, folder: str, options: argparse.Namespace, count: bool = False) -> dict[str, Any]:
    """Run `work` in new processes and return its measurements."""
    command = [
        sys.executable, str(Path(__file__).resolve()), "--work", method, "--processes", str(processes), "--folder",
        folder, "--steps", str(options.steps), "--rows", str(options.rows), "--length", str(options.length),
        *(["--count"] if count else []),
    ]  # fmt: skip
    made = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=options.timeout,
    )  # fmt: skip
    if made.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{made.stdout[-3000:]}")
    found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))
    return found


def prepare(folder: str, config: T5Config, options: argparse.Namespace) -> None:
    """Save the model and, by one step of prompt tuning, the teachers."""
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(
        METHODS["prompt tuning"](folder), DataLoader(Rows(len(TASKS), options.length, config.vocab_size), batch_size=6)
    )
    trainer.save_checkpoint(Path(folder, "teachers.ckpt"))


# -- speed ---------------------------------------------------------------------------------------------------------


def speed(folder: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    lines = []
    for method in options.methods:
        rates: dict[int, list[float]] = {1: [], 2: []}
        for turn in track(range(options.rounds), description=f"{'speed, ' + method:32}", transient=True):
            for processes in (1, 2) if turn % 2 else (2, 1):
                rates[processes].append(run(method, processes, folder, options)["rows_per_second"])
        shares = [two / (2 * one) for one, two in zip(rates[1], rates[2], strict=True)]
        lines.append({"method": method, "one": rates[1], "two": rates[2], "efficiency": shares})
    table = Table(title=f"Training through the Trainer, B={options.rows} per process, L={options.length}")
    for column in ("method", "rows / s, 1 process", "rows / s, 2 processes", "efficiency", "of the rounds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for line in lines:
        table.add_row(
            line["method"], f"{median(line['one']):.2f}", f"{median(line['two']):.2f}",
            f"{median(line['efficiency']):.0%}", ", ".join(f"{share:.0%}" for share in line["efficiency"]),
        )  # fmt: skip
    Console(width=130).print(table)
    return lines


# -- traffic -------------------------------------------------------------------------------------------------------


def traffic(folder: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    true_shape = trained_parameters(T5_BASE)
    lines = []
    for method in track(options.methods, description=f"{'traffic':32}", transient=True):
        found = run(method, 2, folder, options, count=True)
        lines.append({"method": method, "t5_base_trained": true_shape[method]} | found)
    table = Table(title="Bytes that a process passes to torch.distributed (2 processes)")
    for column in ("method", "trained", "at start", "first step", "each later step", "4 · trained", "t5-base: trained",
                   "t5-base: each step"):  # fmt: skip
        table.add_column(column, justify="left" if column == "method" else "right", overflow="fold")
    for line in lines:
        first, last = (sum(line["steps"][index].values()) for index in (0, -1))
        table.add_row(
            line["method"], f"{line['trained']:,}", f"{sum(line['start'].values()):,}", f"{first:,}", f"{last:,}",
            f"{4 * line['trained']:,}", f"{line['t5_base_trained']:,}", f"{4 * line['t5_base_trained']:,}",
        )  # fmt: skip
    Console(width=130).print(table)
    return lines


# -- the command ---------------------------------------------------------------------------------------------------


def quiet() -> None:
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()
    datasets.disable_progress_bars()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="From one process to many.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: all)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a run, at least 1 (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="runs with 1 and 2 processes (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="B per process (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="L (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--timeout", type=float, default=1800, help="maximum seconds of a run (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to test the script")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.json", help="JSON file")
    scaling_model.add_arguments(parser)
    hidden = {"help": argparse.SUPPRESS}  # used when the script starts itself
    parser.add_argument("--work", choices=METHODS, **hidden)
    parser.add_argument("--processes", type=int, default=1, **hidden)
    parser.add_argument("--folder", **hidden)
    parser.add_argument("--count", action="store_true", **hidden)
    parser.add_argument("--note", help="a remark on the run, such as other programs running; stored with the results")
    options = parser.parse_args(arguments)
    if min(options.steps, options.rounds, options.rows, options.length) < 1:
        parser.error("--steps, --rounds, --rows and --length must be at least 1")
    if options.step_seconds and len(options.step_seconds) != len(options.methods):
        parser.error(f"--step-seconds needs one number for each of {', '.join(options.methods)}")
    return options


PARTS = ["speed", "traffic", "model"]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.work:
        return work(options)
    quiet()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "environment": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lightning": L.__version__,
        },
        "arguments": {name: value for name, value in vars(options).items() if not isinstance(value, Path)},
    }
    with tempfile.TemporaryDirectory() as folder:
        if {"speed", "traffic"} & set(options.only):
            prepare(folder, TINY if options.tiny else T5_SMALL, options)
        for name, part in (("speed", speed), ("traffic", traffic)):
            if name in options.only:
                result[name] = part(folder, options)
    if "model" in options.only:
        result["model"] = scaling_model.run(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
