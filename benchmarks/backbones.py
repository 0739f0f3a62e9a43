"""Precisions and memory options of a large frozen backbone: their time and memory relative to fp32 in the same run.

    python benchmarks/backbones.py [--device cpu] [--threads 2] [--repeats 15] [--only bf16 8-bit ...]

A Llama of 70 million parameters with random weights, loaded by `load_backbone` with different options per line. The
step is prompt tuning with P=100, B=8, L=64 and two label tokens: forward, backward, AdamW. The steps of a line and of
fp32 alternate.

- **logits**: the difference to the logits of fp32 at the label positions, largest and mean; the caption contains the
  standard deviation of these logits. Random weights have no outliers, which make 8 and 4 bits difficult: the difference
  checks that an option works, and does not estimate the loss of a trained model.
- **first**: seconds of the first forward pass and step, including compilation, or loading from torch's cache on disk.
- **peak memory** is measured in a new process: weights, activations, gradients, optimizer, from before loading to the
  maximum of two steps. CPU: growth of the resident set (Linux). GPU: the memory that torch has allocated.
- A line whose library is missing, or that the machine does not support, is reported as not run.
"""

import argparse
import ctypes
import json
import logging
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from cpt import resident
from measure import RESULTS, Line, Step, alternate, train_step
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from mpt_lightning import SoftPrompt, load_backbone
from mpt_lightning.objectives import token_cross_entropy

REFERENCE = "fp32"
WAYS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "bf16": {"dtype": "bfloat16"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "8-bit": {"quantization": "8bit"},
    "4-bit": {"quantization": "4bit"},
    "8-bit, bf16": {"quantization": "8bit", "dtype": "bfloat16"},
    "4-bit, bf16": {"quantization": "4bit", "dtype": "bfloat16"},
    "compile": {"compiled": True},
    "compile, bf16": {"compiled": True, "dtype": "bfloat16"},
}


@dataclass(frozen=True)
class Setting:
    """The shape of the model and of the step, and the device."""

    device: str = "cpu"
    threads: int = 2
    hidden: int = 640
    layers: int = 10
    vocabulary: int = 16_000
    prompt: int = 100
    rows: int = 8
    length: int = 64
    labels: int = 2

    def save_model(self, folder: str) -> int:
        """Save the model and return its number of parameters."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.hidden * 27 // 10,
            num_hidden_layers=self.layers, num_attention_heads=self.hidden // 64, max_position_embeddings=512,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        model.save_pretrained(folder)
        return model.num_parameters()


@dataclass
class Run:
    """A backbone with one set of options: a training step, and the logits before it."""

    step: Step
    logits: Callable[[], Tensor]


def build(setting: Setting, folder: str, way: str) -> Run:
    """Load the model with one set of options.

    Raises:
        MPTError: If a library is missing, or the machine does not support the options.
    """
    device = torch.device(setting.device)
    backbone = load_backbone(folder, device=device, **WAYS[way]).to(device).train()
    torch.manual_seed(1)
    prompt = SoftPrompt(1, setting.prompt, setting.hidden).to(device)
    ids = torch.randint(3, setting.vocabulary, (setting.rows, setting.length), device=device)
    labels = torch.randint(3, setting.vocabulary, (setting.rows, setting.labels), device=device)
    rows = torch.zeros(setting.rows, dtype=torch.long, device=device)

    def logits() -> Tensor:
        return backbone(prompt(rows[:1]), rows, ids, torch.ones_like(ids), labels).logits

    bare = train_step(prompt.parameters(), lambda: token_cross_entropy(logits(), labels))

    def step() -> None:
        bare()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return Run(step, lambda: logits().detach().float())


def prepare(setting: Setting) -> None:
    torch.set_num_threads(setting.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    disable_progress_bar()


def peak(setting: Setting, folder: str, way: str) -> float:
    """Return the peak memory in MiB of loading the model and of two steps, beyond the memory of the process."""
    prepare(setting)
    for library in ("torch._inductor.compile_fx", "bitsandbytes"):
        if find_spec(library) is not None:
            import_module(library)  # so that the library's code is not part of the measured memory
    on_gpu = setting.device != "cpu"
    before = 0.0 if on_gpu else resident("VmRSS")
    run = build(setting, folder, way)
    run.step()
    run.step()  # creates compiled code and optimizer state
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # returns the memory that loading has freed
        Path("/proc/self/clear_refs").write_text("5")
    run.step()
    run.step()
    return torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident("VmHWM") - before


def in_new_process(function: Callable[..., float], *arguments: Any) -> float:
    """Run a function in a new process, and return its result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(setting: Setting, folder: str, ways: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Return one row of results per set of options."""
    reference = build(setting, folder, REFERENCE)
    expected = reference.logits()
    reference_peak = in_new_process(peak, setting, folder, REFERENCE)
    rows = []
    for way in ways:
        try:
            run = build(setting, folder, way)
        except ValueError as error:
            rows.append({"name": way, "missing": str(error)})
            continue
        begin = time.perf_counter()
        difference = (run.logits() - expected).abs()
        run.step()
        first = time.perf_counter() - begin
        times = alternate(run.step, reference.step, repeats, way)
        own_peak = reference_peak if way == REFERENCE else in_new_process(peak, setting, folder, way)
        line = Line(way, REFERENCE, None, False, *times, memory=(own_peak, reference_peak))
        rows.append(
            asdict(line)
            | {"ratio": median(line.ratios), "largest": float(difference.max()), "mean": float(difference.mean())}
            | {"deviation": float(expected.std()), "first": first}
        )
    return rows


def show(rows: list[dict[str, Any]], title: str, environment: dict[str, str]) -> None:
    deviation = next((f"{row['deviation']:.3g}" for row in rows if "deviation" in row), "-")
    caption = f"logits' standard deviation {deviation}; " + ", ".join(environment.values())
    table = Table(title=title, caption=caption)
    for column in (
        "backbone",
        "step / fp32's",
        "middle half",
        "s / step",
        "first",
        "peak MiB",
        "logits: largest",
        "mean",
    ):
        table.add_column(column, justify="left" if column == "backbone" else "right", overflow="fold")
    for row in rows:
        if "missing" in row:
            table.add_row(row["name"], "not run")
            continue
        low, _, high = quantiles(row["ratios"], n=4)
        table.add_row(
            row["name"], f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}", f"{median(row['seconds']):.3f}",
            f"{row['first']:.1f}", f"{row['memory'][0]:,.0f}", f"{row['largest']:.1e}", f"{row['mean']:.1e}",
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    for row in rows:
        if "missing" in row:
            console.print(f"{row['name']}: {row['missing']}", markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Options of a frozen backbone, relative to fp32 in the same run.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds, at least 2 (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), help="lines to run (default: all)")
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers, to test the script")
    parser.add_argument("--output", type=Path, default=RESULTS / "backbones.json", help="JSON file")
    parser.add_argument("--note", help="a remark on the run, such as other programs running; stored with the results")
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        parser.error(f"--repeats must be at least 2, for a middle half; got {options.repeats}")
    small = {"hidden": 64, "layers": 2, "vocabulary": 200, "prompt": 10, "rows": 2, "length": 8}
    setting = Setting(options.device, options.threads, **(small if options.tiny else {}))
    prepare(setting)
    with tempfile.TemporaryDirectory() as folder:
        parameters = setting.save_model(folder)
        rows = measure(setting, folder, options.only, options.repeats)
    machine = (
        f"{options.threads} CPU threads ({platform.machine()})"
        if options.device == "cpu"
        else torch.cuda.get_device_name(options.device)
    )
    environment = {
        "device": machine,
        "rounds": f"{options.repeats} rounds",
        "torch": f"torch {torch.__version__}",
        "transformers": f"transformers {transformers.__version__}",
    } | ({"note": options.note} if options.note else {})
    title = (
        f"Llama of {parameters / 1e6:.1f} million parameters, prompt tuning, P={setting.prompt} B={setting.rows} "
        f"L={setting.length}"
    )
    show(rows, title, environment)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment, "parameters": parameters, "setting": asdict(setting), "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
