"""Values from data files, flags and Python callers: only what is meant is taken, and whatever else is named."""

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

INT_LIMIT = 2**31  # counts are 32-bit integers on a device

NAMES = {type(None): "null", bool: "a boolean", str: "text"}


def json_kind(value: Any) -> str:
    """What a value is, in JSON's words: "null", "text", "a list", ..."""
    if type(value) in NAMES:
        return NAMES[type(value)]
    return "a number" if isinstance(value, Real) else "an object" if isinstance(value, Mapping) else _listed(value)


def _listed(value: Any) -> str:
    return "a list" if isinstance(value, Sequence) and not isinstance(value, bytes) else type(value).__name__


def shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "an integer of thousands of digits"


def shown_key(key: str) -> str:
    """A key as it is, or as Python writes it where it is long or would break the line."""
    return key if key.isprintable() and len(key) <= 40 else shown(key)


def fields_of(row: Mapping[str, Any]) -> str:
    """A row's first keys with what they hold, for an error: "text (null), more (a list)"."""
    return ", ".join(f"{shown_key(key)} ({json_kind(value)})" for key, value in [*row.items()][:8]) or "none"


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, of Python or NumPy, and no boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a real number, of Python or NumPy, and no boolean."""
    return isinstance(value, Real) and not isinstance(value, bool)


def text_of(row: Mapping[str, Any], key: str) -> str:
    """The text under a key.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(row.get(key), str):
        raise ValueError(f"{key} must be text, found {json_kind(row.get(key))}")
    return row[key]


def token_ids(given: Any, what: str = "input_ids") -> list[int]:
    """Token ids, each a whole number of at least 0.

    Raises:
        ValueError: they are no list, or one of them is something else.
    """
    ids = _entries(given, what, "token ids")
    if not all(type(i) is int and i >= 0 for i in ids):
        for place, value in enumerate(ids):
            if not is_whole(value) or value < 0:
                raise ValueError(f"{what} must be token ids, whole numbers from 0 on, found {shown(value)} at {place}")
        ids = [int(i) for i in ids]
    return ids


def check_vocabulary(ids: Iterable[int], vocab_size: int, whose: str = "the target's") -> None:
    """Refuse ids that a model does not have.

    Raises:
        ValueError: there is one.
    """
    outside = next((i for i in ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise ValueError(f"it has id {shown(outside)}, outside {whose} vocabulary of {vocab_size}")


def loss_mask(given: Any) -> list[int]:
    """A loss mask: 1 (or true) on the tokens to learn, 0 (or false) on the others.

    Raises:
        ValueError: it is no list, or an entry is something else.
    """
    mask = _entries(given, "loss_mask", "0 and 1")
    for place, value in enumerate(mask):
        if not (value is True or value is False or (is_whole(value) and value in (0, 1))):
            raise ValueError(f"loss_mask must be 0 or 1 for each token, found {shown(value)} at {place}")
    return [int(value) for value in mask]


def _entries(given: Any, what: str, of: str) -> list[Any]:
    given = given.tolist() if hasattr(given, "tolist") else given  # an array's
    if not isinstance(given, list | tuple):
        raise ValueError(f"{what} must be a list of {of}, found {json_kind(given)}")
    return list(given)
