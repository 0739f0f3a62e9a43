"""Cheaper teachers on the demo's tasks: time per source step, and scores of the source and target tasks.

    python benchmarks/teachers.py [--threads 1] [--repeats 15] [--seeds 3] [--only steps scores]

Steps: groups of four source steps of the demo's size alternate with the same steps without teachers. Scores: for each
variant and seed, the demo's source training, initialised with the seed, and then every target task with 16 rows.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, Line, Step, alternate, environment, plain, show
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mpt_lightning import MPTSource, MultitaskDataModule, load_backbone
from mpt_lightning.compare.pool import WorkerPool
from mpt_lightning.compare.results import Result
from mpt_lightning.demo.methods import LENGTH, SOURCES, TARGETS, run
from mpt_lightning.demo.run import COLUMNS
from mpt_lightning.resources import T5

SHOTS, STEPS = 16, 4
NONE, AS_IS = "no teachers", "as is"
VARIANTS: dict[str, dict[str, Any]] = {
    NONE: {"logits_weight": 0.0, "hidden_weight": 0.0},
    AS_IS: {},
    "every 2nd step": {"teacher_every": 2},
    "every 4th step": {"teacher_every": 4},
    "every 4th step, terms count once": {"teacher_every": 4, "logits_weight": 0.25, "hidden_weight": 0.25},
    "cache, top-k 64": {"teacher_cache": "teachers"},
    "cache, top-k 1": {"teacher_cache": "teachers", "teacher_top_k": 1},
}


# -- steps ----------------------------------------------------------------------------------------------------------


class Stepped(MPTSource):
    """A module that counts its steps, since it has no Trainer."""

    step = 0

    @property
    def global_step(self) -> int:
        """Number of finished steps."""
        return self.step


def steps_of(batches: list[dict[str, Any]], **options: Any) -> Step:
    """Return a function that runs four optimizer steps, each on the next batch."""
    module = Stepped(T5, tasks=list(SOURCES), prompt_length=LENGTH, prompt_init="random", **options)
    module.backbone = load_backbone(T5)
    module.prompt = module.build_prompt(module.backbone)
    module.teacher_prompts = torch.randn(len(SOURCES), LENGTH, module.backbone.dim)
    module.train()
    optimizer, endless = torch.optim.AdamW(module.prompt.parameters(), lr=1e-3), cycle(batches)

    def run() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            module.losses(next(endless))["loss"].backward()
            optimizer.step()
            module.step += 1

    return run


def steps(repeats: int, folder: Path) -> Iterator[Line]:
    data = MultitaskDataModule(
        list(SOURCES), sampling="all", batch_size=24, backbone=T5, cache_dir=str(folder / "cache")
    )
    data.prepare_data()
    data.setup("fit")
    count = STEPS * (repeats + 2)  # so that no row is used twice
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(count), strict=False)]
    if len(batches) < count:
        raise ValueError(f"--repeats {repeats} needs {count} batches, and an epoch has {len(batches)}.")
    cache = str(folder / "teachers")
    measured: dict[str, dict[str, Any]] = {
        "as is": {},
        "every 2nd step": {"teacher_every": 2},
        "every 4th step": {"teacher_every": 4},
        "cache, top-k 64, first epoch": {"teacher_cache": cache},
        "cache, top-k 64, later epochs": {"teacher_cache": cache},
    }
    for name, options in measured.items():
        torch.manual_seed(0)  # the same teachers, so that later epochs use the cache
        ours = steps_of(batches, **options)
        theirs = steps_of(batches, **VARIANTS[NONE])
        times = alternate(ours, theirs, repeats, name)
        yield Line(f"{STEPS} source steps, {name}", NONE, None, False, *times)


# -- scores ---------------------------------------------------------------------------------------------------------


def source(variant: str, seed: int, teachers: str, folder: Path) -> tuple[str, list[Result]]:
    """Train a source prompt; return the checkpoint's path and the test results of the source tasks."""
    options = dict(VARIANTS[variant])
    if "teacher_cache" in options:
        options["teacher_cache"] = str(folder / options["teacher_cache"])
    output = folder / f"{list(VARIANTS).index(variant)}-{seed}"
    output.mkdir()
    (output / "cache").symlink_to(folder / "cache")  # the tokenised data
    path = output / "source.ckpt"
    return str(path), run(
        "mpt_source", SOURCES, k=None, seed=seed, output=output, checkpoint=path, teachers=teachers, **options
    )


def row_of(result: Result, variant: str) -> dict[str, Any]:
    return {name: getattr(result, name) for name in COLUMNS} | {"variant": variant}


def scores(seeds: int, folder: Path) -> list[dict[str, Any]]:
    """Run every variant and its targets; return a row for each test score."""
    rows: list[dict[str, Any]] = []
    cores, chains = min(os.cpu_count() or 1, 8), [(variant, seed) for seed in range(seeds) for variant in VARIANTS]
    with Progress(transient=True) as bar, WorkerPool(cores) as pool:
        progress = bar.add_task("scores", total=len(chains) * (1 + len(TARGETS)))
        teachers = folder / "teachers.ckpt"
        pool.submit(run, "teacher", SOURCES, k=None, seed=0, output=folder, checkpoint=teachers).result()
        sources = {pool.submit(source, *chain, str(teachers), folder): chain for chain in chains}
        targets = {}
        for job in as_completed(sources):
            variant, seed = sources[job]
            path, made = job.result()
            rows += [row_of(result, variant) for result in made]
            for task in TARGETS:
                target = pool.submit(run, "mpt", [task], k=SHOTS, seed=seed, output=folder, source=path)
                targets[target] = variant
            bar.advance(progress)
        for job in as_completed(targets):
            rows += [row_of(result, targets[job]) for result in job.result()]
            bar.advance(progress)
    return rows


def scores_table(rows: list[dict[str, Any]], seeds: int) -> Table:
    table = Table(
        title=f"test scores in %: source tasks, and targets from {SHOTS} rows",
        caption=f"Mean ± standard deviation of {seeds} seeds. Difference: to 'as is', mean ± standard error.",
    )
    for column in ("variant", "source tasks", "difference", *(task.removeprefix("demo/") for task in TARGETS)):
        table.add_column(column, justify="left" if column == "variant" else "right")
    table.add_column("targets", justify="right")
    table.add_column("difference", justify="right")

    def of(variant: str, tasks: Sequence[str], seed: int) -> float:
        """Return the mean score over some tasks."""
        found = [r["value"] for r in rows if (r["variant"], r["seed"]) == (variant, seed) and r["task"] in tasks]
        return 100 * statistics.fmean(found)

    for variant in VARIANTS:
        cells = []
        for tasks in (SOURCES, TARGETS):
            values = [of(variant, tasks, seed) for seed in range(seeds)]
            differences = [value - of(AS_IS, tasks, seed) for seed, value in enumerate(values)]
            error = statistics.stdev(differences) / seeds**0.5
            cells += [
                f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}",
                "" if variant == AS_IS else f"{statistics.fmean(differences):+.1f} ± {error:.1f}",
            ]
        each = [f"{statistics.fmean(of(variant, [task], seed) for seed in range(seeds)):.1f}" for task in TARGETS]
        table.add_row(variant, *cells[:2], *each, *cells[2:])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Cheaper teachers: seconds per source step, and target scores.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the steps (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of steps, at least 2 (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="chains per variant, at least 2 (default: %(default)s)")
    parts = ["steps", "scores"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to run (default: all)")
    parser.add_argument("--note", default="", help="stored with the results, such as what else the machine did")
    parser.add_argument("--output", type=Path, default=RESULTS / "teachers.json", help="JSON file")
    options = parser.parse_args()
    if min(options.repeats, options.seeds) < 2:
        parser.error("--repeats and --seeds must be at least 2, for a deviation")
    torch.set_num_threads(options.threads)
    found = environment(options.threads, options.repeats) | ({"note": options.note} if options.note else {})
    # The results of parts that are not run stay in the file.
    results = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}

    def keep(**part: Any) -> None:
        results.update(part)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as name:
        if "steps" in options.only:
            lines = list(steps(options.repeats, Path(name)))
            show("Teachers", lines, found)
            keep(environment=found, steps=plain(lines))
        if "scores" in options.only:
            rows = scores(options.seeds, Path(name))
            Console(width=150).print(scores_table(rows, options.seeds))
            keep(scores_environment=found, scores=rows)


if __name__ == "__main__":
    main()
