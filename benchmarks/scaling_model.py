"""A model of the cost of a step at N GPUs, from measured and assumed parts, for `scaling.py`.

    compute      FLOPs · B / --tflops, or --step-seconds
    ring         hops · latency + 2 (N-1)/N · bytes / bandwidth; of its 2 (N-1) hops 2 (machines-1) cross the network
    tree         2 ((GPUs of a machine - 1) · NVLink's latency + log2(machines) · the network's) + 2 · bytes / bandwidth
    step         compute + the part of the exchange that is not hidden; at least the seconds of the data
    efficiency   the step without any exchange / the step

"Lowest" is the ring without overlap. "Highest" is the faster of ring and tree, overlapped with the backward pass,
except for prompts, whose gradient is the last result of the backward pass.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from math import ceil, log2
from statistics import median
from typing import Any

import torch
from gpu import operations
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scaling_methods import PROMPTS, TINY, Rows, assembled, trained_parameters
from t5_base import T5_BASE
from transformers import T5Config, T5ForConditionalGeneration

from mpt_lightning import TaskDataModule


@dataclass(frozen=True)
class Network:
    """Assumptions about the machines, in seconds and bytes per second."""

    node: int
    nvlink_latency: float
    nvlink_bandwidth: float
    network_latency: float
    network_bandwidth: float

    def nodes(self, gpus: int) -> int:
        """Return the number of machines that have this number of GPUs."""
        return ceil(gpus / self.node)

    def bandwidth(self, gpus: int) -> float:
        """Return the bandwidth of the slowest link that the bytes pass."""
        return self.nvlink_bandwidth if self.nodes(gpus) == 1 else min(self.nvlink_bandwidth, self.network_bandwidth)

    def ring(self, size: float, gpus: int) -> float:
        """Return the seconds of an all-reduce around a ring."""
        across = 2 * (self.nodes(gpus) - 1)
        latency = (2 * (gpus - 1) - across) * self.nvlink_latency + across * self.network_latency
        return latency + 2 * (gpus - 1) / gpus * size / self.bandwidth(gpus)

    def tree(self, size: float, gpus: int) -> float:
        """Return the seconds of an all-reduce up and down a tree of machines, each a chain of GPUs."""
        within = min(gpus, self.node) - 1
        latency = 2 * (within * self.nvlink_latency + log2(self.nodes(gpus)) * self.network_latency)
        return latency + 2 * size / self.bandwidth(gpus)


def efficiency(compute: float, exposed: float, data: float) -> float:
    """Return the time of a step without any exchange, relative to the step."""
    return max(compute, data) / max(compute + exposed, data)


def flops_per_row(method: str, config: T5Config, length: int) -> tuple[int, int]:
    """Return the floating-point operations for one row, of the forward pass and of the whole step."""
    module = assembled(method, T5ForConditionalGeneration(config))
    batch = {name: value[None] for name, value in Rows(1, length, config.vocab_size)[0].items()}
    with torch.no_grad():
        forward = operations(lambda: module.losses(batch))
    return forward, operations(lambda: module.losses(batch)["loss"].backward())


def loading_seconds(rows: int) -> float:
    """Return the seconds per batch of the package's data loader, on tokenised rows of the demo world."""
    with tempfile.TemporaryDirectory() as cache:
        data = TaskDataModule("demo/topic", backbone="mpt_lightning/demo/t5", batch_size=rows, cache_dir=cache)
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            batches = sum(1 for _ in loader)
            times.append((time.perf_counter() - begin) / batches)
    return median(times)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    network = Network(
        options.node, options.nvlink_latency * 1e-6, options.nvlink_bandwidth * 1e9, options.network_latency * 1e-6,
        options.network_bandwidth * 1e9,
    )  # fmt: skip
    config = TINY if options.tiny else T5_BASE
    trained, data = trained_parameters(config), loading_seconds(options.model_rows)
    lines = []
    for index, method in enumerate(track(options.methods, description=f"{'model':32}", transient=True)):
        forward, whole = flops_per_row(method, config, options.model_length)
        compute = whole * options.model_rows / (options.tflops * 1e12)
        if options.step_seconds:
            compute = options.step_seconds[index]
        size = 4 * trained[method]
        hidden = 0.0 if method in PROMPTS else compute * (1 - forward / whole)
        for gpus in options.gpus:
            ring, tree = network.ring(size, gpus), network.tree(size, gpus)
            lines.append({
                "method": method, "gpus": gpus, "bytes": size, "flops_per_row": whole, "compute": compute,
                "ring": ring, "tree": tree, "data": data,
                "lowest": efficiency(compute, ring, data),
                "highest": efficiency(compute, max(0.0, min(ring, tree) - hidden), data),
            })  # fmt: skip
    assumed = (
        f"ASSUMED: {options.node} GPUs per machine; NVLink {options.nvlink_bandwidth:g} GB/s, "
        f"{options.nvlink_latency:g} us per hop; network {options.network_bandwidth:g} GB/s per machine, "
        f"{options.network_latency:g} us per hop; "
        + (
            "compute as given by --step-seconds"
            if options.step_seconds
            else f"{options.tflops:g} TFLOP/s achieved per GPU"
        )
        + f". MEASURED: FLOPs, bytes, {data * 1e3:.1f} ms for the data of {options.model_rows} rows in each process, "
        "in parallel with the GPU. Optimizer, stragglers and shared networks are not modelled."
    )
    table = Table(
        title=f"A model of a step at N GPUs: t5-base's shape, B={options.model_rows} per GPU, L={options.model_length}",
        caption=assumed,
    )
    for column in ("method", "GPUs", "bytes", "compute, ms", "ring, ms", "tree, ms", "efficiency: lowest", "highest"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for line in lines:
        table.add_row(
            line["method"], str(line["gpus"]), f"{line['bytes']:,}", f"{line['compute'] * 1e3:.1f}",
            f"{line['ring'] * 1e3:.3f}", f"{line['tree'] * 1e3:.3f}", f"{line['lowest']:.2%}", f"{line['highest']:.2%}",
        )  # fmt: skip
    Console(width=130).print(table)
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments with the assumptions."""
    assumed = parser.add_argument_group("assumptions of the model")
    assumed.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512], help="N (default: 8 64 512)")
    assumed.add_argument("--model-rows", type=int, default=32, help="B per GPU (default: %(default)s)")
    assumed.add_argument("--model-length", type=int, default=256, help="L (default: %(default)s)")
    assumed.add_argument(
        "--tflops", type=float, default=400.0,
        help="achieved per GPU (default: %(default)s, 40%% of the H100 SXM datasheet's 989 in dense bf16)",
    )  # fmt: skip
    assumed.add_argument(
        "--step-seconds",
        type=float,
        nargs="+",
        metavar="S",
        help="seconds of a step on one GPU, one number per method, instead of --tflops",
    )
    assumed.add_argument("--node", type=int, default=8, help="GPUs per machine (default: %(default)s)")
    assumed.add_argument(
        "--nvlink-latency", type=float, default=3.4,
        help="us per hop (default: %(default)s: NCCL's src/graph/tuning.cc, ring, protocol Simple)",
    )  # fmt: skip
    assumed.add_argument(
        "--network-latency", type=float, default=14.0, help="us per hop (default: %(default)s: the same table)"
    )
    assumed.add_argument(
        "--nvlink-bandwidth", type=float, default=450.0,
        help="GB/s per GPU and direction (default: %(default)s: half of the 900 both ways of the H100's datasheet)",
    )  # fmt: skip
    assumed.add_argument(
        "--network-bandwidth", type=float, default=400.0,
        help="GB/s per machine and direction (default: %(default)s: a DGX H100's 8 adapters of 400 Gbit/s; rings go "
        "through all of them)",
    )  # fmt: skip
