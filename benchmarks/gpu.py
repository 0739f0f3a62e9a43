"""Training steps of realistic size on one GPU: tokens per second, memory, and the share of the GPU's peak rate.

    python benchmarks/gpu.py [--repeats 20] [--compile] [--only source cpt prompt_tuning]
    python benchmarks/gpu.py --device cpu --tiny      # the same code on tiny shapes, to test the script

Random weights in bfloat16, prompts and losses in fp32, random tokens, rows without padding. Nothing is downloaded.

- **source**: MPTSource with six teachers on a T5 of t5-base's true shape (223 million parameters): P=100, B=32, 256
  input and 4 label tokens. A step has a teacher pass, a student pass and both distillation terms.
- **cpt**: CPT on a Llama-shaped model of 1.24 billion parameters (the shape of Llama 3.2 1B): P=800, B=16, L=40, one
  label token per row and those of the context, with the projection.
- **prompt_tuning**: prompt tuning on the same model: P=100, B=32, L=128, two label tokens.

A step is forward, backward, AdamW; its time is the median of `--repeats` steps after a warm-up, on a GPU by events.
**Tokens** are the input and label tokens of the rows. **Positions** are all positions of all passes, including prompts.
**FLOPs** are counted on a real step by torch.utils.flop_counter, with unfused attention, so that all its products are
counted. The **ceiling** is the rate of a bfloat16 product of two 8192 x 8192 matrices on this device, measured before
the steps.
"""

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from cpt import EXAMPLE, resident
from measure import RESULTS, Step, train_step
from rich.console import Console
from rich.progress import track
from rich.table import Table
from t5_base import T5_BASE
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, PreTrainedConfig, T5Config

from mpt_lightning import CPT, ContextPrompt, MPTSource, PromptTuning
from mpt_lightning.backbones import Backbone, CausalBackbone, Seq2SeqBackbone
from mpt_lightning.modules import PromptModule

LLAMA_1B = LlamaConfig(
    vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=131_072, rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip
TINY_T5 = T5Config(vocab_size=200, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)
TINY_LLAMA = LlamaConfig(
    vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """P, B, L, M and T, and the number of positions in the passes of a step."""

    prompt: int
    rows: int
    length: int
    labels: int
    tasks: int = 1

    def __str__(self) -> str:
        return f"P={self.prompt} B={self.rows} L={self.length} M={self.labels}"

    @property
    def tokens(self) -> int:
        """Number of input and label tokens of the rows."""
        return self.rows * (self.length + self.labels)

    @property
    def seq2seq_positions(self) -> int:
        """Number of positions of encoder and decoder in one pass."""
        return self.rows * (self.prompt + self.length + self.labels)

    @property
    def causal_positions(self) -> int:
        """Number of positions of one packed pass: each prompt once, and rows without their last label."""
        return self.tasks * self.prompt + self.rows * (self.length + self.labels - 1)


@dataclass
class Case:
    """A module with a batch to train on; `then` runs after each optimizer step."""

    module: PromptModule
    batch: dict[str, Tensor]
    positions: int
    then: Step | None = None


def make_backbone(config: PreTrainedConfig, device: torch.device, compiled: bool) -> Backbone:
    """Build a backbone with random weights on its device."""
    torch.manual_seed(0)
    seq2seq = config.is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    with device:
        model = auto.from_config(config, dtype=torch.bfloat16)
    return (Seq2SeqBackbone if seq2seq else CausalBackbone)(model, type(model).__name__, compiled=compiled)


def make_batch(shape: Shape, vocabulary: int, device: torch.device) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(3, vocabulary, (shape.rows, shape.length), device=device),
        "attention_mask": torch.ones(shape.rows, shape.length, dtype=torch.long, device=device),
        "labels": torch.randint(3, vocabulary, (shape.rows, shape.labels), device=device),
        "task_ids": torch.arange(shape.rows, device=device) % shape.tasks,
    }


def source(backbone: Backbone, shape: Shape, device: torch.device) -> Case:
    names = [f"task {index}" for index in range(shape.tasks)]
    module = MPTSource(backbone.name, tasks=names, prompt_length=shape.prompt, prompt_init="random")
    module.backbone, module.prompt = backbone, module.build_prompt(backbone)
    module.teacher_prompts = torch.rand(shape.tasks, shape.prompt, backbone.dim) - 0.5
    # Teachers and student: two passes.
    return Case(module, make_batch(shape, len(backbone.embeddings), device), 2 * shape.seq2seq_positions)


def cpt(backbone: Backbone, shape: Shape, device: torch.device) -> Case:
    types = [kind and kind + 4 * k for k in range(shape.prompt // len(EXAMPLE)) for kind in EXAMPLE]
    ids = torch.randint(3, len(backbone.embeddings), (len(types),)).tolist()
    module = CPT(backbone.name, tasks=["task"])
    module.backbone, module.prompt = backbone, ContextPrompt(ids, types, backbone.dim)
    module.prompt.attach(backbone.embeddings)
    batch = make_batch(shape, len(backbone.embeddings), device)
    return Case(module, batch, shape.causal_positions, module.prompt.project)


def prompt_tuning(backbone: Backbone, shape: Shape, device: torch.device) -> Case:
    module = PromptTuning(backbone.name, tasks=["task"], prompt_length=shape.prompt, prompt_init="random")
    module.backbone, module.prompt = backbone, module.build_prompt(backbone)
    return Case(module, make_batch(shape, len(backbone.embeddings), device), shape.causal_positions)


Make = Callable[[Backbone, Shape, torch.device], Case]
CASES: dict[str, tuple[str, Make, PreTrainedConfig, Shape]] = {
    "source": ("MPTSource, 6 teachers, T5-base", source, T5_BASE, Shape(100, 32, 256, 4, tasks=6)),
    "cpt": ("CPT, Llama 1B", cpt, LLAMA_1B, Shape(800, 16, 40, 1)),
    "prompt_tuning": ("prompt tuning, Llama 1B", prompt_tuning, LLAMA_1B, Shape(100, 32, 128, 2)),
}
TINY = {
    "source": (TINY_T5, Shape(10, 6, 8, 2, tasks=6)),
    "cpt": (TINY_LLAMA, Shape(40, 4, 8, 1)),
    "prompt_tuning": (TINY_LLAMA, Shape(10, 4, 8, 2)),
}


def seconds_of(step: Step, device: torch.device, repeats: int, text: str) -> list[float]:
    """Return the seconds of each step; on a GPU measured by events, so that the GPU never waits for the host."""
    if device.type != "cuda":
        times = []
        for _ in track(range(repeats), description=f"{text:32}", transient=True):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in track(events[1:], description=f"{text:32}", transient=True):
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [first.elapsed_time(second) / 1000 for first, second in pairwise(events)]


def ceiling(device: torch.device, size: int, repeats: int) -> float:
    """Return the operations per second of a bfloat16 matrix product."""
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=product)

    for _ in range(3):
        multiply()
    return 2 * size**3 / median(seconds_of(multiply, device, repeats, "ceiling"))


def operations(step: Step) -> int:
    """Return the floating-point operations of a step: two for each multiplication of a matrix product."""
    # Unfused, since the counter does not support every fused attention; uncompiled, since it counts operators.
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.compiler.set_stance("force_eager"),
        FlopCounterMode(display=False) as count,
    ):
        step()
    return count.get_total_flops()


def measure(name: str, options: argparse.Namespace, top: float) -> dict[str, Any]:
    """Run one case and return its results."""
    device = torch.device(options.device)
    title, make, config, shape = CASES[name]
    if options.tiny:
        config, shape = TINY[name]
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the maximum
    before = 0.0 if on_gpu else resident("VmRSS")
    backbone = make_backbone(config, device, options.compile)
    case = make(backbone, shape, device)
    module = case.module.to(device).train()
    step = train_step(module.prompt.parameters(), lambda: module.losses(case.batch)["loss"], case.then)
    flops = operations(step)
    for _ in range(options.warm_up):
        step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    times = seconds_of(step, device, options.repeats, title)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else resident("VmHWM") - before
    seconds = median(times)
    loss = float(module.losses(case.batch)["loss"])
    if loss != loss:
        raise SystemExit(f"{title}: the loss is {loss}.")
    return {
        "name": title, "shape": asdict(shape), "text": str(shape), "compiled": options.compile,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "seconds": times, "seconds_per_step": seconds,
        "tokens_per_second": shape.tokens / seconds, "positions_per_second": case.positions / seconds,
        "flops": flops, "flops_per_second": flops / seconds, "of_ceiling": flops / seconds / top,
        "peak_mib": peak, "loss": loss,
    }  # fmt: skip


def show(rows: list[dict[str, Any]], environment: dict[str, str]) -> None:
    table = Table(title="Training steps on one device, bfloat16 backbones", caption=", ".join(environment.values()))
    for column in ("step", "shape", "million parameters", "ms", "tokens / s", "positions / s", "TFLOP", "TFLOP/s",
                   "of ceiling", "peak MiB"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("step", "shape") else "right", overflow="fold")
    for row in rows:
        table.add_row(
            row["name"], row["text"], f"{row['parameters'] / 1e6:,.1f}", f"{row['seconds_per_step'] * 1e3:,.1f}",
            f"{row['tokens_per_second']:,.0f}", f"{row['positions_per_second']:,.0f}", f"{row['flops'] / 1e12:.3g}",
            f"{row['flops_per_second'] / 1e12:.3g}", f"{row['of_ceiling']:.1%}", f"{row['peak_mib']:,.0f}",
        )  # fmt: skip
    Console(width=150).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Training steps of realistic size on one GPU.")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --tiny (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny models and shapes, to test the script")
    parser.add_argument("--compile", action="store_true", help="compile the backbone's layers")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before the timed ones (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="steps to run (default: all)")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json", help="JSON file (default: %(default)s)")
    parser.add_argument("--note", help="a remark on the run, such as other programs running; stored with the results")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no GPU; test the script with --device cpu --tiny")
    warnings.filterwarnings("ignore")
    device = torch.device(options.device)
    size = 256 if options.tiny else 8192
    top = ceiling(device, size, options.repeats)
    rows = [measure(name, options, top) for name in options.only]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    environment = {
        "device": name,
        "ceiling": f"ceiling {top / 1e12:.3g} TFLOP/s",
        "torch": f"torch {torch.__version__}",
        "transformers": f"transformers {transformers.__version__}",
    } | ({"note": options.note} if options.note else {})
    show(rows, environment)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment, "ceiling": top, "product": size, "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
