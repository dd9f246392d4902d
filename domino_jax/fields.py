"""Values of a config.json by kind: one of another kind is an error that names file, field, expected and found."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar, overload

from domino_jax.errors import DominoError

T = TypeVar("T")
D = TypeVar("D")
LARGEST = 2**31 - 1  # of an integer, unless its kind says less: what indexes an axis has 32 bits


@dataclass(frozen=True)
class Kind(Generic[T]):
    """What a field holds: in words, by a test, and as a value of ours."""

    words: str
    holds: Callable[[Any], bool]
    make: Callable[[Any], T]


def integer(least: int = 0, most: int = LARGEST) -> Kind[int]:
    """A whole number without a point; true and false are none."""
    words = f"an integer of at least {least}" if most == LARGEST else f"an integer from {least} to {most}"
    return Kind(words, lambda x: type(x) is int and least <= x <= most, int)


def number(
    least: float = -math.inf, above: float = -math.inf, point: bool = False, most: float = math.inf
) -> Kind[float]:
    """A finite number; with `point`, one that is written with a decimal point or an exponent."""
    words = "a number" + (" with a decimal point" if point else "")
    words += f" of at least {least:g}" if least > -math.inf else f" above {above:g}" if above > -math.inf else ""
    words += f" and at most {most:g}" if most < math.inf else ""

    def holds(x: Any) -> bool:
        if type(x) is not float and (point or type(x) is not int or abs(x) > 2**1000):
            return False
        return math.isfinite(x) and x >= least and x > above and x <= most

    return Kind(words, holds, float)


def one_of(*words: str) -> Kind[str]:
    """One of these words."""
    return Kind(" or ".join(f'"{word}"' for word in words), lambda x: type(x) is str and x in words, str)


def listed(kind: Kind[T], words: str) -> Kind[tuple[T, ...]]:
    """A list, each of whose values is of that kind."""
    return Kind(
        words, lambda x: type(x) is list and all(map(kind.holds, x)), lambda x: tuple(kind.make(one) for one in x)
    )


def either(one: Kind[T], other: Kind[D]) -> Kind[T | D]:
    """A value of one of two kinds."""
    return Kind(
        f"{one.words} or {other.words}",
        lambda x: one.holds(x) or other.holds(x),
        lambda x: one.make(x) if one.holds(x) else other.make(x),
    )


def nullable(kind: Kind[T]) -> Kind[T | None]:
    """null, or a value of that kind."""
    return either(kind, Kind("null", lambda x: x is None, lambda _: None))


BOOLEAN: Final[Kind[bool]] = Kind("true or false", lambda x: type(x) is bool, bool)
TEXT: Final[Kind[str]] = Kind("a string", lambda x: type(x) is str, str)
OBJECT: Final[Kind[dict[str, Any]]] = Kind("an object", lambda x: isinstance(x, Mapping), dict)
INTEGERS: Final = listed(integer(), "a list of integers of at least 0")
TEXTS: Final = listed(TEXT, "a list of strings")


def as_json(value: Any) -> str:
    """A value as JSON has it, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."


class _Required:
    """No default: the field must be there."""


REQUIRED: Final = _Required()


class Fields:
    """The fields of one config.json, which may stand at several levels: the first that has one gives it."""

    def __init__(self, where: str, *levels: tuple[str, Mapping[str, Any]], null_is_absent: bool = False):
        """Args:
        where: the file, as errors name it.
        levels: what stands before a field's name ("dflash_config."), and the object.
        null_is_absent: null says the same as no field at all, at every level.
        """
        self.where, self.levels, self._null_is_absent = where, levels, null_is_absent
        self._read: set[str] = set()

    def given(self, *names: str) -> list[tuple[str, Any]]:
        """All fields of these names, each with its level before it, and their values."""
        self._read |= set(names)
        return [
            (prefix + name, level[name])
            for prefix, level in self.levels
            for name in names
            if name in level and not (level[name] is None and self._null_is_absent)
        ]

    @overload
    def get(self, name: str, kind: Kind[T], *, also: Sequence[str] = ()) -> T: ...
    @overload
    def get(self, name: str, kind: Kind[T], default: D, *, also: Sequence[str] = ()) -> T | D: ...
    def get(self, name: str, kind: Kind[Any], default: Any = REQUIRED, *, also: Sequence[str] = ()) -> Any:
        """The value of a field.

        Args:
            also: other names of the same field.

        Raises:
            DominoError: it is not of that kind, is missing without a default, or has two values that differ.
        """
        found = self.given(name, *also)
        if not found:
            if default is REQUIRED:
                prefix = self.levels[0][0] if len(self.levels) == 1 else ""
                raise DominoError(f"{self.where} has no {prefix}{name}; expected {kind.words}.")
            return default
        for label, value in found:
            if not kind.holds(value):
                raise DominoError(f"{self.where} has {label} {as_json(value)}; expected {kind.words}.")
        made = [(label, kind.make(value)) for label, value in found]
        for (label, _), (_, other) in zip(found, made, strict=True):
            if other != made[0][1]:
                raise DominoError(
                    f"{self.where} has {found[0][0]} {as_json(found[0][1])} and {label} "
                    f"{as_json(dict(found)[label])}; they are one setting, so give one of them, or the same value."
                )
        return made[0][1]

    def unread(self) -> list[tuple[str, str]]:
        """Fields that were never asked for: each with its level before it, and its name alone."""
        return [(prefix + name, name) for prefix, level in self.levels for name in level if name not in self._read]
