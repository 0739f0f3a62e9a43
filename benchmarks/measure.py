"""Shared parts of the speed benchmarks: timing two alternating steps, a small Llama, the table and its JSON file."""

import argparse
import json
import logging
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning.pytorch as L
import peft
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

RESULTS = Path(__file__).parent / "results"

Step = Callable[[], None]


@dataclass
class Line:
    """One line of the table: the ratio of a measured step to a reference.

    Attributes:
        name: Name of the measured step.
        reference: Name of the reference.
        goal: Bound of the ratio, or None.
        at_least: Whether the ratio is a speed-up (reference / measured) or a cost (measured / reference).
        seconds: Seconds of the measured step, per round.
        reference_seconds: Seconds of the reference, per round.
        note: Evidence that both computed the same.
        memory: Peak memory in MiB of the measured step and of the reference, beyond the loaded model.
    """

    name: str
    reference: str
    goal: float | None
    at_least: bool
    seconds: list[float]
    reference_seconds: list[float]
    note: str = ""
    memory: tuple[float, float] | None = None
    ratios: list[float] = field(init=False)

    def __post_init__(self) -> None:
        pairs = zip(self.seconds, self.reference_seconds, strict=True)
        self.ratios = [theirs / ours if self.at_least else ours / theirs for ours, theirs in pairs]

    @property
    def met(self) -> bool | None:
        """Whether the median of the ratios reaches the goal; None without a goal."""
        if self.goal is None:
            return None
        return median(self.ratios) >= self.goal if self.at_least else median(self.ratios) <= self.goal


def alternate(ours: Step, theirs: Step, repeats: int, text: str) -> tuple[list[float], list[float]]:
    """Return the seconds of two alternating steps after two warm-up rounds; the order changes every round."""
    times: dict[Step, list[float]] = {ours: [], theirs: []}
    for turn in track(range(repeats + 2), description=f"{text:32}", transient=True):
        for step in (ours, theirs) if turn % 2 else (theirs, ours):
            begin = time.perf_counter()
            step()
            times[step].append(time.perf_counter() - begin)
    return times[ours][2:], times[theirs][2:]


def small_llama(max_positions: int = 512) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000, hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=max_positions,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def train_step(parameters: Iterable[nn.Parameter], loss_of: Callable[[], Tensor], then: Step | None = None) -> Step:
    """Return a step of forward, backward and AdamW, followed by `then`."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    if then is not None:
        optimizer.register_step_post_hook(lambda *_: then())

    def step() -> None:
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()

    return step


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference, relative to the largest absolute value of `theirs`."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def environment(threads: int, rounds: int) -> dict[str, str]:
    return {
        "threads": f"{threads} CPU threads ({platform.machine()})",
        "rounds": f"{rounds} rounds",
        "torch": f"torch {torch.__version__}",
        "transformers": f"transformers {transformers.__version__}",
        "lightning": f"lightning {L.__version__}",
        "peft": f"peft {peft.__version__}",
    }


def plain(lines: list[Line]) -> list[dict[str, Any]]:
    return [asdict(line) | {"ratio": median(line.ratios), "met": line.met} for line in lines]


def show(title: str, lines: list[Line], environment: dict[str, str]) -> None:
    table = Table(title=f"{title}: median of the rounds' ratios", caption=", ".join(environment.values()))
    for column in ("measured", "reference", "goal", "ratio", "middle half", "seconds", "same result"):
        table.add_column(column, overflow="fold", justify="left" if column in ("measured", "reference") else "right")
    memory = any(line.memory for line in lines)
    if memory:
        table.add_column("peak MiB", justify="right")
    for line in lines:
        low, _, high = quantiles(line.ratios, n=4)
        colour = {True: "green", False: "red", None: "default"}[line.met]
        table.add_row(
            line.name,
            line.reference,
            "" if line.goal is None else f"{'>=' if line.at_least else '<='} {line.goal:g}",
            f"[{colour}]{median(line.ratios):.3g}[/]",
            f"{low:.3g} to {high:.3g}",
            f"{median(line.seconds):.3f} : {median(line.reference_seconds):.3f}",
            line.note,
            *([" : ".join(f"{size:,.0f}" for size in line.memory or ())] if memory else []),
        )
    Console(width=165 if memory else 150).print(table)


def main(title: str, parts: Mapping[str, Callable[[int], Iterator[Line]]], output: Path) -> None:
    """Run a benchmark's parts, each a function of the number of rounds, show the lines and write them to a file."""
    parser = argparse.ArgumentParser(description=f"{title}: ratios of times measured in one run.")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds, at least 2 (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="parts to run (default: all)")
    parser.add_argument("--output", type=Path, default=output, help="JSON file (default: %(default)s)")
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"--repeats must be at least 2, for a middle half; got {options.repeats}")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lines = [line for part in options.only for line in parts[part](options.repeats)]
    found = environment(options.threads, options.repeats)
    show(title, lines, found)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        json.dumps({"environment": found, "rows": plain(lines)}, indent=1) + "\n", encoding="utf-8"
    )
