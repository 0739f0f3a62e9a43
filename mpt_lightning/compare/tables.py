"""The tables of a report as strings: scores, differences to the control, and settings."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from mpt_lightning.compare.plan import AVERAGE, k_name
from mpt_lightning.compare.results import Result, Store
from mpt_lightning.compare.runs import Run
from mpt_lightning.compare.scores import COSTS

IQM = "interquartile mean"
TOO_FEW = "not enough tasks to tell"


def interval_text(value: float, low: float, high: float, sign: str = "") -> str:
    """Return "value [low, high]" times 100; `sign` is "+" to print the sign of positive numbers."""
    text, *bounds = (f"{round(100 * number, 1) + 0:{sign}.1f}" for number in (value, low, high))  # + 0: no minus zero
    return text if math.isnan(low) else f"{text} [{', '.join(bounds)}]"


def score_text(score: Any) -> str:
    """Return a row of `summarize` as "mean ± deviation" or, for the average, "mean [low, high]", times 100.

    Why it is missing otherwise; and how many runs it is of, unless it is of all.
    """
    if math.isnan(score["mean"]):
        return "failed" if score["runs_failed"] else "missing"
    if score.name[-1] == AVERAGE:
        text = interval_text(score["mean"], score["low"], score["high"])
    else:
        deviation = score["standard_deviation"]
        text = f"{100 * score['mean']:.1f}" + ("" if math.isnan(deviation) else f" ± {100 * deviation:.1f}")
    done, expected = int(score["runs_done"]), int(score["runs_expected"])
    return text if done == expected else f"{text} ({done}/{expected})"


def score_table(summary: pd.DataFrame, costs: Sequence[str]) -> pd.DataFrame:
    """Return the strings of `summarize`: a row for each k and method; tasks, averages and costs as columns."""
    averages = summary.xs(AVERAGE, level="task")
    table = summary.apply(score_text, axis="columns").unstack("task", sort=False)
    columns = ["iqm", "iqm_low", "iqm_high"]
    table[IQM] = ["" if math.isnan(row[0]) else interval_text(*row) for row in averages[columns].to_numpy()]
    return table.assign(**{COSTS[name].title: averages[name].map(COSTS[name].text) for name in costs})


def difference_table(differences: pd.DataFrame) -> pd.DataFrame:
    """Return the strings of `compare_with_control`: a row for each k and method."""
    strings = {
        "difference": [
            "" if math.isnan(row[0]) else interval_text(row[0], row[1], row[2], "+")
            for row in differences[["difference", "low", "high"]].to_numpy()
        ],
        "wins/ties/losses": ["/".join(map(str, row)) for row in differences[["wins", "ties", "losses"]].to_numpy()],
        "tasks": differences["tasks"].map(str),
        "p": differences["p"].map(p_text),
        "p (Holm)": differences["p_holm"].map(p_text),
        "verdict": [_verdict_text(row) for _, row in differences.iterrows()],
    }
    return pd.DataFrame(strings, index=differences.index)


def p_text(p: float) -> str:
    """Return a p-value, rounded; an empty string for NaN."""
    return "" if math.isnan(p) else "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def _verdict_text(row: Any) -> str:
    if row["verdict"] != TOO_FEW:
        return str(row["verdict"])
    tasks, differing = row["tasks"], row["differing"]
    number = f"n = {tasks}" if differing == tasks else f"{differing} of {tasks} differ"
    least = f"smallest possible p {p_text(row['least_p'])}"
    if row["least_p"] != row["least_p_holm"]:
        least += f", with Holm's correction {p_text(row['least_p_holm'])}"
    return f"{TOO_FEW} ({number}: {least})"


def setting_table(results: Iterable[Result]) -> pd.DataFrame:
    """Return the strings of how each k and method was trained: backbone, steps and chosen values.

    A value that not all runs of a method chose is followed by the number of runs that did.
    """
    cells: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.status == "done":
            cells.setdefault((k_name(result.k), result.method), []).append(result)
    rows = {}
    for cell, runs in cells.items():
        arguments = dict.fromkeys(name for run in runs for name in run.chosen)
        chosen = [f"{name} {listing(run.chosen.get(name) for run in runs)}" for name in arguments]
        backbones = listing(run.environment.get("backbone", "unknown") for run in runs)
        steps = listing(run.steps for run in runs)
        rows[cell] = {"backbone": backbones, "steps": steps, "chosen": "; ".join(chosen)}
    index = pd.MultiIndex.from_tuples(rows, names=["k", "method"])
    return pd.DataFrame(list(rows.values()), index=index, columns=["backbone", "steps", "chosen"])


def listing(values: Iterable[Any]) -> str:
    """Return the different values with commas, the most frequent first; each with its number if there are several."""
    counts = Counter(map(str, values)).most_common()
    return ", ".join(value if len(counts) == 1 else f"{value} ({count})" for value, count in counts)


def trial_table(results: Iterable[tuple[Run, Result]], store: Store) -> pd.DataFrame:
    """Return a row for each trial of a search: where it ran, its values, its score and loss, and whether it was chosen.

    Failed trials have an `error` instead of a score; without any there is no such column.

    Args:
        results: The compared runs. Their trials are in their results, or in those of the runs that chose for them.
        store: The results.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for run, result in results:
        for source in run.searches or [run]:
            for number, trial in enumerate(store.read(source).trials if run.searches else result.trials):
                if trial["values"]:
                    row = rows.setdefault((source.place, number), {
                        "method": source.method, "task": source.task, "k": k_name(source.k), "seed": source.seed,
                        **trial["values"], "score": trial["score"], "loss": trial["loss"], "chosen": False,
                        **{key: trial[key] for key in ("error",) if key in trial},
                    })  # fmt: skip
                    row["chosen"] |= trial["values"] == result.chosen
    table = pd.DataFrame(list(rows.values()))
    # After the arguments of all methods.
    last = [name for name in ("score", "loss", "chosen", "error") if name in table]
    return table[[*table.columns.drop(last), *last]]
