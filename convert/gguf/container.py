"""The header of a GGUF file: its metadata, and where its tensors lie.

The file is read and not mapped into memory, and nothing of it is trusted: a length or place beyond its end is an error.
"""

import os
import struct
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from domino_jax.errors import DominoError, first_line

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # the first counted in 32 bits
ALIGNMENT = 32  # of tensors, where the file does not say otherwise
MOST_AXES = 4
# Numbers in metadata: what `struct` calls them, by GGUF's number of their kind.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9


@dataclass(frozen=True)
class BlockPlace:
    """Where a tensor lies, and in which blocks."""

    name: str
    shape: tuple[int, ...]  # the fastest axis last, as everywhere here
    kind: GGMLQuantizationType
    begin: int  # its first byte in the file

    @property
    def bytes(self) -> int:
        values, size = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // values * size


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its values."""

    file: Path
    metadata: dict[str, Any]
    places: list[BlockPlace]


def read_gguf_header(file: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        DominoError: the file can't be read, is no GGUF file, or is damaged.
    """
    try:
        with file.open("rb") as stream:
            return _read(file, _Reader(stream, os.fstat(stream.fileno()).st_size))
    except OSError as error:
        raise DominoError(f"{file} can't be read: {first_line(error)}.") from None
    except ValueError as error:
        raise DominoError(f"{file} is not a whole GGUF file: {error}; fetch it again.") from None


class _Reader:
    """Values one after another; each raises ValueError where the file has no such value."""

    def __init__(self, stream: BufferedReader, total: int):
        self.stream, self.total, self.place = stream, total, 0

    def take(self, count: int) -> bytes:
        if count > self.total - self.place:
            raise ValueError(f"it has {self.total} bytes and ends within its header; it may be truncated")
        self.place += count
        return self.stream.read(count)

    def numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        form = struct.Struct(f"<{count}{kind}")
        return form.unpack(self.take(form.size))

    def number(self, kind: str) -> Any:
        return self.numbers(kind, 1)[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"its metadata has a value of the unknown kind {kind}")
        of, count = self.number("I"), self.number("Q")
        if count > self.total - self.place:  # each value has a byte at least
            raise ValueError(f"its metadata has a list of {count} values, more than its bytes; it may be damaged")
        if of in NUMBERS:
            return list(self.numbers(NUMBERS[of], count))
        if of != TEXT:
            raise ValueError(f"its metadata has a list of values of the kind {of}, expected numbers or texts")
        return [self.text() for _ in range(count)]


def _read(file: Path, reader: _Reader) -> Header:
    magic = reader.take(4)
    if magic != MAGIC:
        raise ValueError(f"it begins with {magic!r}, expected {MAGIC!r}")
    version = reader.number("I")
    if version not in VERSIONS:
        order = "; it may be big-endian, which is not supported" if version & 0xFFFF == 0 else ""
        raise ValueError(f"it has version {version}, expected {' or '.join(map(str, VERSIONS))}{order}")
    tensors, entries = reader.numbers("Q", 2)
    metadata: dict[str, Any] = {}
    try:
        for _ in range(entries):
            key = reader.text()
            if key in metadata:
                raise ValueError(f"its metadata has {key!r} twice")
            metadata[key] = reader.value(reader.number("I"))
        table = [_entry(reader) for _ in range(tensors)]
    except UnicodeDecodeError:
        raise ValueError("its header has a text that is not UTF-8") from None
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"its general.alignment is {alignment!r}, expected a number of bytes")
    start = -(-reader.place // alignment) * alignment
    places = [BlockPlace(name, shape, kind, start + offset) for name, shape, kind, offset in table]
    if len({place.name for place in places}) < len(places):
        raise ValueError("it has two tensors of one name")
    end, before = start, "its header"
    for place in sorted(places, key=lambda place: place.begin):
        if place.begin < end:
            raise ValueError(f"{place.name} begins within {before}")
        end, before = place.begin + place.bytes, place.name
        if end > reader.total:
            raise ValueError(f"{place.name} ends at byte {end}, and it has {reader.total}; it may be truncated")
    return Header(file, metadata, places)


def _entry(reader: _Reader) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    """Name, shape, kind and offset of a tensor."""
    name, axes = reader.text(), reader.number("I")
    if not 1 <= axes <= MOST_AXES:
        raise ValueError(f"{name!r} has {axes} axes, expected 1 to {MOST_AXES}")
    shape = tuple(reversed(reader.numbers("Q", axes)))
    number, offset = reader.number("I"), reader.number("Q")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(f"{name} has values of type {number}, which the gguf package does not know") from None
    values = GGML_QUANT_SIZES[kind][0]
    if not all(shape) or prod(shape) > 2**48 or shape[-1] % values:
        raise ValueError(f"{name} has the shape {list(shape)}, expected rows of a multiple of {values} ({kind.name})")
    return name, shape, kind, offset
