"""Reading a comparison's file, and what is wrong with it in one message."""

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from mpt_lightning.compare.plan import Comparison, check_values, recipe_file, yaml_content
from mpt_lightning.data.card import load_card
from mpt_lightning.errors import MPTError
from mpt_lightning.resources import packaged, packaged_names


def read_comparison(name: str) -> Comparison:
    """Read a comparison's file, and check it: types, recipes, tasks.

    Args:
        name: a path, or the name of a shipped one (`compare/demo`).

    Raises:
        MPTError: there is no such file, or it is wrong; one message says where.
    """
    file = Path(name) if Path(name).is_file() else packaged("configs", name)
    if file is None:
        shipped = [known for known in packaged_names("configs") if known.startswith("compare/")]
        raise MPTError(f"Unknown comparison {name!r}. Expected a YAML file or one of: {', '.join(shipped)}.")
    content = yaml_content(file)
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
        _check_recipes(comparison)
        check_values("tasks", [load_card(task).name.casefold() for task in comparison.tasks])
        comparison.runs()
    except Exception as error:  # jsonargparse's have no class in common
        if isinstance(error, OSError):
            raise
        raise MPTError(f"{name}: {' '.join(str(error).split())}") from None
    return comparison


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Give the arguments as they were written; jsonargparse would read a text like `label :` as a mapping."""
    return {name: value for name, value in given.items() if name.endswith("arguments") and value is not None}


def _check_recipes(comparison: Comparison) -> None:
    for kind, recipes in (("methods", comparison.methods), ("prepare", comparison.prepare)):
        for key, recipe in recipes.items():
            if not recipe.recipes:
                raise MPTError(f"`{kind}.{key}.recipe`: got an empty list, expected one or more recipes.")
            for name in recipe.recipes:
                try:
                    recipe_file(name)
                except ValueError as error:
                    raise MPTError(f"`{kind}.{key}.recipe`: {error}") from None
