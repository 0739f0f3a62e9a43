"""Checks of arguments against a signature."""

from typing import Annotated, Any, Literal

import pytest

from mpt_lightning.arguments import PositiveFloat, PositiveInt, Range, check_arguments


class Base:
    def __init__(self, size: PositiveInt = 1, kind: Literal["a", "b"] | None = "a", **kwargs: Any) -> None: ...


class Child(Base):
    def __init__(
        self,
        rate: PositiveFloat | None = 0.1,
        share: Annotated[float, Range(0, 1, below=True)] = 0.0,
        names: list[str] | None = None,
        source: str | dict[str, str] = "",
        **kwargs: Any,
    ) -> None: ...


@pytest.mark.parametrize(
    "values",
    [
        {"size": 3, "kind": None, "rate": 1, "share": 0, "names": ["x"], "source": {"a": "b"}},
        {"size": 1, "kind": "b", "rate": None, "share": 0.99, "names": None, "source": "x", "unknown": object()},
    ],
)
def test_valid_values_pass(values: dict[str, Any]) -> None:
    check_arguments(Child, values)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("size", 0, "a whole number at least 1"),
        ("size", True, "a whole number at least 1"),
        ("size", 2.5, "a whole number at least 1"),
        ("size", "3", "a whole number at least 1"),
        ("kind", "c", "one of a, b or null"),
        ("rate", 0, "a number above 0 or null"),
        ("rate", float("nan"), "a number above 0 or null"),
        ("rate", float("inf"), "a number above 0 or null"),
        ("share", 1.0, "a number at least 0 and below 1"),
        ("names", "x", "a list or null"),
        ("source", None, None),
    ],
)
def test_invalid_values_are_named(name: str, value: Any, expected: str | None) -> None:
    if expected is None:  # a union with an unchecked type accepts anything
        check_arguments(Child, {name: value})
        return
    with pytest.raises(ValueError, match=rf"^{name}: got .*, expected {expected}\.$"):
        check_arguments(Child, {name: value})
