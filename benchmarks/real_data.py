"""Multitask prompt tuning on real data with a very small pretrained model: three stages, two methods, three seeds.

    OMP_NUM_THREADS=1 python benchmarks/real_data.py --data-root DATA --backbone FOLDER_OR_HUB_ID --wording plain

1. `PromptTuning` trains the teachers on six source tasks in one run.
2. `MPTSource` is distilled from the teachers.
3. `MPTTarget`, and `PromptTuning` from scratch, are trained on every target task, with k rows and with all rows.
The baseline is the majority class of the training rows. Learning rates are chosen by the same search for both methods,
on validation rows (`choose_rate`); test rows are evaluated once, after the last step. Every finished run is a line of
`<output>/runs.jsonl`, so the same command resumes after an interruption.
"""

import argparse
import json
import logging
import platform
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as L
import torch
import transformers
from rich.console import Console
from rich.table import Column, Table

from mpt_lightning import MPTSource, MPTTarget, MultitaskDataModule, PromptTuning, load_task
from mpt_lightning.data import PromptDataModule, load_card
from mpt_lightning.modules import PromptModule

SOURCES = ["glue/sst2", "glue/qqp", "glue/qnli", "glue/cola", "glue/stsb", "glue/mrpc"]
TARGETS = ["rotten_tomatoes", "glue/rte", "sick", "super_glue/wic"]
METHODS = ["mpt", "prompt_tuning"]
# Inputs and answers for a model pretrained on children's stories only: no task names, a cue before the answer, and
# short words. The shipped cards have T5's wording ("rotten_tomatoes text: ...", "not entailment").
PLAIN: dict[str, dict[str, Any]] = {
    "glue/sst2": {"input": "{sentence} it is", "choices": ["bad", "good"]},
    "glue/qqp": {"input": "{question1} {question2} same?", "choices": ["no", "yes"]},
    "glue/qnli": {"input": "{question} {sentence} answer?", "choices": ["yes", "no"]},
    "glue/cola": {"input": "{sentence} this is", "choices": ["wrong", "right"]},
    "glue/stsb": {"input": "{sentence1} {sentence2} same:"},
    "glue/mrpc": {"input": "{sentence1} {sentence2} same?", "choices": ["no", "yes"]},
    "rotten_tomatoes": {"input": "{text} it is", "choices": ["bad", "good"]},
    "glue/rte": {"input": "{sentence1} {sentence2} true?", "choices": ["yes", "no"]},
    "sick": {"input": "{sentence_A} {sentence_B} true?", "choices": ["yes", "maybe", "no"]},
    "super_glue/wic": {"input": "{word}. {sentence1} {sentence2} same?", "choices": ["no", "yes"]},
}
# Settings that all results depend on. k is the number of rows per task; the paper does not state whether classes are
# balanced. All trained tensors have a linear schedule and the same warm-up.
SETTINGS: dict[str, Any] = {
    "prompt_length": 20,
    "max_input_length": 128,
    "warmup_steps": 20,
    "sampling": "temperature",
    "source": {"teacher_steps": 1500, "source_steps": 1000, "batch_size": 32},
    "few": {"shots": [16, 32], "shots_per": "task", "steps": 150, "batch_size": 16},
    "full": {"steps": 300, "batch_size": 32},
    "seeds": [0, 1, 2],
    "max_test_rows": 1000,
    # For MPT, the learning rate of the shared prompt; that of the task factors is 4/3 of it, the paper's ratio.
    "rates": [0.03, 0.1, 0.3],
    "search": {"tasks": ["rotten_tomatoes", "sick"], "seed": 100, "shots": 32, "full_steps": 200, "max_rows": 1000},
}


class Runs:
    """The finished runs, stored on disk so that they are not repeated.

    Args:
        file: JSON lines; the first contains the settings.
        settings: The settings that all runs depend on; a file with other settings is an error.
    """

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file = file
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(settings) + "\n")
        first, *self.rows = [json.loads(line) for line in file.read_text().splitlines()]
        if first != settings:
            raise SystemExit(f"{file} was written with other settings. Choose another --output, or delete the file.")

    def once(self, key: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the row that contains `key` from the file, or run it and store its row."""
        for row in self.rows:
            if key.items() <= row.items():
                return row
        row = key | run()
        self.rows.append(row)
        with self.file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        return row


def trainer(steps: int = -1) -> L.Trainer:
    """Return a Trainer without logging, validation and checkpoints."""
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    validation = {"limit_val_batches": 0} if steps > 0 else {}
    options = {"max_steps": steps, "max_epochs": -1, "gradient_clip_val": 1.0}
    return L.Trainer(accelerator="cpu", devices=1, **options, **quiet, **validation)


def fit(module: PromptModule, data: PromptDataModule, steps: int) -> tuple[L.Trainer, dict[str, float]]:
    """Train, and return the Trainer and the costs: trained parameters, wall seconds and CPU seconds."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    fitted = trainer(steps)
    fitted.fit(module, data)
    seconds = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - begin_cpu}
    trained = sum(value.numel() for value in module.parameters() if value.requires_grad)
    return fitted, {"trained_parameters": trained, **{name: round(value, 2) for name, value in seconds.items()}}


class Benchmark:
    """The stages of the benchmark, one method each.

    Args:
        backbone: Hub id or folder of the frozen model.
        data_root: Folder that replaces the Hub, or None.
        output: Folder of the runs and checkpoints.
        wording: "card" for the shipped cards, "plain" for `PLAIN`.
    """

    def __init__(self, backbone: str, data_root: str | None, output: Path, wording: str = "card") -> None:
        self.backbone, self.output = backbone, output
        self.settings = {"backbone": backbone, "wording": wording, **SETTINGS}
        self.runs = Runs(output / "runs.jsonl", self.settings)
        self.cards = {
            task: replace(load_card(task), **(PLAIN[task] if wording == "plain" else {})) for task in SOURCES + TARGETS
        }
        self.model = {"backbone": backbone, "warmup_steps": SETTINGS["warmup_steps"]}
        self.length = {"prompt_length": SETTINGS["prompt_length"]}
        self.data = {"data_root": data_root, "max_input_length": SETTINGS["max_input_length"], "eval_batch_size": 128}

    def stage(self, name: str, make: Callable[[], PromptModule], steps: int) -> str:
        """Train a stage on the source tasks, and return the path of its checkpoint."""
        path = self.output / f"{name}.ckpt"

        def run() -> dict[str, Any]:
            size, rows = SETTINGS["source"]["batch_size"], SETTINGS["search"]["max_rows"]
            L.seed_everything(0, verbose=False)
            options = {"sampling": SETTINGS["sampling"], "batch_size": size, "max_eval_rows": rows, **self.data}
            data = MultitaskDataModule([self.cards[task] for task in SOURCES], **options)
            module = make()
            fitted, cost = fit(module, data, steps)
            fitted.save_checkpoint(path)
            results = trainer().validate(module, data, verbose=False)
            return {"scores": {key: round(value, 4) for scores in results for key, value in scores.items()}, **cost}

        self.runs.once({"stage": name, "steps": steps}, run)
        return str(path)

    def learn(self, method: str, task: str, k: int | str, seed: int, rate: float, search: bool) -> dict[str, Any]:
        """Train on a target task and evaluate the last step: on validation rows in the search, else on test rows."""
        regime = SETTINGS["full" if k == "full" else "few"]
        steps = SETTINGS["search"]["full_steps"] if search and k == "full" else regime["steps"]
        few = {"group_by_length": True} if k == "full" else {"k_shot": k, "shots_per": regime["shots_per"]}
        rows = SETTINGS["search"]["max_rows"] if search else SETTINGS["max_test_rows"]
        options = {"batch_size": regime["batch_size"], "max_eval_rows": rows, **few, **self.data}
        data = load_task(self.cards[task], seed=seed, **options)
        L.seed_everything(seed, verbose=False)
        module: PromptModule
        if method == "mpt":
            source = str(self.output / "source.ckpt")
            module = MPTTarget(source=source, shared_lr=rate, task_lr=rate * 4 / 3, **self.model)
        else:
            module = PromptTuning(lr=rate, **self.model, **self.length)
        _, cost = fit(module, data, steps)
        evaluate = trainer().validate if search else trainer().test
        (scores,) = evaluate(module, data, verbose=False)
        return {"accuracy": round(scores[f"{'val' if search else 'test'}/{task}/accuracy"], 4), **cost}

    def choose_rate(self, method: str, k: int | str) -> float:
        """Return the learning rate with the best mean validation accuracy over the search's tasks, one seed each."""
        search, means = SETTINGS["search"], {}
        for rate in SETTINGS["rates"]:
            found = []
            for task in search["tasks"]:
                key = {"stage": "search", "method": method, "task": task, "k": k, "rate": rate}
                run = (method, task, k, search["seed"], rate, True)
                found.append(self.runs.once(key, lambda run=run: self.learn(*run))["accuracy"])
            means[rate] = statistics.mean(found)
        return max(means, key=lambda rate: means[rate])

    def majority(self, task: str, k: int | str, seed: int) -> dict[str, Any]:
        """Return the test accuracy of always predicting the most frequent class of the training rows."""
        few = {} if k == "full" else {"k_shot": k, "shots_per": SETTINGS["few"]["shots_per"]}
        options = {"backbone": self.backbone, **self.data}
        train = load_task(self.cards[task], predict_split="train", seed=seed, **few, **options)
        test = load_task(self.cards[task], max_eval_rows=SETTINGS["max_test_rows"], **options)
        train.setup("predict")
        test.setup("test")
        ((common, _),) = Counter(golds(train.predict_dataloader())).most_common(1)
        return {"accuracy": statistics.mean(gold == common for gold in golds(test.test_dataloader()))}

    def run(self) -> list[dict[str, Any]]:
        """Run everything that is not in the file of finished runs, and return the rows of the target tasks."""
        # Teachers and source use the best learning rate of prompt tuning with all rows.
        rates = {("prompt_tuning", "full"): self.choose_rate("prompt_tuning", "full")}
        lr, steps = rates["prompt_tuning", "full"], SETTINGS["source"]
        options = {**self.model, **self.length, "max_new_tokens": 8}
        teachers = self.stage("teachers", lambda: PromptTuning(lr=lr, **options), steps["teacher_steps"])
        self.stage(
            "source",
            lambda: MPTSource(teachers=teachers, shared_lr=lr, task_lr=lr * 4 / 3, **options),
            steps["source_steps"],
        )
        shots = SETTINGS["search"]["shots"]
        rates |= {(method, "few"): self.choose_rate(method, shots) for method in METHODS}
        rates["mpt", "full"] = self.choose_rate("mpt", "full")
        rows = []
        for seed in SETTINGS["seeds"]:
            for k in [*SETTINGS["few"]["shots"], "full"]:
                for task in TARGETS:
                    where = {"stage": "target", "task": task, "k": k, "seed": seed}
                    key = {**where, "method": "majority"}
                    rows.append(self.runs.once(key, lambda at=(task, k, seed): self.majority(*at)))
                    for method in METHODS:
                        rate = rates[method, "full" if k == "full" else "few"]
                        run = (method, task, k, seed, rate, False)
                        key = {**where, "method": method, "rate": rate}
                        rows.append(self.runs.once(key, lambda run=run: self.learn(*run)))
        return rows


def golds(loaders: list[Any]) -> list[str]:
    """Return the gold answers of a task, row by row."""
    return [answers[0] for batch in loaders[0] for answers in batch["references"]]


def summary(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the table: a line per task and k with each method's mean and deviation over seeds, and the means."""

    def cell(chosen: list[dict[str, Any]]) -> str:
        values = [100 * row["accuracy"] for row in chosen]
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"

    lines, methods = [], [*METHODS, "majority"]
    for k in [*SETTINGS["few"]["shots"], "full"]:
        for task in TARGETS:
            of = {m: [r for r in rows if (r["method"], r["task"], r["k"]) == (m, task, k)] for m in methods}
            seconds = [f"{statistics.mean(row['cpu_seconds'] for row in of[method]):.0f}" for method in METHODS]
            lines.append([task, str(k), *(cell(chosen) for chosen in of.values()), " / ".join(seconds)])
        means = [[100 * r["accuracy"] for r in rows if (r["method"], r["k"]) == (m, k)] for m in methods]
        lines.append(["mean", str(k), *(f"{statistics.mean(values):.1f}" for values in means), ""])
    return lines


def main() -> None:
    """Run the benchmark, and print and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="Hub id or folder of the frozen model")
    parser.add_argument("--data-root", help="folder that replaces the Hub (default: the Hub)")
    parser.add_argument("--wording", choices=["card", "plain"], default="card", help="wording of inputs and answers")
    parser.add_argument("--output", type=Path, default=Path("runs/real_data"), help="folder of runs and checkpoints")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "real_data.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()

    benchmark = Benchmark(args.backbone, args.data_root, args.output, args.wording)
    rows = benchmark.run()
    columns = ["task", "k", "MPT", "prompt tuning", "majority", "CPU seconds (MPT / PT)"]
    lines = summary(rows)
    headers = [Column(name, no_wrap=name == "task") for name in columns]
    table = Table(*headers, title=f"Test accuracy, %, mean ± deviation of {len(SETTINGS['seeds'])} seeds")
    for line in lines:
        table.add_row(*line, style="bold" if line[0] == "mean" else None, end_section=line[0] == "mean")
    Console().print(table)
    print("\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *lines]))
    versions = {module.__name__: module.__version__ for module in (torch, L, transformers, datasets)}
    environment = {"python": platform.python_version(), "machine": platform.machine(), "threads": 1, **versions}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": benchmark.settings, "rows": benchmark.runs.rows, "environment": environment}
    args.results.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
