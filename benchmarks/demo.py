"""The demo's rates, and reasons for its results, on two source tasks that the source runs have not seen.

    python benchmarks/demo.py [--only rates source start task_rate distillation shots agreement]

Every score is on validation rows of the demo's source tasks, so that no row of a held-out task and no test row chooses
a setting. Every run is stored in the folder of `--output`, and is not repeated if the benchmark starts again.
"""

import argparse
import json
import logging
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, combinations
from operator import eq
from pathlib import Path
from typing import Any, cast

import datasets
import lightning.pytorch as L
import torch
import transformers
from measure import RESULTS, environment
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mpt_lightning import MPTSource, MPTTarget, MultitaskDataModule, MultitaskPrompt
from mpt_lightning.backbones import Backbone
from mpt_lightning.checkpoint import read_checkpoint
from mpt_lightning.demo.methods import FEW_SHOT, METHODS, run
from mpt_lightning.resources import T5

# The tasks of the few-shot runs; sources are trained on the others.
NEW = ("demo/sentiment", "demo/entailment")
SEEN = ("demo/acceptability", "demo/paraphrase", "demo/question")
SEEDS, SHOTS, STEPS, STAGE_STEPS = (0, 1, 2), 16, 40, 100
LRS = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0)
MPT_LRS = tuple((shared, task) for shared in (0.03, 0.1, 0.3) for task in (0.003, 0.03))
# The rates of sources and targets in all parts but those that change them.
RATES = {"shared_lr": 0.3, "task_lr": 0.02}
TASK_LRS = (0.02, 0.003, 0.3)
WEIGHTS = ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0))
# A line of a table: its label, and by column the values of its runs, in the same order for all lines.
Line = tuple[str, dict[str, list[float]]]


class MeanOfMatrices(MPTTarget):
    """A target that starts from P* times the mean of the source tasks' matrices, with its own factors near one."""

    def build_prompt(self, backbone: Backbone) -> MultitaskPrompt:
        """Build the target's prompt from the source's."""
        source = self._read_source().prompt()
        assert isinstance(source, MultitaskPrompt)
        prompt = MultitaskPrompt.from_source(source, self.tasks, "shared")
        prompt.initialize(source(torch.arange(source.num_tasks)).embeddings.mean(dim=0))
        return prompt


METHODS["mpt_matrices"] = replace(FEW_SHOT["mpt"], module=partial(MeanOfMatrices, T5, warmup_steps=5))


class Runs:
    """Runs whose results are stored."""

    def __init__(self, output: Path) -> None:
        self.output, self.file = output, output / "runs.jsonl"
        output.mkdir(parents=True, exist_ok=True)
        rows = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        self.known = {json.dumps(row["run"], sort_keys=True): row["scores"] for row in rows}

    def get(self, method: str, tasks: tuple[str, ...], **options: Any) -> dict[str, float]:
        """Return the validation score of each task; `checkpoint`, `source` and `teachers` are names of files."""
        description = {"method": method, "tasks": list(tasks), **options}
        key = json.dumps(description, sort_keys=True)
        if key not in self.known:
            for name in {"checkpoint", "source", "teachers"} & set(options):
                path = self.output / options[name]
                options[name] = path if name == "checkpoint" else str(path)
            results = run(method, tasks, output=self.output, split="validation", **options)
            self.known[key] = {result.task: result.value for result in results}
            with self.file.open("a") as file:
                file.write(json.dumps({"run": description, "scores": self.known[key]}) + "\n")
            print(key, self.known[key], results[0].seconds, flush=True)
        return self.known[key]

    def source(self, seed: int, over: str = "choices", **options: Any) -> tuple[str, list[float]]:
        """Return the checkpoint of a source run and its scores on the tasks that it has seen."""
        common: dict[str, Any] = {"k": None, "seed": seed, "steps": STAGE_STEPS, "over": over}
        teachers = f"teachers-{over}-{seed}.ckpt"
        self.get("teacher", SEEN, checkpoint=teachers, **common)
        name = "-".join(["source", over, *(f"{option}{value}" for option, value in options.items()), f"{seed}.ckpt"])
        common |= RATES | options
        return name, list(self.get("mpt_source", SEEN, checkpoint=name, teachers=teachers, **common).values())

    def few_shot(self, method: str, k: int = SHOTS, steps: int | None = STEPS, **options: Any) -> list[float]:
        """Return the scores of the new tasks; the n-th seed starts from the n-th source if `source` has them."""
        sources = options.pop("source", None)
        scores = []
        for seed in SEEDS:
            given = {} if sources is None else {**RATES, "source": sources[seed]}
            for task in NEW:
                found = self.get(method, (task,), **{"k": k, "seed": seed, "steps": steps, **given, **options})
                scores.append(found[task])
        return scores

    def transfer(self, **options: Any) -> dict[str, list[float]]:
        """Return the scores of source runs on the tasks that they have seen, and those of new tasks from them."""
        sources = [self.source(seed, **options) for seed in SEEDS]
        scores = self.few_shot("mpt", source=[name for name, _ in sources], over="choices")
        return {"source tasks": [score for _, scores in sources for score in scores], "new tasks": scores}


def paired(lines: Iterable[Line]) -> Iterator[Line]:
    """Add to each line the differences of its scores to those of the first line, on the same tasks and seeds."""
    first: dict[str, list[float]] | None = None
    for labels, columns in lines:
        first = first or columns
        differences = {f"{name}: difference": subtract(columns[name], first[name]) for name in columns}
        yield labels, columns | ({} if columns is first else differences)


def subtract(ours: list[float], theirs: list[float]) -> list[float]:
    return [one - other for one, other in zip(ours, theirs, strict=True)]


def rates(runs: Runs) -> Iterator[Line]:
    for lr in LRS:
        yield f"prompt tuning, {lr}", {"new tasks": runs.few_shot("prompt_tuning", lr=lr, over="choices")}
    sources = [runs.source(seed)[0] for seed in SEEDS]
    for shared, task in MPT_LRS:
        scores = runs.few_shot("mpt", source=sources, shared_lr=shared, task_lr=task, over="choices")
        yield f"MPT, {shared} and {task}", {"new tasks": scores}


def source(runs: Runs) -> Iterator[Line]:
    for over in ("choices", "vocabulary"):
        yield over, runs.transfer(over=over)


def start(runs: Runs) -> Iterator[Line]:
    common: dict[str, Any] = {"source": [runs.source(seed)[0] for seed in SEEDS], "over": "choices"}
    yield "mean of u times mean of v", {"new tasks": runs.few_shot("mpt", **common)}
    yield "mean of the matrices", {"new tasks": runs.few_shot("mpt_matrices", **common)}
    yield "P* alone", {"new tasks": runs.few_shot("mpt", start="shared", **common)}
    del common["source"]
    yield "prompt tuning", {"new tasks": runs.few_shot("prompt_tuning", lr=RATES["shared_lr"], **common)}


def task_rate(runs: Runs) -> Iterator[Line]:
    for lr in TASK_LRS:
        yield f"{lr}", runs.transfer(**({} if lr == RATES["task_lr"] else {"task_lr": lr}))


def distillation(runs: Runs) -> Iterator[Line]:
    for logits, hidden in WEIGHTS:
        options = {} if logits == hidden == 1 else {"logits_weight": logits, "hidden_weight": hidden}
        yield f"logits {logits:g}, hidden states {hidden:g}", runs.transfer(**options)


def shots(runs: Runs) -> Iterator[Line]:
    for over, steps in (("choices", STEPS), ("vocabulary", STEPS), ("vocabulary", 3 * STEPS)):
        few, more = (
            runs.few_shot("prompt_tuning", k=k, steps=steps, over=over, lr=RATES["shared_lr"])
            for k in (SHOTS, 2 * SHOTS)
        )
        yield f"{over}, {steps} steps", {"k = 16": few, "k = 32": more, "difference": subtract(more, few)}


def agreement(runs: Runs) -> Iterator[Line]:
    """Compare the source runs in pairs: cosines of their prompts, and how often they predict the same answer."""
    paths = [str(runs.output / runs.source(seed)[0]) for seed in SEEDS]
    prompts = [cast(MultitaskPrompt, read_checkpoint(path).prompt()) for path in paths]
    data = MultitaskDataModule(list(SEEN), eval_batch_size=100, predict_split="validation", cache_dir=str(runs.output))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    answers, right = [], []
    for path in paths:
        batches = trainer.predict(MPTSource.load_from_checkpoint(path), data)
        rows = list(chain.from_iterable(chain.from_iterable(batches)))
        answers.append([row["prediction"] for row in rows])
        right.append(statistics.fmean(row["prediction"] in row["gold"] for row in rows))

    def cosines(tensors: list[Tensor]) -> list[float]:
        return [float(cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in combinations(tensors, 2)]

    folded = [prompt(torch.arange(len(SEEN))).embeddings.detach() for prompt in prompts]
    yield "cosine of P*", {"pairs": cosines([prompt.prompt_embeddings.detach() for prompt in prompts])}
    for number, task in enumerate(SEEN):
        yield f"cosine of the prompts of {task}", {"pairs": cosines([found[number] for found in folded])}
    within = [statistics.fmean(cosines(list(found))) for found in folded]
    yield "cosine of the tasks' prompts within a run", {"pairs": within}
    same = [statistics.fmean(map(eq, one, other)) for one, other in combinations(answers, 2)]
    yield "same answer on validation rows", {"pairs": same}
    yield "right answer on validation rows", {"pairs": right}


PARTS: dict[str, Callable[[Runs], Iterator[Line]]] = {
    "rates": rates, "source": lambda runs: paired(source(runs)),
    "start": lambda runs: paired(start(runs)), "task_rate": lambda runs: paired(task_rate(runs)),
    "distillation": lambda runs: paired(distillation(runs)), "shots": shots, "agreement": agreement,
}  # fmt: skip


def show(title: str, lines: list[Line]) -> None:
    """Print means times 100, and of differences also the standard error."""
    table = Table(title=title)
    table.add_column("")
    for name in lines[-1][1]:
        table.add_column(name, justify="right")
    for label, columns in lines:
        cells = []
        for name, values in columns.items():
            mean, error = 100 * statistics.fmean(values), 100 * statistics.stdev(values) / len(values) ** 0.5
            cells.append(f"{mean:+.1f} ± {error:.1f}" if "difference" in name else f"{mean:.1f}")
        table.add_row(label, *cells)
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo's rates, and reasons for its results.")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts (default: all)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo_settings"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    silence()
    runs, file = Runs(options.output), RESULTS / "demo.json"
    # The results of parts that are not run stay in the file.
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for part in options.only:
        lines = list(PARTS[part](runs))
        show(part, lines)
        rounded = {label: {name: [round(value, 4) for value in v] for name, v in c.items()} for label, c in lines}
        results |= {part: rounded, "environment": environment(1, len(SEEDS))}
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def silence() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


if __name__ == "__main__":
    main()
