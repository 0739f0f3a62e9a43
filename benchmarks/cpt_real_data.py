"""Context-aware prompt tuning on real data with a very small pretrained model: four methods, few shots, three draws.

    OMP_NUM_THREADS=1 python benchmarks/cpt_real_data.py --data-root DATA --backbone FOLDER_OR_HUB_ID

1. The wording of each kind of task is chosen by in-context learning on validation rows.
2. The learning rate and the ball of each method are chosen on validation rows of one task.
3. Every method runs once per task, k and draw; test rows are evaluated after the last step.
Every finished run is a line of `<output>/runs.jsonl`, so the same command resumes after an interruption.
"""

import argparse
import json
import logging
import platform
import statistics
import time
import warnings
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import datasets
import lightning.pytorch as L
import torch
import transformers
from real_data import Runs, golds, trainer
from rich.console import Console
from rich.table import Column, Table

from mpt_lightning import CPT, load_task
from mpt_lightning.data import TaskDataModule, load_card

Wording = dict[str, Any]

# Candidates for answer prefix and answers. All answers of a task have the same number of tokens, because ranking would
# favour a shorter one; the tokenizer splits " good" into a word mark and the word.
WORDINGS: dict[str, list[Wording]] = {
    "sentiment": [
        {"answer_prefix": "it was", "choices": ["bad", "good"]},
        {"answer_prefix": "it is", "choices": ["bad", "good"]},
        {"answer_prefix": "it was", "choices": ["sad", "fun"]},
        {"answer_prefix": "I am", "choices": ["sad", "happy"]},
        {"answer_prefix": "I feel", "choices": ["sad", "happy"]},
        {"answer_prefix": "so she was", "choices": ["sad", "happy"]},
    ],
    "entailment": [
        {"answer_prefix": "this is", "choices": ["right", "new", "bad"]},
        {"answer_prefix": "this is", "choices": ["good", "okay", "bad"]},
        {"answer_prefix": "it is", "choices": ["right", "other", "not"]},
        {"answer_prefix": "true:", "choices": ["right", "some", "not"]},
    ],
}
# Template, kind, k per class and the rows' maximum input length. Context and row share 512 positions: rows of
# rotten_tomatoes are cut to 32 tokens for every k, so that six rows of each of the two classes fit; the training rows
# of sst2 are short phrases. Pairs of sick cannot be cut that far, so only two rows of each of the three classes fit.
TASKS: dict[str, dict[str, Any]] = {
    "glue/sst2": {"kind": "sentiment", "input": "{sentence}", "max_input_length": 64, "shots": [2, 4, 6]},
    "rotten_tomatoes": {"kind": "sentiment", "input": "{text}", "max_input_length": 32, "shots": [2, 4, 6]},
    "sick": {"kind": "entailment", "input": "{sentence_A} {sentence_B}", "max_input_length": 64, "shots": [2]},
}
METRICS = ["accuracy", "macro_f1"]
FREE = {"epsilon": None, "template_epsilon": None}
# Radii as fractions of the norm of a token's embedding; the authors' radius is absolute, and much smaller here.
BALLS: dict[str, dict[str, Any]] = {
    str(share): {"epsilon": share, "template_epsilon": share / 2, "epsilon_scale": "embedding"}
    for share in (0.1, 0.3, 1.0)
}
AUTHORS = {"lr": 1e-4, "epsilon": 0.2, "template_epsilon": 0.1, "epsilon_scale": "width"}
VARIANTS = [f"{method} {bound}" for method in ("prompt_tuning", "instruction", "cpt") for bound in ("free", "ball")]
# Variants of "cpt ball", for the middle k only.
EXTRAS: dict[str, dict[str, Any]] = {
    "ball, weights": {"normalize": "weights"},
    "ball, leave-one-out": {"leave_one_out": True},
    "authors": AUTHORS,
}
Method = Literal["cpt", "prompt_tuning", "instruction", "icl"]
# Settings that all results depend on.
SETTINGS: dict[str, Any] = {
    "tasks": TASKS,
    "wordings": WORDINGS,
    "balls": BALLS,
    "rates": [1e-3, 1e-2, 3e-2, 1e-1],
    # All rows of a context are in every batch.
    "training": {"steps": 100, "warmup_steps": 10, "batch_size": 32},
    "seeds": [0, 1, 2],
    "max_rows": 400,
    "search": {
        "wording_tasks": {"sentiment": "glue/sst2", "entailment": "sick"},
        "wording_shots": 2,
        "wording_seeds": [100, 101, 102],
        "task": "glue/sst2",
        "seed": 100,
        "shots": 4,
    },
    "apart": {"shots": 2, "train_shots": 16, "variants": ["prompt_tuning free", "cpt ball"]},
}


class Benchmark:
    """The stages of the benchmark, one method each.

    Args:
        backbone: Hub id or folder of the frozen model.
        data_root: Folder that replaces the Hub, or None.
        output: Folder of the runs.
    """

    def __init__(self, backbone: str, data_root: str | None, output: Path) -> None:
        self.backbone, self.data_root = backbone, data_root
        self.settings = {"backbone": backbone, **SETTINGS}
        self.runs = Runs(output / "runs.jsonl", self.settings)
        self.wordings: dict[str, Wording] = {}

    def data(self, task: str, wording: Wording, k: int, seed: int, **options: Any) -> TaskDataModule:
        """Return a task's data, with k rows per class as its context."""
        card = replace(load_card(task), input=TASKS[task]["input"], choices=wording["choices"], metrics=METRICS)
        rows = {"max_input_length": TASKS[task]["max_input_length"], "max_eval_rows": SETTINGS["max_rows"]}
        sizes = {"batch_size": SETTINGS["training"]["batch_size"], "eval_batch_size": 100}
        shots = {"context_shots": k, "answer_prefix": wording["answer_prefix"], "seed": seed}
        return load_task(card, backbone=self.backbone, data_root=self.data_root, **rows, **sizes, **shots, **options)

    def learn(self, data: TaskDataModule, method: Method, split: str, **options: Any) -> dict[str, Any]:
        """Train, except for in-context learning, and evaluate the prompt of the last step."""
        begin, training, found = time.process_time(), SETTINGS["training"], {}
        L.seed_everything(data.seed, verbose=False)
        model = CPT(self.backbone, method=method, warmup_steps=training["warmup_steps"], **options)
        if method != "icl":
            fitted = trainer(training["steps"])
            fitted.fit(model, data)
            terms = {name: value.item() for name, value in fitted.callback_metrics.items()}
            found = {"train_loss": terms.get("train/row", terms["train/loss"]), "moved": moved(model.prompt)}
        evaluate = trainer().validate if split == "val" else trainer().test
        (scores,) = evaluate(model, data, verbose=False)
        found |= {name: scores[f"{split}/{data.tasks[0]}/{name}"] for name in [*METRICS, "loss"]}
        found["cpu_seconds"] = time.process_time() - begin
        return {"tokens": len(model.prompt.token_ids), **{name: round(value, 4) for name, value in found.items()}}

    def choose_wording(self, kind: str) -> Wording:
        """Return the wording with the best mean validation macro-F1 of in-context learning."""
        search = SETTINGS["search"]
        task, means = search["wording_tasks"][kind], []
        for wording in WORDINGS[kind]:
            found = []
            for seed in search["wording_seeds"]:
                key = {"stage": "wording", "task": task, **wording, "seed": seed}
                data = self.data(task, wording, search["wording_shots"], seed)
                found.append(self.runs.once(key, lambda data=data: self.learn(data, "icl", "val"))["macro_f1"])
            means.append(statistics.mean(found))
        return WORDINGS[kind][means.index(max(means))]

    def choose(self, variant: str) -> dict[str, Any]:
        """Return a variant's learning rate and ball with the best validation macro-F1; in a tie, the smallest loss."""
        search, (method, bound) = SETTINGS["search"], variant.split()
        task, found = search["task"], []
        for bounds, rate in product(BALLS.values() if bound == "ball" else [FREE], SETTINGS["rates"]):
            options = {"lr": rate, **bounds}
            key = {"stage": "search", "variant": variant, **options}
            data = self.data(task, self.wordings[task], search["shots"], search["seed"])
            row = self.runs.once(key, lambda run=(data, method, "val"), options=options: self.learn(*run, **options))
            found.append((row["macro_f1"], -row["loss"], options))
        return max(found, key=lambda one: one[:2])[2]

    def majority(self, task: str) -> dict[str, Any]:
        """Return the test accuracy of always predicting the most frequent class of the validation rows."""
        data = self.data(task, self.wordings[task], 2, 0)
        data.setup("validate")
        data.setup("test")
        ((common, _),) = Counter(golds(data.val_dataloader())).most_common(1)
        return {"accuracy": statistics.mean(gold == common for gold in golds(data.test_dataloader()))}

    def test(
        self, stage: str, task: str, variant: str, how: tuple[Method, dict[str, Any]], k: int, seed: int, **rows: Any
    ) -> dict[str, Any]:
        """Run a variant once and return its result on test rows."""
        method, options = how
        key = {"stage": stage, "task": task, "k": k, "seed": seed, "variant": variant, **options}
        data = self.data(task, self.wordings[task], k, seed, **rows)
        return self.runs.once(key, lambda: self.learn(data, method, "test", **options))

    def run(self) -> list[dict[str, Any]]:
        """Run everything that is not in the file of finished runs, and return the rows of the tables."""
        kinds = {kind: self.choose_wording(kind) for kind in WORDINGS}
        self.wordings = {task: kinds[options["kind"]] for task, options in TASKS.items()}
        variants: dict[str, tuple[Method, dict[str, Any]]] = {"icl": ("icl", {})}
        for variant in VARIANTS:
            variants[variant] = (variant.split()[0], self.choose(variant))
        for name, options in EXTRAS.items():
            variants[f"cpt {name}"] = ("cpt", {**variants["cpt ball"][1], **options})
        rows = []
        for task in TASKS:
            key = {"stage": "test", "task": task, "variant": "majority"}
            rows.append(self.runs.once(key, lambda task=task: self.majority(task)))
        for seed, (task, chosen) in product(SETTINGS["seeds"], TASKS.items()):
            shots = chosen["shots"]
            for k, variant in product(shots, variants):
                if variant[4:] not in EXTRAS or k == shots[len(shots) // 2]:
                    rows.append(self.test("test", task, variant, variants[variant], k, seed))
        apart = SETTINGS["apart"]
        others = {"context_rows": "apart", "k_shot": apart["train_shots"]}
        for seed, task, variant in product(SETTINGS["seeds"], TASKS, apart["variants"]):
            rows.append(self.test("apart", task, variant, variants[variant], apart["shots"], seed, **others))
        return rows


def moved(prompt: Any) -> float:
    """Return the mean distance of trained tokens from their embeddings, relative to the embeddings' norms."""
    share = (prompt.delta_embedding.detach() * prompt.moves).norm(dim=1) / prompt.embeddings.norm(dim=1)
    return share[prompt.moves[:, 0] > 0].mean().item()


def summary(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return a table: a line per variant with the test accuracy per task and k, mean and deviation over seeds."""
    columns = list(dict.fromkeys((row["task"], row["k"]) for row in rows if "k" in row))
    also = {"macro_f1": "macro-F1", "train_loss": "train loss", "moved": "moved", "cpu_seconds": "CPU s"}
    lines = [["", *(f"{task} {k}" for task, k in columns), "mean", *also.values()]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        line, means = [variant], []
        for task, k in columns:
            values = [100 * row["accuracy"] for row in own if row["task"] == task and row.get("k", k) == k]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            means += [statistics.mean(values)] if values else []
            line.append(f"{means[-1]:.1f}{spread}" if values else "")
        # The mean is shown only if all columns have a value.
        line.append(f"{statistics.mean(means):.1f}" if len(means) == len(columns) else "")
        for name in also:
            values = [row[name] * (100 if name == "macro_f1" else 1) for row in own if name in row]
            line.append(f"{statistics.mean(values):.2f}" if values else "")
        lines.append(line)
    return lines


def main() -> None:
    """Run the benchmark, and print and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="Hub id or folder of the frozen model")
    parser.add_argument("--data-root", help="folder that replaces the Hub (default: the Hub)")
    parser.add_argument("--output", type=Path, default=Path("runs/cpt_real_data"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "cpt_real_data.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()

    benchmark = Benchmark(args.backbone, args.data_root, args.output)
    rows = benchmark.run()
    for stage, title in {"test": "The context's rows are the training rows", "apart": "Other training rows"}.items():
        headers, *lines = summary([row for row in rows if row["stage"] == stage])
        table = Table(*(Column(name) for name in headers), title=f"{title}: test accuracy, %")
        for line in lines:
            table.add_row(*line)
        Console().print(table)
        print("\n".join(f"| {' | '.join(line)} |" for line in [headers, ["---"] * len(headers), *lines]))
    versions = {module.__name__: module.__version__ for module in (torch, L, transformers, datasets)}
    environment = {"python": platform.python_version(), "machine": platform.machine(), "threads": 1, **versions}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": benchmark.settings, "rows": benchmark.runs.rows, "environment": environment}
    args.results.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
