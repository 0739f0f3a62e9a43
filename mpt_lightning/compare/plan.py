"""What is compared: the YAML file as a dataclass, and its runs."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser

from mpt_lightning.compare.runs import PLACEHOLDERS, PREPARED, Run, make_run
from mpt_lightning.compare.search import Values, make_trials
from mpt_lightning.data.card import load_card, read_card_file
from mpt_lightning.errors import MPTError
from mpt_lightning.io import read_yaml
from mpt_lightning.resources import find_file

# The mean over tasks in tables, where others have a task's name.
AVERAGE = "average"
# LM-BFF's (Gao et al., 2021).
SEEDS = (13, 21, 42, 87, 100)
if TYPE_CHECKING:
    Arguments = dict[str, Any]
else:  # without types, since jsonargparse would parse strings such as `label :` as mappings
    Arguments = dict


@dataclass
class Recipe:
    """A run of `mpt fit` whose selected checkpoint is available to other runs, as `$name` in their arguments.

    Args:
        recipe: A shipped recipe or a path. In a list, later recipes override earlier ones.
        arguments: Arguments of `mpt fit` by their dotted names, such as `model.lr: 0.1`.
        seeds: One run for each, which also draws its rows. The n-th seed of a method uses the n-th of them, and begins
            again after the last. Unset: one run, with the recipe's seed.
    """

    recipe: str | list[str]
    arguments: Arguments = field(default_factory=dict)
    seeds: list[int] | None = None

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
        search: Values to choose from, see `make_trials`. Every trained method needs the same number of trials.
    """

    shots: list[int | None] | None = None
    fit: bool = True
    few_shot_arguments: Arguments | None = None
    full_data_arguments: Arguments | None = None
    search: Arguments = field(default_factory=dict)

    def draws(self, option: str) -> bool:
        """Return whether the recipe draws rows by this option of the DataModule."""
        data = [content.get("data") or {} for content in self.contents if isinstance(content, Mapping)]
        return any((found.get("init_args") or {}).get(option) for found in data)


@dataclass
class Comparison:
    """Methods x tasks x shots x seeds.

    Arguments may contain `$k`, `$seed`, `$task` and a name of `prepare`, which stands for the path of that run's
    selected checkpoint; `$$` is a dollar sign.

    Args:
        tasks: Names of shipped cards, or paths of cards.
        shots: Every k, the number of training rows; null is the full data.
        methods: The methods by name; folders are named after them.
        seeds: One run for each: it seeds the training, and draws the rows unless an argument `data.seed` does.
        dev: The number of rows that select checkpoints and hyperparameters, drawn from the training split beside the
            training rows (Perez et al., 2021): a number, or `k` for as many as training rows (with the full data, as
            many as the largest k). null: the validation split.
        select: The checkpoint that is tested: the `best` on these rows, or the `last`.
        trials: Number of trials of methods with `search`, drawn at random. null: every combination.
        search_tasks: Tasks whose dev rows choose the values for all `tasks`, none of which may be among them. null:
            each run chooses on its own dev rows.
        search_seeds: The seeds of runs on `search_tasks`. Unset: the first of `seeds`.
        arguments: Arguments of every method.
        few_shot_arguments: Further arguments of a run with k rows, for k above 0; by default k rows in all, evenly
            over the classes.
        full_data_arguments: Further arguments of a run with the full data, for which a recipe's `k_shot` is unset.
        prepare: Runs that methods start from; a later one may use an earlier one's checkpoint.
        metric: What is compared: the name of a test metric without `test/`.
        control: The method that others are compared with, in pairs of the same task and seed.
        keep_checkpoints: Whether to keep every run's checkpoints; those of prepared runs are always kept.
        name: The name of the comparison; by default that of its file.
    """

    tasks: list[str]
    shots: list[int | None]
    methods: dict[str, Method]
    seeds: list[int] = field(default_factory=lambda: list(SEEDS))
    dev: int | Literal["k"] | None = "k"
    select: Literal["best", "last"] = "best"
    trials: int | None = None
    search_tasks: list[str] | None = None
    search_seeds: list[int] | None = None
    arguments: Arguments = field(default_factory=dict)
    few_shot_arguments: Arguments = field(default_factory=lambda: {"data.k_shot": "$k", "data.shots_per": "balanced"})
    full_data_arguments: Arguments = field(default_factory=dict)
    prepare: dict[str, Recipe] = field(default_factory=dict)
    metric: str = "average"
    control: str | None = None
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
        for option in ("dev", "trials"):
            if isinstance(value := getattr(self, option), int) and value < 1:
                raise MPTError(f"`{option}`: got {value}, expected 1 or more.")
        for name, method in self.methods.items():
            if method.search and not method.fit:
                raise MPTError(f"`search` of {name}: nothing is trained (fit: false), so there is nothing to choose.")
        if self.control is not None and self.control not in self.methods:
            raise MPTError(f"`control`: got {self.control!r}, expected one of {', '.join(self.methods)}.")

    @cached_property
    def trials_of(self) -> dict[str, tuple[Values, ...]]:
        """The trials of each method.

        Raises:
            MPTError: If a trained method has more trials than another.
        """
        trials = {name: make_trials(name, method.search, self.trials) for name, method in self.methods.items()}
        counts = {name: len(found) for name, found in trials.items() if self.methods[name].fit}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise MPTError(
                f"`search` must have the same number of trials for every trained method, got {listed}. Add or remove "
                "values, or set `trials`."
            )
        if self.dev is None and self.search_tasks is None and any(len(found) > 1 for found in trials.values()):
            raise MPTError("`search` chooses on dev rows; set `dev` to a number, or to k.")
        return trials

    def prepared_runs(self) -> list[Run]:
        """Return the runs that others start from, in order."""
        return [run for runs in self._prepared().values() for run in runs]

    def runs(self) -> list[Run]:
        """Return the compared runs: methods, then k, then tasks, then seeds."""
        prepared, tasks = self._prepared(), _read_cards("tasks", self.tasks)
        searched = _read_cards("search_tasks", self.search_tasks) if self.search_tasks is not None else []
        if both := {name for _, name, _ in tasks} & {name for _, name, _ in searched}:
            raise MPTError(
                f"`search_tasks` and `tasks` both have {', '.join(sorted(both))}; a choice must not see them."
            )
        runs = []
        for name, method in self.methods.items():
            shots = self.shots if method.shots is None else method.shots
            seeds = self.seeds if method.seeds is None else method.seeds
            _check_list(f"shots of {name}", shots)
            _check_list(f"seeds of {name}", seeds)
            if method.fit and 0 in shots:
                raise MPTError(f"shots of {name}: got 0, but training needs rows; remove it, or set `fit: false`.")
            for k in shots:
                searches: tuple[Run, ...] = ()
                if searched and len(self.trials_of[name]) > 1:
                    cells = product(searched, enumerate(self.search_seeds or self.seeds[:1]))
                    searches = tuple(self._run(name, k, task, seed, prepared, test=False) for task, seed in cells)
                for task, seed in product(tasks, enumerate(seeds)):
                    runs.append(self._run(name, k, task, seed, prepared, searches=searches))
        return runs

    def _prepared(self) -> dict[str, list[Run]]:
        prepared: dict[str, list[Run]] = {}
        for name, recipe in self.prepare.items():
            prepared[name] = []
            _check_list(f"seeds of {name}", recipe.seeds or [None])
            for number, seed in enumerate(recipe.seeds or [None]):
                options = recipe.arguments if seed is None else _with_seed(seed, recipe.arguments)
                run_name = name if seed is None else f"{name}/{seed}"
                needs = {key: runs[number % len(runs)] for key, runs in prepared.items() if key != name}
                prepared[name].append(self._make(
                    recipe, options, needs=needs, metric=None, method=PREPARED, name=run_name, seed=seed, fit=True,
                    test=False, select="best",
                ))  # fmt: skip
        return prepared

    def _run(
        self, name: str, k: int | None, task: tuple[str, str, Any], seed: tuple[int, int],
        prepared: Mapping[str, list[Run]], *, searches: tuple[Run, ...] = (), test: bool = True,
    ) -> Run:  # fmt: skip
        method, (given, task_name, card), (number, seed_value) = self.methods[name], task, seed
        options = {"data": given, **_with_seed(seed_value, {**self.arguments, **method.arguments})}
        if k != 0:
            if method.fit and (self.dev is not None or method.draws("dev_shot")):
                options["data.dev_shot"] = None if self.dev is None else self._dev_rows(k)
            few = self.few_shot_arguments if method.few_shot_arguments is None else method.few_shot_arguments
            full = self.full_data_arguments if method.full_data_arguments is None else method.full_data_arguments
            if k is None and method.draws("k_shot"):
                options["data.k_shot"] = None
            options |= full if k is None else few
        needs = {key: runs[number % len(runs)] for key, runs in prepared.items()}
        place = f"{task_name}/{k_name(k)}/{seed_value}"
        return self._make(
            method, options, method=name, name=place if test else f"search/{place}", task=task_name, k=k,
            seed=seed_value, card=card, metric=self.metric, fit=method.fit, test=test, select=self.select,
            trials=self.trials_of[name], searches=searches, needs=needs,
        )  # fmt: skip

    def _make(self, recipe: Recipe, options: Mapping[str, Any], **fields: Any) -> Run:
        place = f"{fields['method']}/{fields['name']}"
        _check_list(f"recipe of {place}", recipe.recipes)
        return make_run(place, recipe.recipes, recipe.contents, options, **fields)

    def _dev_rows(self, k: int | None) -> int:
        if isinstance(self.dev, int):
            return self.dev
        if known := [shots for shots in (k, *self.shots) if shots]:
            return known[0] if k else max(known)
        raise MPTError("`dev: k` with the full data alone: set `dev` to a number, or to null for the validation split.")


def read_comparison(name: str, arguments: Mapping[str, Any] | None = None) -> Comparison:
    """Read a comparison's file, or a shipped one (`compare/demo`), and check types, recipes and tasks.

    `arguments` override those of the file, and those of its prepared runs; a method's own have precedence.
    """
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
        for own in (comparison.arguments, *(recipe.arguments for recipe in comparison.prepare.values())):
            own.update(arguments or {})
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


def _read_cards(place: str, tasks: list[str]) -> list[tuple[str, str, Any]]:
    """Return each task as given, the name of its card, and the card's values if it is in a file."""
    cards = [(given, load_card(given).name, read_card_file(given)) for given in tasks]
    _check_list(place, [task.casefold() for _, task, _ in cards])
    return cards


def _with_seed(seed: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's arguments with its seed, for training and for the draws of rows, unless they set others."""
    return {"seed_everything": seed, **arguments, "data.seed": arguments.get("data.seed", seed)}


def _check_list(place: str, values: Sequence[Any]) -> None:
    if not values or len(set(values)) < len(values) or any(isinstance(value, int) and value < 0 for value in values):
        raise MPTError(f"{place}: got {values}, expected one or more different values, and no numbers below 0.")
