"""What is compared: the YAML file as a dataclass, and the runs that it stands for."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
from string import Template
from typing import Any

from mpt_lightning.data.card import load_card, read_card_file
from mpt_lightning.errors import MPTError
from mpt_lightning.io import can_be_path, parse_yaml, read_text
from mpt_lightning.resources import packaged

PREPARED = "prepare"
"""The folder of the prepared runs, where others have the method's name."""
PLACEHOLDERS = ("k", "seed", "task")


@dataclass
class Recipe:
    """A run of `mpt fit` whose best checkpoint others take, as `$name` in their arguments.

    Args:
        recipe: a shipped recipe or a path; a list lays the later ones over the first.
        arguments: arguments of `mpt fit` by their dotted names, such as `model.lr: 0.1`.
    """

    recipe: str | list[str]
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def recipes(self) -> list[str]:
        """The recipe's files or names."""
        return [self.recipe] if isinstance(self.recipe, str) else self.recipe


@dataclass
class Method(Recipe):
    """A method that is compared.

    Args:
        recipe: see `Recipe`.
        arguments: arguments of `mpt fit` and `mpt test`; they go before the comparison's.
        shots: its own k instead of the comparison's.
        seeds: its own seeds; one is enough where nothing is drawn.
        fit: false for a method without training, which is only tested.
        few_shot_arguments: what a k is to this method, instead of the comparison's.
        full_data_arguments: what the full data (null) is to this method, instead of the comparison's.
    """

    shots: list[int | None] | None = None
    seeds: list[int] | None = None
    fit: bool = True
    few_shot_arguments: dict[str, Any] | None = None
    full_data_arguments: dict[str, Any] | None = None


@dataclass
class Comparison:
    """Methods x tasks x shots x seeds.

    Arguments may hold `$k`, `$seed`, `$task` and the names of `prepare`, whose best checkpoint's path they stand for;
    `$$` is a dollar sign.

    Args:
        tasks: names of shipped cards, or paths of cards' files.
        shots: every k; null is the full data, 0 stands for no training rows.
        seeds: one run each.
        methods: by name, which is also that of a folder.
        arguments: arguments of every method.
        few_shot_arguments: what makes a run one of k rows, k above 0.
        full_data_arguments: what makes a run one of the full data.
        prepare: runs that methods start from, each run once; a later one may take an earlier one's checkpoint.
        metric: what is compared: the name of a test metric without `test/`.
        keep_checkpoints: keep every run's checkpoints, not the prepared ones' alone.
        name: of the comparison; by default that of its file.
    """

    tasks: list[str]
    shots: list[int | None]
    seeds: list[int]
    methods: dict[str, Method]
    arguments: dict[str, Any] = field(default_factory=dict)
    few_shot_arguments: dict[str, Any] = field(default_factory=lambda: {"data.k_shot": "$k"})
    full_data_arguments: dict[str, Any] = field(default_factory=dict)
    prepare: dict[str, Recipe] = field(default_factory=dict)
    metric: str = "average"
    keep_checkpoints: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        for place, values in [
            ("tasks", self.tasks),
            ("shots", self.shots),
            ("seeds", self.seeds),
            ("methods", list(self.methods)),
            *((f"methods.{name}.shots", method.shots) for name, method in self.methods.items()),
            *((f"methods.{name}.seeds", method.seeds) for name, method in self.methods.items()),
        ]:
            check_values(place, values)
        check_values("methods", [name.casefold() for name in self.methods])
        for name in filter(None, [*self.methods, self.name]):
            if name == PREPARED or not re.fullmatch(r"\w[\w.+-]*", name) or not can_be_path(name):
                raise MPTError(
                    f"Got the name {name[:300]!r}, expected letters, digits and _ . + - and not {PREPARED!r}, since "
                    "folders are named after it, on every system. Rename it."
                )
        for name in self.prepare:
            if name in PLACEHOLDERS or not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
                raise MPTError(
                    f"`prepare`: got the name {name!r}, expected small letters, digits and _, and none of "
                    f"{', '.join(PLACEHOLDERS)}, since ${name} is to stand for its checkpoint. Rename it."
                )

    def prepared_runs(self) -> list["Run"]:
        """Give the runs that others start from, in order."""
        runs: list[Run] = []
        for name, recipe in self.prepare.items():
            runs.append(self._run(PREPARED, name, recipe, recipe.arguments, runs))
        return runs

    def runs(self) -> list["Run"]:
        """Give the runs that are compared: methods, then k, then tasks, then seeds."""
        prepared = self.prepared_runs()
        cards = {task: (load_card(task).name, read_card_file(task)) for task in self.tasks}
        return [
            self._method_run(name, method, k, Task(task, *cards[task]), seed, prepared)
            for name, method in self.methods.items()
            for k, task, seed in product(
                self.shots if method.shots is None else method.shots,
                self.tasks,
                self.seeds if method.seeds is None else method.seeds,
            )
        ]

    def _method_run(
        self, name: str, method: Method, k: int | None, task: "Task", seed: int, prepared: list["Run"]
    ) -> "Run":
        shots: Mapping[str, Any] = {}
        if k is None:
            shots = _given(method.full_data_arguments, self.full_data_arguments)
        elif k > 0:
            shots = _given(method.few_shot_arguments, self.few_shot_arguments)
        arguments = {"seed_everything": seed, **self.arguments, **method.arguments, **shots}
        folder = f"{task.name}/{'full' if k is None else k}/{seed}"
        values = {"seed": str(seed), "task": task.name, **({} if k is None else {"k": str(k)})}
        return self._run(name, folder, method, arguments, prepared, method.fit, (task, k, seed), values)

    def _run(
        self,
        method: str,
        folder: str,
        recipe: Recipe,
        arguments: Mapping[str, Any],
        prepared: list["Run"],
        fit: bool = True,
        what: "tuple[Task | None, int | None, int | None]" = (None, None, None),
        values: Mapping[str, str] | None = None,
    ) -> "Run":
        task, k, seed = what
        words = [word for name in recipe.recipes for word in ("--config", name)]
        words += ["--data", task.given] if task is not None else []
        words += [word for option, value in arguments.items() for word in _option(option, value)]
        names = {found for word in words for found in re.findall(r"\$\{?(\w+)", word)}
        needs = tuple(run for run in prepared if run.name in names)
        known = {**(values or {}), **{run.name: f"${run.name}" for run in prepared}}
        words = [_fill(word, known, f"{method}/{folder}") for word in words]
        content = {
            "words": words,
            "fit": fit,
            "metric": self.metric,
            "recipes": [yaml_content(recipe_file(name)) for name in recipe.recipes],
            "card": task.content if task is not None else None,
            "needs": [run.fingerprint for run in needs],
        }
        fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return Run(method, folder, task.name if task else None, k, seed, tuple(words), fit, needs, fingerprint)


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        given: its name or path in the comparison.
        name: its card's.
        content: its card's file.
    """

    given: str
    name: str
    content: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        method: the method's name; "prepare" for a prepared run.
        folder: where its files are, below the method's.
        task: the card's name; None for a prepared run.
        k: training rows; None for the full data and for a prepared run.
        seed: its seed; None for a prepared run.
        words: the arguments of `mpt fit` and `mpt test`, with `$name` for the checkpoints of prepared runs.
        fit: whether it is trained.
        needs: the prepared runs that it starts from.
        fingerprint: hash of all that decides about its result: arguments, recipes, the card, what it starts from.
    """

    method: str
    folder: str
    task: str | None
    k: int | None
    seed: int | None
    words: tuple[str, ...]
    fit: bool
    needs: tuple["Run", ...]
    fingerprint: str

    @property
    def name(self) -> str:
        """A prepared run's name."""
        return self.folder

    @property
    def place(self) -> str:
        """Its method and folder: "lora/demo/topic/16/0"."""
        return f"{self.method}/{self.folder}"

    def arguments(self, checkpoints: Mapping[str, str]) -> list[str]:
        """Give the arguments with the paths of the prepared checkpoints in place."""
        words = list(self.words)
        for run in self.needs:
            known = re.compile(rf"\$({run.name}\b|{{{run.name}}})")
            words = [known.sub(lambda _, path=checkpoints[run.name]: path, word) for word in words]  # type: ignore[misc]
        return words


def check_values(place: str, values: Any) -> None:
    """Refuse an empty list, and one that names something twice.

    Raises:
        MPTError: it is one of these; None is neither.
    """
    if values is None:
        return
    if not values or len(set(values)) < len(values):
        raise MPTError(f"`{place}`: got {values}, expected one or more different values.")
    if place.endswith("shots") and any(k is not None and k < 0 for k in values):
        raise MPTError(f"`{place}`: got {values}, expected numbers of 0 or more, or null for the full data.")


def recipe_file(name: str) -> Path:
    """Find a recipe as `--config` does: a file of that name goes first."""
    file = Path(name) if Path(name).is_file() else packaged("configs", name)
    if file is None:
        raise MPTError(f"unknown recipe {name!r}, expected a file or a name that `mpt configs` lists.")
    return file


def yaml_content(file: Path) -> Any:
    """Read a YAML file.

    Raises:
        MPTError: it is none.
    """
    return _parse(read_text(file), str(file))


_parse = lru_cache(parse_yaml)  # hundreds of runs have one recipe


def _given(own: dict[str, Any] | None, common: dict[str, Any]) -> dict[str, Any]:
    return common if own is None else own


def _option(option: str, value: Any) -> list[str]:
    """Write an argument as a user types it."""
    text = value if isinstance(value, str) else json.dumps(value)
    # A text that begins with a dash would be read as an option.
    return [f"--{option}={text}"] if isinstance(value, str) and text.startswith("-") else [f"--{option}", text]


def _fill(word: str, known: Mapping[str, str], place: str) -> str:
    try:
        return Template(word).substitute(known)
    except (KeyError, ValueError) as error:
        raise MPTError(
            f"{place}: {word!r} has a $ with an unknown name ({error}). Known here are "
            f"{', '.join(f'${name}' for name in known)}; write $$ for a dollar sign."
        ) from None
