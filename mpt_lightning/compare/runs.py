"""One run of a comparison: the arguments of its commands, and what it needs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Template
from typing import Any

from mpt_lightning.compare.search import Values
from mpt_lightning.errors import MPTError

# The folder of the prepared runs, where others have the method's name.
PREPARED = "prepare"
PLACEHOLDERS = ("seed", "task", "k")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: a compared one; a prepared one, without task and k; or one that only searches."""

    method: str  # "prepare" for a prepared run
    name: str  # "task/k/seed"; "name" or "name/seed" if it is prepared, "search/task/k/seed" if it only searches
    task: str | None = None
    k: int | None = None  # number of training rows; None for the full data
    seed: int | None = None
    words: tuple[str, ...]  # arguments of `mpt fit` and `mpt test`, with `${name}` for checkpoints of prepared runs
    fit: bool  # whether it is trained
    test: bool  # whether it is tested
    select: str  # the checkpoint that is selected, "best" or "last"
    needs: tuple["Run", ...]  # the prepared runs that it starts from
    trials: tuple[Values, ...] = field(default=({},), hash=False)  # further arguments, of which the best are chosen
    searches: tuple["Run", ...] = ()  # runs that choose among the trials; without them, this run itself does
    fingerprint: str  # hash of everything that can change its result: arguments, recipes, the card, other runs

    @property
    def place(self) -> str:
        """The path of its files, such as "lora/demo/topic/16/0"."""
        return f"{self.method}/{self.name}"

    def arguments(self, checkpoints: Mapping[str, str]) -> list[str]:
        """Return the arguments with the paths of the prepared runs' checkpoints, by the names of `prepare`."""
        return [Template(word).substitute(checkpoints) for word in self.words]

    @property
    def prepared_name(self) -> str:
        """The name in `prepare`."""
        return self.name.partition("/")[0]


def make_run(
    place: str, recipes: list[str], contents: list[Any], options: Mapping[str, Any], *, metric: str | None,
    card: Any = None, needs: Mapping[str, Run], **fields: Any,
) -> Run:  # fmt: skip
    """Return a run, with its placeholders filled.

    Args:
        place: Where it is, for messages.
        recipes: Names or paths of recipes.
        contents: Their values.
        options: Arguments by dotted names; their values can contain placeholders.
        metric: The compared metric.
        card: The values of the task's card, if it is in a file.
        needs: Prepared runs by the names of `prepare`; those that the arguments contain are kept.
        **fields: Other fields of `Run`.

    Raises:
        MPTError: If a placeholder is unknown.
    """
    known = {name: str(fields[name]) for name in PLACEHOLDERS if fields.get(name) is not None}
    known |= {name: f"${{{name}}}" for name in needs}
    words = [word for name in recipes for word in ("--config", name)]
    words += [_fill(word, known, place) for word in option_words(options)]
    used = tuple(run for name, run in needs.items() if known[name] in " ".join(words))
    content: dict[str, Any] = {
        "words": words, "metric": metric, "recipes": contents, "card": card,
        "needs": [run.fingerprint for run in (*used, *fields.get("searches", ()))],
        **{name: fields[name] for name in ("fit", "test", "trials", "select") if name in fields},
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return Run(words=tuple(words), needs=used, fingerprint=digest, **fields)


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Return arguments by dotted names as words of a command line."""
    words = []
    for option, value in options.items():
        text = value if isinstance(value, str) else json.dumps(value)
        # A text with a hyphen would be read as an option.
        words += [f"--{option}={text}"] if isinstance(value, str) and text.startswith("-") else [f"--{option}", text]
    return words


def _fill(word: str, known: Mapping[str, str], place: str) -> str:
    try:
        return Template(word.replace("$$", "$$$$")).substitute(known)  # `Run.arguments` substitutes once more
    except (KeyError, ValueError) as error:
        raise MPTError(
            f"{place}: {word!r} has a $ with an unknown name ({error}). Known here are "
            f"{', '.join(f'${name}' for name in known)}; write $$ for a dollar sign."
        ) from None
