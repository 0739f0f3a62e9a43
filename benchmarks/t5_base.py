"""The three stages on a backbone of t5-base's true shape (v1.0, 222.9 million parameters), random weights, no network.

    python benchmarks/t5_base.py [--steps 3] [--batch-size 2] [--threads 2]

Runs the shipped recipes through the command line, one process per stage: six teachers, source training on the paper's
six tasks, adaptation to super_glue/boolq. The rows are the tests' fixtures, or those in `--data-root`. Random weights
show sizes, memory and time, not quality.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as L
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "tests" / "data" / "fixtures"
MIB = 2**20
T5_BASE = T5Config(
    vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, feed_forward_proj="relu",
    tie_word_embeddings=True, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
)  # fmt: skip
# The number of trained parameters in the paper by recipe (P=100, H=768). Each stage starts from the previous one.
STAGES = {"teachers": 6 * 76_800, "source": 82_008, "target": 77_668}


class StepSeconds(L.Callback):
    """Writes the seconds of each training step, from batch start to batch end, to the file in STEP_SECONDS."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begin = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        """Start the clock."""
        self.begin = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self.begin)

    def on_train_end(self, *args: Any) -> None:
        """Write the seconds to the file."""
        Path(os.environ["STEP_SECONDS"]).write_text(json.dumps(self.seconds), encoding="utf-8")


def save_backbone(folder: Path, data_root: Path) -> int:
    """Save the model and a tokenizer trained on the data; return the number of parameters."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5_BASE)
    disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    files = [str(file) for file in sorted(data_root.rglob("train.jsonl"))]
    trainer = trainers.UnigramTrainer(vocab_size=1000, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train(files, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def run_stage(recipe: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run `mpt fit` in a separate process; return its seconds and its peak memory."""
    command = [
        str(Path(sys.executable).with_name("mpt")), "fit", "--config", f"mpt/{recipe}", "--config", "trainer/cpu",
        *(["--data", "super_glue/boolq"] if recipe == "target" else []),
        "--model.backbone", str(folder / "backbone"), "--model.warmup_steps", "0",
        "--data.data_root", str(options.data_root), "--data.cache_dir", str(folder / "cache"),
        "--data.batch_size", str(options.batch_size), "--data.max_input_length", "64",
        "--trainer.max_steps", str(options.steps), "--trainer.max_epochs", "-1",
        "--trainer.limit_val_batches", "1", "--trainer.val_check_interval", str(options.steps),
        "--trainer.check_val_every_n_epoch", "null", "--trainer.num_sanity_val_steps", "0",
        "--trainer.enable_progress_bar", "false", "--trainer.callbacks+", "t5_base.StepSeconds",
    ]  # fmt: skip
    times, log = folder / f"{recipe}.json", folder / f"{recipe}.log"
    environment = os.environ | {
        "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": str(options.threads), "STEP_SECONDS": str(times),
    }  # fmt: skip
    begin = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{log.read_text(encoding='utf-8')[-3000:]}")
    steps = json.loads(times.read_text(encoding="utf-8"))
    return {
        "stage": recipe,
        "seconds": time.perf_counter() - begin,
        "seconds_per_step": median(steps[1:] or steps),
        "peak_mib": usage.ru_maxrss / (MIB if sys.platform == "darwin" else 1024),
    }


def inspect(file: Path) -> dict[str, Any]:
    """Return the trained parameters of a checkpoint, and its bytes by purpose."""
    content = torch.load(file, map_location="cpu", weights_only=True)
    prompts = list(content["state_dict"].values())
    moments = [
        value
        for optimizer in content["optimizer_states"]
        for state in optimizer["state"].values()
        for value in state.values()
        if torch.is_tensor(value)
    ]
    tensors, adam = (sum(value.nbytes for value in values) for values in (prompts, moments))
    size = file.stat().st_size
    return {
        "trained": sum(value.numel() for value in prompts),
        "bytes": size,
        "prompt_bytes": tensors,
        "optimizer_bytes": adam,
        "other_bytes": size - tensors - adam,
    }


def show(rows: list[dict[str, Any]], parameters: int, options: argparse.Namespace) -> None:
    table = Table(
        title=f"T5 of t5-base's shape: {parameters / 1e6:.1f} million parameters, P=100",
        caption=f"B={options.batch_size}, at most 64 input tokens, {options.steps} steps, fp32, {options.threads} CPU "
        "threads; the whole run includes start-up, data, steps, one validation and the checkpoint",
    )
    for column in ("stage", "trained", "paper", "s / step", "s in total", "peak MiB", "checkpoint", "prompt", "Adam",
                   "rest"):  # fmt: skip
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in rows:
        table.add_row(
            row["stage"], f"{row['trained']:,}", f"{row['paper']:,}", f"{row['seconds_per_step']:.2f}",
            f"{row['seconds']:.0f}", f"{row['peak_mib']:,.0f}", f"{row['bytes']:,}", f"{row['prompt_bytes']:,}",
            f"{row['optimizer_bytes']:,}", f"{row['other_bytes']:,}",
        )  # fmt: skip
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="The three stages on a random T5 of t5-base's shape.")
    parser.add_argument("--steps", type=int, default=3, help="training steps per stage (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="rows per batch (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--data-root", type=Path, default=FIXTURES, help="JSONL data in the Hub's layout")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "t5_base.json", help="JSON file")
    options = parser.parse_args()
    options.data_root = options.data_root.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = save_backbone(folder / "backbone", options.data_root)
        rows = []
        for recipe, paper in STAGES.items():
            row = run_stage(recipe, folder, options)
            rows.append(row | {"paper": paper} | inspect(folder / "runs" / "mpt" / recipe / "best.ckpt"))
    show(rows, parameters, options)
    setting = {"steps": options.steps, "batch_size": options.batch_size, "threads": options.threads}
    result = {"parameters": parameters, **setting, "torch": torch.__version__, "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
