"""Text that others wrote: files that are no text at all are named, and JSON is read strictly."""

import json
import math
import re
from pathlib import Path
from typing import Any

from domino_jax.errors import DominoError

MOST_NESTED = 200  # objects and lists within one another; deeper ones are nobody's data, and exhaust Python's stack

ARROW = "is an Arrow table: give its name the ending .arrow, for training, or write it as JSON lines"
# The first bytes of files that are taken for text, and what they are.
KINDS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "is compressed by gzip: unpack it first"),
    (b"PK\x03\x04", "is a zip archive: unpack it first"),
    (b"BZh", "is compressed by bzip2: unpack it first"),
    (b"\xfd7zXZ", "is compressed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd: unpack it first"),
    (b"7z\xbc\xaf", "is a 7z archive: unpack it first"),
    (b"PAR1", "is a Parquet table: give its name the ending .parquet, for training, or write it as JSON lines"),
    (b"ARROW1", ARROW),
    (
        b"\xff\xff\xff\xff",
        ARROW,
    ),
    (b"\xff\xfe", "is UTF-16 text: save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16 text: save it as UTF-8"),
)
KIND_BYTES = max(len(magic) for magic, _ in KINDS)


def other_kind(head: bytes) -> str | None:
    """What a file that should be text is by its first KIND_BYTES bytes, as the rest of a sentence; None for text."""
    return next((kind for magic, kind in KINDS if head.startswith(magic)), None)


def read_text(path: Path) -> str:
    """A file of UTF-8 text, without a byte order mark.

    Raises:
        OSError: it can't be read.
        DominoError: it is something else, which is named.
        UnicodeDecodeError: it is something else, which is not known.
    """
    content = path.read_bytes()
    kind = other_kind(content[:KIND_BYTES])
    if kind:
        raise DominoError(f"{path} {kind}.")
    return content.decode("utf-8-sig")


def parse_json(text: str | bytes, nan: bool = False) -> Any:
    """The value of a JSON text; a byte order mark before it is allowed.

    Args:
        nan: allow NaN and Infinity, which JSON does not know and Python writes: for what this project wrote itself.

    Raises:
        ValueError: it is not JSON; a key is given twice; it is nested too deep.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
    try:
        numbers = {} if nan else {"parse_constant": _constant, "parse_float": _float}
        value = json.loads(text, object_pairs_hook=_object, **numbers)
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_NESTED} deep") from None
    if text.count("[") + text.count("{") > MOST_NESTED and _depth(value) > MOST_NESTED:
        raise ValueError(f"it is nested more than {MOST_NESTED} deep")
    return value


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_bytes(text: str) -> int:
    """An amount of memory such as 4GiB, 512 MB or 1000000.

    Raises:
        ValueError: it is none, or not above 0.
    """
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)", text.strip(), re.ASCII)
    unit = UNITS.get(found[2].upper()) if found else None
    if not found or unit is None or (amount := int(float(found[1]) * unit)) < 1:
        raise ValueError(f"{text!r} is no amount of memory such as 4GiB")
    return amount


def _constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"it holds {text[:40]}, which is too large a number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it gives the key {next(key for key in keys if keys.count(key) > 1)[:40]!r} twice")
    return made


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth
