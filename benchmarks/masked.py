"""Methods on a pretrained masked language model and real data: zero-shot, and trained on 16 and on 32 rows.

    python benchmarks/masked.py --backbone FOLDER_OR_HUB_ID --data-root DATA

1. Each method's learning rate: of three, the one with the best mean score on validation rows of `SEARCH`, three of the
   source tasks, with 32 training rows and one seed.
2. Teachers (`PromptTuning`) and the source (`MPTSource`) on the source tasks.
3. Every method on every target task with three seeds. The last step is evaluated, so that nothing is selected. SST-2,
   a source task, is a target of the methods without a source only.

The runs are those of `mpt compare`, and the same command resumes after an interruption.
"""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from mpt_lightning import load_task
from mpt_lightning.compare.plan import AVERAGE, Comparison, Method, Recipe
from mpt_lightning.compare.report import Report
from mpt_lightning.compare.results import Store
from mpt_lightning.compare.run import run_all
from mpt_lightning.errors import MPTError

SOURCES = ["glue/sst2", "glue/qnli", "glue/qqp", "glue/mrpc", "glue/cola", "glue/stsb"]
SEARCH = ["glue/sst2", "glue/mrpc", "glue/qnli"]
TARGETS = [
    "rotten_tomatoes", "sick", "glue/rte", "super_glue/wic", "super_glue/boolq", "super_glue/cb",
]  # fmt: skip
LARGEST_K = {"super_glue/cb": 16}  # its rarest class has five training rows
ALONE = ["glue/sst2"]  # evaluated without MPT, whose source has seen it
SHOTS, SEEDS, SEARCH_SEED = [16, 32], [0, 1, 2], 100
STEPS, SOURCE_STEPS = 60, 600
# glibc returns large blocks to the system, and half of a step on a CPU is then spent on getting them back.
MEMORY = dict.fromkeys(["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"], str(2**32))


@dataclass(frozen=True)
class Candidate:
    """A method without its learning rate; `rates` are the rates to choose from, `names` the arguments to set."""

    recipe: str
    rates: list[float]
    names: tuple[str, ...] = ("model.lr",)
    arguments: dict[str, Any] = field(default_factory=dict)

    def method(self, rate: float) -> Method:
        """Return the method with a rate."""
        return Method(self.recipe, {**self.arguments, **dict.fromkeys(self.names, rate)})


CANDIDATES = {
    "prompt_tuning": Candidate("baselines/prompt_tuning", [0.003, 0.01, 0.03]),
    "lora": Candidate("masked/lora", [5e-4, 1.5e-3, 5e-3]),
    "fine_tuning": Candidate("masked/fine_tuning", [3e-5, 1e-4, 3e-4]),
    "fine_tuning_head": Candidate(
        "masked/fine_tuning", [3e-5, 1e-4, 3e-4], arguments={"model.head": "classification"}
    ),
    "mpt": Candidate(
        "masked/mpt_target", [0.003, 0.01, 0.03], ("model.shared_lr", "model.task_lr"), {"model.source": "$source"}
    ),
}  # fmt: skip


class Benchmark:
    """The comparisons, whose results are in one folder.

    Args:
        backbone: Hub id or folder of the masked model.
        data_root: Folder that replaces the Hub, or None.
        output: Folder of the results.
        jobs: Number of processes.
    """

    def __init__(self, backbone: str, data_root: str | None, output: Path, jobs: int) -> None:
        self.backbone, self.store, self.jobs = backbone, Store(output, "masked"), jobs
        self.console = Console(width=200)
        self.data = {"data.data_root": data_root, "data.max_input_length": 128, "data.max_eval_rows": 400}
        common = {
            **self.data,
            "data.eval_batch_size": 64,
            "model.backbone": backbone,
            "trainer.accelerator": "cpu",
            "trainer.gradient_clip_val": 1.0,
        }
        self.few = {
            **common,
            "data.seed": "$seed",
            "data.batch_size": 8,
            "model.warmup_steps": STEPS // 10,
            "trainer.max_steps": STEPS,
            "trainer.val_check_interval": STEPS,
        }
        self.source = {
            **common,
            "data.tasks": SOURCES,
            "data.batch_size": 16,
            "model.prompt_length": 16,  # that of the baselines' recipe
            "model.warmup_steps": SOURCE_STEPS // 10,
            "trainer.max_steps": SOURCE_STEPS,
            "trainer.max_epochs": -1,
            "trainer.val_check_interval": SOURCE_STEPS,
            "trainer.check_val_every_n_epoch": None,
        }

    def prepare(self, rate: float) -> dict[str, Recipe]:
        """Return the teachers and the source, trained with prompt tuning's rate."""
        source = {"model.shared_lr": rate, "model.task_lr": rate, "model.teachers": "$teachers"}
        return {
            "teachers": Recipe("masked/prompt_tuning", {**self.source, "model.lr": rate}),
            "source": Recipe("masked/mpt_source", {**self.source, **source}),
        }

    def compare(self, tasks: list[str], methods: dict[str, Method], **options: Any) -> Report:
        """Run a comparison, and return its results.

        Raises:
            MPTError: If a run failed.
        """
        few = {"data.k_shot": "$k", "data.shots_per": "balanced"}
        comparison = Comparison(tasks, methods=methods, few_shot_arguments=few, name="masked", **options)
        run_all(comparison, self.store, self.console, self.jobs)
        report = Report(comparison, self.store)
        if report.failures:
            run, error = report.failures[0]
            raise MPTError(f"{run.place}: {error}")
        return report

    def choose_rates(self, names: list[str], **options: Any) -> tuple[dict[str, float], pd.DataFrame]:
        """Return the best rate of each method, and the scores of all rates on `SEARCH`."""
        methods = {f"{name}-{rate}": CANDIDATES[name].method(rate) for name in names for rate in CANDIDATES[name].rates}
        options |= {"shots": [max(SHOTS)], "seeds": [SEARCH_SEED], "metric": "val/average", "arguments": self.few}
        scores = self.compare(SEARCH, methods, **options).scores
        means = scores["mean"].xs(AVERAGE, level="task").droplevel("k")
        return {name: max(CANDIDATES[name].rates, key=lambda rate: means[f"{name}-{rate}"]) for name in names}, scores

    def run(self) -> tuple[pd.DataFrame, list[Report]]:
        """Run everything that has no result, and return the search's scores and the comparisons."""
        first, *others = CANDIDATES
        rates, search = self.choose_rates([first])
        prepare = self.prepare(rates[first])
        found, scores = self.choose_rates(others, prepare=prepare)
        rates |= found
        self.console.print("chosen rates:", rates)
        methods = {"hard_prompt": Method("masked/hard_prompt", shots=[0], seeds=[SEEDS[0]], fit=False)}
        methods |= {name: candidate.method(rates[name]) for name, candidate in CANDIDATES.items()}
        # One batch is validated, since a checkpoint needs a score; the only one is that of the last step.
        arguments = {**self.few, "trainer.limit_val_batches": 1}
        options = {"seeds": SEEDS, "metric": "$task/accuracy", "arguments": arguments}
        reports = []
        for k in SHOTS:
            tasks = [task for task in TARGETS if k <= LARGEST_K.get(task, k)]
            reports.append(self.compare(tasks, methods, prepare=prepare, shots=[k], **options))
        without = {name: method for name, method in methods.items() if name != "mpt"}
        reports.append(self.compare(ALONE, without, shots=SHOTS, **options))
        return pd.concat([search, scores]), reports

    def majority(self, task: str) -> float:
        """Return the accuracy of always answering the most frequent class of the test rows."""
        options = {name.removeprefix("data."): value for name, value in self.data.items()}
        data = load_task(task, backbone=self.backbone, **options)
        data.setup("test")
        (loader,) = data.test_dataloader()
        counts = Counter(answers[0] for batch in loader for answers in batch["references"])
        return max(counts.values()) / counts.total()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, and print and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="Hub id or folder of the masked model")
    parser.add_argument("--data-root", help="folder that replaces the Hub (default: the Hub)")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/masked/benchmark"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the tables")
    args = parser.parse_args(arguments)
    os.environ |= MEMORY
    benchmark = Benchmark(args.backbone, args.data_root, args.output, args.jobs)
    search, reports = benchmark.run()
    scores = pd.concat([report.scores for report in reports])
    args.results.mkdir(parents=True, exist_ok=True)
    search["mean"].to_csv(args.results / "masked_search.csv")
    columns = ["mean", "standard_deviation", "runs_done", "trained_parameters", "seconds_per_step", "seconds"]
    scores[~scores.index.duplicated()][columns].to_csv(args.results / "masked.csv")
    for report in reports:
        print(report.markdown())
    for task in [*TARGETS, *ALONE]:
        print(f"majority of the test rows, {task}: {100 * benchmark.majority(task):.1f}")


if __name__ == "__main__":
    main()
