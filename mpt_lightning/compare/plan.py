"""What is compared: the YAML file as a dataclass, and its runs."""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from string import Template
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from mpt_lightning.data.card import load_card, read_card_file
from mpt_lightning.errors import MPTError
from mpt_lightning.io import read_yaml
from mpt_lightning.resources import find_file

# The folder of the prepared runs, where others have the method's name.
PREPARED = "prepare"
# The mean over tasks in tables, where others have a task's name.
AVERAGE = "average"
PLACEHOLDERS = ("seed", "task", "k")
if TYPE_CHECKING:
    Arguments = dict[str, Any]
else:  # without types, since jsonargparse would parse strings such as `label :` as mappings
    Arguments = dict


@dataclass
class Recipe:
    """A run of `mpt fit` whose best checkpoint is available to other runs, as `$name` in their arguments.

    Args:
        recipe: A shipped recipe or a path. In a list, later recipes override earlier ones.
        arguments: Arguments of `mpt fit` by their dotted names, such as `model.lr: 0.1`.
    """

    recipe: str | list[str]
    arguments: Arguments = field(default_factory=dict)

    @property
    def recipes(self) -> list[str]:
        """The recipe as a list."""
        return [self.recipe] if isinstance(self.recipe, str) else self.recipe

    @cached_property
    def contents(self) -> list[Any]:
        """The recipes' values, without comments and formatting; a path has precedence over a shipped recipe."""
        return [read_yaml(find_file("configs", name)) for name in self.recipes]


@dataclass
class Method(Recipe):
    """A method that is compared; its shots, seeds and arguments by shots, if any, replace the comparison's.

    Args:
        recipe: See `Recipe`.
        arguments: Arguments of `mpt fit` and `mpt test`; they are added to the comparison's and override them.
        fit: False for a method without training, which is only tested.
    """

    shots: list[int | None] | None = None
    seeds: list[int] | None = None
    fit: bool = True
    few_shot_arguments: Arguments | None = None
    full_data_arguments: Arguments | None = None


@dataclass
class Comparison:
    """Methods x tasks x shots x seeds.

    Arguments may contain `$k`, `$seed`, `$task` and a name of `prepare`, which stands for the path of that run's best
    checkpoint; `$$` is a dollar sign.

    Args:
        tasks: Names of shipped cards, or paths of cards.
        shots: Every k, the number of training rows; null is the full data.
        seeds: One run for each.
        methods: The methods by name; folders are named after them.
        arguments: Arguments of every method.
        few_shot_arguments: Further arguments of a run with k rows, for k above 0.
        full_data_arguments: Further arguments of a run with the full data.
        prepare: Runs that methods start from, each run once; a later one may use an earlier one's checkpoint.
        metric: What is compared: the name of a test metric without `test/`; or the validation metric that chooses the
            checkpoint (`val/average`), and then no test row is read.
        keep_checkpoints: Whether to keep every run's checkpoints; those of prepared runs are always kept.
        name: The name of the comparison; by default that of its file.
    """

    tasks: list[str]
    shots: list[int | None]
    seeds: list[int]
    methods: dict[str, Method]
    arguments: Arguments = field(default_factory=dict)
    few_shot_arguments: Arguments = field(default_factory=lambda: {"data.k_shot": "$k"})
    full_data_arguments: Arguments = field(default_factory=dict)
    prepare: dict[str, Recipe] = field(default_factory=dict)
    metric: str = "average"
    keep_checkpoints: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        _check_list("methods", [name.casefold() for name in self.methods])
        for name in filter(None, [*self.methods, self.name]):
            if name == PREPARED or not re.fullmatch(r"\w[\w.+-]{,99}", name):
                raise MPTError(
                    f"Got the name {name!r}, expected at most 100 letters, digits and _ . + - and not {PREPARED!r}, "
                    "since folders are named after it. Rename it."
                )
        for name in self.prepare:
            if name in PLACEHOLDERS or not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
                raise MPTError(
                    f"`prepare`: got the name {name!r}, expected small letters, digits and _, and none of "
                    f"{', '.join(PLACEHOLDERS)}, since ${name} will be its checkpoint. Rename it."
                )

    @property
    def tests(self) -> bool:
        """Whether the compared metric is one of `mpt test`."""
        return not self.metric.startswith("val/")

    @property
    def metric_title(self) -> str:
        """The metric as it stands in titles."""
        return f"test/{self.metric}" if self.tests else self.metric

    def prepared_runs(self) -> list["Run"]:
        """Return the runs that others start from, in order."""
        runs: list[Run] = []
        for name, recipe in self.prepare.items():
            runs.append(self._run(recipe, recipe.arguments, runs, method=PREPARED, name=name))
        return runs

    def runs(self) -> list["Run"]:
        """Return the compared runs: methods, then k, then tasks, then seeds."""
        prepared = self.prepared_runs()
        cards = [(given, load_card(given).name, read_card_file(given)) for given in self.tasks]
        _check_list("tasks", [task.casefold() for _, task, _ in cards])
        runs = []
        for key, method in self.methods.items():
            shots = self.shots if method.shots is None else method.shots
            seeds = self.seeds if method.seeds is None else method.seeds
            few = self.few_shot_arguments if method.few_shot_arguments is None else method.few_shot_arguments
            full = self.full_data_arguments if method.full_data_arguments is None else method.full_data_arguments
            _check_list(f"shots of {key}", shots)
            _check_list(f"seeds of {key}", seeds)
            for k, (given, task, card), seed in product(shots, cards, seeds):
                options = {"data": given, "seed_everything": seed, **self.arguments, **method.arguments}
                if k != 0:
                    options |= full if k is None else few
                names = {"method": key, "name": f"{task}/{k_name(k)}/{seed}", "task": task, "k": k, "seed": seed}
                runs.append(self._run(method, options, prepared, card, **names))
        return runs

    def _run(
        self, recipe: Recipe, options: Mapping[str, Any], prepared: Sequence["Run"], card: Any = None, **names: Any
    ) -> "Run":
        place = f"{names['method']}/{names['name']}"
        _check_list(f"recipe of {place}", recipe.recipes)
        known = {name: str(names[name]) for name in PLACEHOLDERS if names.get(name) is not None}
        known |= {run.name: f"${{{run.name}}}" for run in prepared}
        words = [word for name in recipe.recipes for word in ("--config", name)]
        words += [word for option, value in options.items() for word in _option(option, value)]
        words = [_fill(word, known, place) for word in words]
        needs = tuple(run for run in prepared if known[run.name] in " ".join(words))
        fit = getattr(recipe, "fit", True)
        content = {
            "words": words,
            "fit": fit,
            "metric": self.metric if "task" in names else None,
            "recipes": recipe.contents,
            "card": card,
            "needs": [run.fingerprint for run in needs],
        }
        fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return Run(words=tuple(words), fit=fit, needs=needs, fingerprint=fingerprint, **names)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run; a prepared one has no task, k and seed."""

    method: str  # "prepare" for a prepared run
    name: str  # in `prepare`, or "task/k/seed"
    task: str | None = None
    k: int | None = None  # number of training rows; None for the full data
    seed: int | None = None
    words: tuple[str, ...]  # arguments of `mpt fit` and `mpt test`, with `${name}` for checkpoints of prepared runs
    fit: bool  # whether it is trained
    needs: tuple["Run", ...]  # the prepared runs that it starts from
    fingerprint: str  # hash of everything that can change its result: arguments, recipes, the card, `needs`

    @property
    def place(self) -> str:
        """The path of its files, such as "lora/demo/topic/16/0"."""
        return f"{self.method}/{self.name}"

    def arguments(self, checkpoints: Mapping[str, str]) -> list[str]:
        """Return the arguments with the paths of the prepared runs' checkpoints."""
        return [Template(word).substitute(checkpoints) for word in self.words]


def read_comparison(name: str) -> Comparison:
    """Read a comparison's file, or a shipped one (`compare/demo`), and check types, recipes and tasks."""
    file = find_file("configs", name, "compare/")
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise MPTError(f"{name}: got {type(content).__name__}, expected a mapping with tasks, shots, seeds, methods.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Comparison)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jsonargparse renamed methods within its version 4
            values = parser.instantiate_classes(parser.parse_object({"name": file.stem, **content}))
        comparison = Comparison(**vars(values))
        comparison.runs()
    except Exception as error:  # jsonargparse's errors have no common class
        raise MPTError(f"{name}: {' '.join(str(error).split())}") from None
    return comparison


def k_name(k: int | None) -> str:
    """Return a k as it stands in folders and CSV files."""
    return "full" if k is None else str(k)


def k_title(k: int | None) -> str:
    """Return a k as it stands in titles."""
    return "full data" if k is None else f"k = {k}"


def _check_list(place: str, values: Sequence[Any]) -> None:
    if not values or len(set(values)) < len(values) or any(isinstance(value, int) and value < 0 for value in values):
        raise MPTError(f"{place}: got {values}, expected one or more different values, and no numbers below 0.")


def _option(option: str, value: Any) -> list[str]:
    if isinstance(value, str) and value.startswith("-"):  # would be read as an option
        return [f"--{option}={value}"]
    return [f"--{option}", value if isinstance(value, str) else json.dumps(value)]


def _fill(word: str, known: Mapping[str, str], place: str) -> str:
    try:
        return Template(word.replace("$$", "$$$$")).substitute(known)  # `Run.arguments` substitutes once more
    except (KeyError, ValueError) as error:
        raise MPTError(
            f"{place}: {word!r} has a $ with an unknown name ({error}). Known here are "
            f"{', '.join(f'${name}' for name in known)}; write $$ for a dollar sign."
        ) from None
