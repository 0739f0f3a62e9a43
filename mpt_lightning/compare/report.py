"""The report of a comparison: its tables and pictures, and how its runs were made."""

from collections import Counter
from functools import cached_property
from pathlib import Path

import pandas as pd
from rich.console import Console

from mpt_lightning.compare import picture
from mpt_lightning.compare.formats import Section, print_sections, to_latex, to_markdown
from mpt_lightning.compare.plan import Comparison, k_name, k_title
from mpt_lightning.compare.results import Store
from mpt_lightning.compare.scores import COSTS, repeat_zero_shot, summarize, tabulate_runs, zero_shot
from mpt_lightning.compare.statistics import RESAMPLES, compare_with_control
from mpt_lightning.compare.tables import difference_table, listing, score_table, setting_table, trial_table

SCORES = (
    "Scores are percentages. Tasks: mean ± standard deviation (n - 1) over seeds. average: mean over tasks of the "
    "means over seeds. interquartile mean: mean of the runs without the lowest and the highest quarter. [low, high]: "
    f"95% interval of {RESAMPLES:,} resamples of tasks, and of seeds within each. (2/3): two of three runs have a "
    "result; the others are left out.",
    "Time per step and peak memory are medians over runs; a peak is what the run's process took beyond what it had "
    "before, in training and in evaluation.",
)
DIFFERENCES = (
    "difference: percentage points, on the same task and seed; mean over tasks of the means over seeds, with the "
    "interval of the same resamples. wins/ties/losses: over tasks and seeds. p: Wilcoxon's signed-rank test of the "
    "tasks' differences, two-sided; p (Holm): corrected for the methods of the table. higher, lower: p (Holm) < .05; "
    "mixed: the same, but the mean has another sign than the median over tasks."
)
ONE_TASK = "There is one task: intervals are over its seeds alone, and say nothing about other tasks."
FEW_TASKS = "There are {} tasks: with fewer than ten, 95% intervals over tasks can be too narrow (docs/methods.md)."


class Report:
    """The results of a comparison, whether or not all runs are done.

    Args:
        comparison: What is compared.
        store: Its results.
        command: The command that runs it.

    Attributes:
        scores: See `summarize`.
        differences: See `compare_with_control`; empty without a control.
        trials: See `trial_table`.
    """

    def __init__(self, comparison: Comparison, store: Store, command: str = "") -> None:
        self.comparison, self.store, self.command = comparison, store, command
        self.results = [(run, store.read(run)) for run in comparison.runs()]
        self.trials = trial_table(self.results, store)
        self.prepared = [(run, store.read(run)) for run in comparison.prepared_runs()]
        self.failures = [(run, result.error) for run, result in [*self.prepared, *self.results] if result.error]
        runs = tabulate_runs(result for _, result in self.results)
        self.scores = summarize(runs)
        self._references = zero_shot(runs)
        repeated = repeat_zero_shot(runs, self._references)
        self.differences = compare_with_control(repeated, comparison.control or "", self._references)
        names = set(repeated["k"])
        self.shots = [k for k in dict.fromkeys(run.k for run, _ in self.results) if k_name(k) in names]

    @property
    def metric(self) -> str:
        """The metric as it stands in titles."""
        return f"test/{self.comparison.metric}"

    @property
    def progress(self) -> str:
        """How many runs are done, failed and missing, in one line."""
        counts = Counter(result.status for _, result in self.results)
        seconds = [f"{run.name} in {done.seconds:.0f} s" for run, done in self.prepared if done.status == "done"]
        parts = [f"{counts['done']} of {len(self.results)} runs done"]
        parts += [f"{len(self.failures)} failed"] if self.failures else []
        parts += [f"{counts['missing']} missing"] if counts["missing"] else []
        parts += [f"prepared: {', '.join(seconds)}"] if seconds else []
        return "; ".join(parts) + "."

    @property
    def seeds(self) -> str:
        """The seeds of the runs, with the methods and prepared runs that have others."""
        plan = self.comparison
        others = {name: part.seeds for name, part in {**plan.prepare, **plan.methods}.items() if part.seeds is not None}
        parts = [", ".join(map(str, plan.seeds)), *(f"{name} {', '.join(map(str, s))}" for name, s in others.items())]
        return "; ".join(parts)

    @property
    def selection(self) -> str:
        """Which rows chose checkpoints and hyperparameters."""
        plan = self.comparison
        rows = "the validation split" if plan.dev is None else f"{plan.dev} further training rows"
        rows += " (counted like k)" if isinstance(plan.dev, int) else ""
        rows += " (full data: as many as the largest k)" if plan.dev == "k" and None in self.shots else ""
        parts = ["the last checkpoint" if plan.select == "last" else f"the checkpoint with the best score on {rows}"]
        trials = max(map(len, plan.trials_of.values()))
        if trials > 1:
            tasks = dict.fromkeys(str(search.task) for run, _ in self.results for search in run.searches)
            where = f"of {', '.join(tasks)}" if tasks else "of the same run"
            parts.append(f"hyperparameters by {trials} trials for each method, by the score on {rows} {where}")
        if plan.prepare:
            names = ", ".join(plan.prepare)
            parts.append(f"for {names}, the checkpoint with the best score on the validation rows of their own tasks")
        return "; ".join(parts) + ". Test rows are read once, after these choices."

    @property
    def facts(self) -> list[str]:
        """How the runs were made: command, backbones, versions, steps, number of runs, selection."""
        done = [result for _, result in self.results if result.environment]
        versions: dict[str, list[str]] = {}
        for result in done:
            for package, version in result.environment["versions"].items():
                versions.setdefault(package, []).append(version)
        failed = self.trials["error"].count() if "error" in self.trials else 0
        steps = [result.steps for _, result in self.results if result.steps]
        facts = {
            "Command": self.command,
            "Backbone": listing(result.environment["backbone"] for result in done),
            "Versions": ", ".join(f"{package} {listing(found)}" for package, found in versions.items()),
            "Machine": listing(result.environment["system"]["accelerator"] for result in done),
            "Steps": f"{min(steps)} to {max(steps)}" if len(set(steps)) > 1 else listing(set(steps)),
            "Seeds": self.seeds,
            "Runs": self.progress,
            "Selection": self.selection,
            "Failed trials": f"{failed}; they are not chosen, and report_trials.csv has their errors" if failed else "",
        }
        return [f"{name}: {text}" for name, text in facts.items() if text]

    def table(self, k: int | None) -> pd.DataFrame:
        """Return the scores of one k as strings: methods by tasks, averages and costs."""
        costs = [name for name in COSTS if name != "seconds"]
        return self._titled(score_table(repeat_zero_shot(self.scores, self._references), costs).loc[k_name(k)])

    @cached_property
    def sections(self) -> list[Section]:
        """The parts of the report."""
        tasks = len(self.comparison.tasks)
        notes = [*SCORES, *([DIFFERENCES] if self.comparison.control else [])]
        notes += [ONE_TASK] if tasks == 1 else [FEW_TASKS.format(tasks)] if tasks < 10 else []
        notes += self._single_seeds()
        sections = [Section(f"{self.comparison.name}: {self.metric}", [*self.facts, *notes])]
        settings = repeat_zero_shot(setting_table(result for _, result in self.results), self._references)
        for k in self.shots:
            sections.append(Section(k_title(k), table=self.table(k)))
            sections += self._difference_section(k)
            if k_name(k) in settings.index.unique("k"):
                title = f"{k_title(k)}: backbones, steps and chosen hyperparameters"
                sections.append(Section(title, table=self._titled(settings.loc[k_name(k)])))
        if self.failures:
            sections.append(Section("Failed runs", [f"{run.place}: {error}" for run, error in self.failures]))
        return sections

    def _difference_section(self, k: int | None) -> list[Section]:
        control = self.comparison.control
        if control is None:
            return []
        title = f"{k_title(k)}: differences to {control}"
        if k_name(k) not in self.differences.index.unique("k"):
            return [Section(title, [f"{control} has no result here."])]
        table = difference_table(self.differences).loc[k_name(k)]
        return [Section(title, table=self._titled(table))]

    def _single_seeds(self) -> list[str]:
        seeds = {name: self.comparison.seeds if method.seeds is None else method.seeds
                 for name, method in self.comparison.methods.items() if method.fit}  # fmt: skip
        single = [name for name, found in seeds.items() if len(found) == 1]
        return [f"One seed: {', '.join(single)}. Their intervals leave out how training varies."] if single else []

    def _titled(self, table: pd.DataFrame) -> pd.DataFrame:
        return table.rename(index={name: f"{name} (k = 0)" for name in self._references}, level="method")

    def print(self, console: Console) -> None:
        """Print the report to the terminal."""
        print_sections(self.sections, console)

    def write(self, output: Path) -> list[Path]:
        """Write the tables as Markdown, LaTeX and CSV and the pictures as PNG, SVG and PDF; return their paths."""
        # An earlier report may have had a control or a search.
        for old in (*output.glob("report_differences.*"), *output.glob("report_trials.*")):
            old.unlink()
        tables = {"": self.scores.reset_index(), "_differences": self.differences.reset_index()}
        tables["_trials"] = self.trials
        files = [output / "report.md", output / "report.tex"]
        files[0].write_text(self.markdown(), encoding="utf-8")
        files[1].write_text(to_latex(self.sections), encoding="utf-8")
        for name, table in tables.items():
            if len(table):
                files.append(output / f"report{name}.csv")
                table.to_csv(files[-1], index=False)
        scores = self._titled(repeat_zero_shot(self.scores, self._references))
        figures = {
            "shots": picture.draw_shots(scores, self.shots, self.metric),
            "parameters": picture.draw_parameters(scores, self.shots, self.metric),
        }
        if len(self.differences):
            control, differences = str(self.comparison.control), self._titled(self.differences)
            figures["differences"] = picture.draw_differences(differences, self.shots, control, self.metric)
        for name, figure in figures.items():
            files += picture.save(figure, output / f"report_{name}")
        return files

    def markdown(self) -> str:
        """Return the report as Markdown, without pictures."""
        return to_markdown(self.sections)
