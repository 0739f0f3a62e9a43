"""Reading a comparison's file, with one message for whatever is wrong in it."""

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from mpt_lightning.compare.plan import Comparison, recipe_file
from mpt_lightning.errors import MPTError
from mpt_lightning.io import read_yaml
from mpt_lightning.resources import packaged, packaged_names


def read_comparison(name: str) -> Comparison:
    """Read a comparison's file and check types, recipes and tasks.

    Args:
        name: A path, or the name of a shipped comparison (`compare/demo`).

    Raises:
        MPTError: If the file does not exist or is wrong.
    """
    file = Path(name) if Path(name).is_file() else packaged("configs", name)
    if file is None:
        shipped = [known for known in packaged_names("configs") if known.startswith("compare/")]
        raise MPTError(f"Unknown comparison {name!r}. Expected a YAML file or one of: {', '.join(shipped)}.")
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise MPTError(f"{name}: got {type(content).__name__}, expected a mapping with tasks, shots, seeds, methods.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Comparison)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jsonargparse renamed methods within its version 4
            values = parser.instantiate_classes(parser.parse_object(deepcopy(content)))
        comparison = Comparison(**vars(values) | {"name": values.name or file.stem} | _arguments(content))
        for kind in ("methods", "prepare"):
            for key, recipe in getattr(comparison, kind).items():
                vars(recipe).update(_arguments(content[kind][key]))
                _check_recipes(f"{kind}.{key}.recipe", recipe.recipes)
        comparison.runs()
    except Exception as error:  # jsonargparse's errors have no common class
        if isinstance(error, OSError):
            raise
        raise MPTError(f"{name}: {' '.join(str(error).split())}") from None
    return comparison


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments as they were written; jsonargparse would parse a string such as `label :` as a mapping."""
    return {name: value for name, value in given.items() if name.endswith("arguments") and value is not None}


def _check_recipes(place: str, names: list[str]) -> None:
    if not names:
        raise MPTError(f"`{place}`: got an empty list, expected one or more recipes.")
    for name in names:
        try:
            recipe_file(name)
        except MPTError as error:
            raise MPTError(f"`{place}`: {error}") from None
