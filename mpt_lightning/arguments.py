"""Types of arguments that have a range, and checking a class's arguments against its signature.

The values stay plain numbers. Those of jsonargparse's own restricted types (`PositiveInt`, ...) are of classes that
torch cannot load from a checkpoint with `weights_only=True`. jsonargparse itself does not check these ranges.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from mpt_lightning.errors import MPTError


@dataclass(frozen=True)
class Range:
    """The values that a number may have, for `Annotated`; infinite and undefined ones are outside of every range.

    `above` excludes the lower bound `least`, `below` the upper bound `most`.
    """

    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False

    def __repr__(self) -> str:
        """Return the range in words."""
        words = f"{'above' if self.above else 'at least'} {self.least:g}"
        return words if self.most == math.inf else f"{words} and {'below' if self.below else 'at most'} {self.most:g}"

    def __contains__(self, value: float) -> bool:
        """Return whether a number is in the range."""
        low = value > self.least if self.above else value >= self.least
        return low and math.isfinite(value) and (value < self.most if self.below else value <= self.most)


PositiveInt: TypeAlias = Annotated[int, Range(1)]
NonNegativeInt: TypeAlias = Annotated[int, Range(0)]
PositiveFloat: TypeAlias = Annotated[float, Range(0, above=True)]
NonNegativeFloat: TypeAlias = Annotated[float, Range(0)]
_PLAIN = {str: "a string", list: "a list", bool: "true or false"}


def check_arguments(cls: type, values: Mapping[str, Any]) -> None:
    """Raise if an argument does not have the type that the `__init__` of a class or of one of its bases annotates.

    Choices (`Literal`), ranges (`Annotated` with a `Range`), strings, lists and booleans are checked.
    """
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base) and base.__module__.split(".")[0] != "torch":
            for name, kind in _types(base).items():
                if name in values:
                    _check(name, values[name], kind)


@cache
def _types(cls: Any) -> dict[str, Any]:
    try:
        return get_type_hints(cls.__init__, include_extras=True)
    except NameError:  # a class within a function may name types that only the function knows
        return dict(cls.__init__.__annotations__)


def _check(name: str, value: Any, kind: Any) -> None:
    alternatives = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    expected = []
    for kind in alternatives:
        origin, arguments = get_origin(kind), get_args(kind)
        plain = origin or kind
        if kind is type(None):
            matches, words = value is None, "null"
        elif origin is Literal:
            matches, words = value in arguments, f"one of {', '.join(map(str, arguments))}"
        elif origin is Annotated and isinstance(arguments[1], Range):
            number, allowed = arguments[:2]
            numeric = isinstance(value, number if number is int else int | float) and not isinstance(value, bool)
            matches = numeric and value in allowed
            words = f"{'a whole number' if number is int else 'a number'} {allowed!r}"
        elif plain in _PLAIN:
            matches, words = isinstance(value, plain), _PLAIN[plain]
        else:
            return
        if matches:
            return
        expected.append(words)
    raise MPTError(f"{name}: got {value!r}, expected {' or '.join(expected)}.")
