"""Tensors of safetensors files, read part by part in bounded memory."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.values import is_whole, json_kind, shown, shown_key
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.parsing import parse_json

Index = tuple[slice, ...]  # one slice for each axis
BLOCK_BYTES = 64 * 2**20  # read at once of a tensor of which some columns are wanted
LARGEST_HEADER = 10**8  # bytes, as the library takes them
BITS = {
    "BOOL": 8,
    **dict.fromkeys(("F4", "F4_E2M1"), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}  # of a value, by safetensors' names of dtypes
# Those that NumPy and JAX know; in files, all are little-endian.
DTYPES = {
    "BOOL": np.dtype(bool),
    **{f"U{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"I{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor is and what it is; its values are read later."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: "BF16"
    begin: int  # its first byte in the file

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * BITS[self.dtype] // 8

    @property
    def form(self) -> str:
        """As what its values lie in the file, in a word."""
        return self.dtype

    @property
    def sources(self) -> tuple["Stored", ...]:
        """The tensors of files that it is made of: mostly itself."""
        return (self,)

    def read(self, index: Index) -> np.ndarray:
        """The part of it that `index` has a slice of step 1 for each axis of.

        Raises:
            OSError, EOFError: it can't be read.
        """
        dtype, shape = DTYPES[self.dtype], self.shape or (1,)
        rows, *columns = (range(*one.indices(size)) for one, size in zip(index or (slice(None),), shape, strict=True))
        part = np.empty((len(rows), *map(len, columns)), dtype)
        row_bytes = prod(shape[1:]) * dtype.itemsize
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.begin + rows.start * row_bytes)
            if part.shape[1:] == shape[1:]:
                fill(part, stream)
            else:
                for start in range(0, len(rows), step := max(1, BLOCK_BYTES // max(row_bytes, 1))):
                    block = np.empty((min(step, len(rows) - start), *shape[1:]), dtype)
                    fill(block, stream)
                    part[start : start + len(block)] = block[:, *index[1:]]
        return part.reshape(part.shape if self.shape else ())


def stored_tensors(file: Path) -> list[Stored]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        DominoError: the file can't be read, or its header is damaged or does not fit its size.
    """
    try:
        with file.open("rb") as stream:
            total = os.fstat(stream.fileno()).st_size
            start = 8 + int.from_bytes(stream.read(8), "little")
            if total < 8 or start > total:
                size = "is too short for a header" if total < 8 else f"would have a header of {start - 8} bytes"
                raise ValueError(f"it has {total} bytes and {size}; it may be truncated")
            if start - 8 > LARGEST_HEADER:
                raise ValueError(f"its header would have {start - 8} bytes, and {LARGEST_HEADER} are allowed")
            text = stream.read(start - 8)
        return _tensors(file, _header(text), start, total)
    except OSError as error:
        raise DominoError(f"{file} can't be read: {first_line(error)}.") from None
    except ValueError as error:
        raise DominoError(f"{file} is not a whole safetensors file: {error}; fetch it again.") from None


def _header(text: bytes) -> dict[str, Any]:
    try:
        header = parse_json(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"its header is not UTF-8, from byte {error.start} on") from None
    except ValueError as error:
        raise ValueError(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"its header is {json_kind(header)}, and an object is expected")
    return header


def _tensors(file: Path, header: dict[str, Any], start: int, total: int) -> list[Stored]:
    """The tensors of a header, whose bytes cover the file from `start` to `total`."""
    ends, found = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise ValueError(f"its __metadata__ is {shown(entry)}, and an object of texts is expected")
            continue
        key = shown_key(name)
        if not isinstance(entry, dict):
            raise ValueError(f"its header gives {key} as {json_kind(entry)}, and an object is expected")
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in BITS:
            raise ValueError(f"{key} has the dtype {shown(dtype)}, which is none of safetensors'")
        if not isinstance(shape, list) or not all(is_whole(size) and size >= 0 for size in shape):
            raise ValueError(f"{key} has the shape {shown(shape)}, expected a list of sizes")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_whole, offsets)):
            raise ValueError(f"{key} has the data_offsets {shown(offsets)}, expected its first byte and its end")
        begin, end = offsets
        if not 0 <= begin <= end:
            raise ValueError(f"{key} has the data_offsets {shown(offsets)}, which is no range of bytes")
        if end - begin != (needed := -(-prod(shape) * BITS[dtype] // 8)):
            raise ValueError(f"{key} has {end - begin} bytes, and {dtype} of shape {shown(shape)} takes {needed}")
        found.append(Stored(file, name, tuple(shape), dtype, start + begin))
        ends[name] = start + end
    found.sort(key=lambda stored: (stored.begin, ends[stored.name]))
    place, before = start, "the header"
    for stored in found:
        if stored.begin < place:
            raise ValueError(f"{before} and {shown_key(stored.name)} share bytes")
        if stored.begin > place:
            raise ValueError(
                f"{stored.begin - place} bytes between {before} and {shown_key(stored.name)} are no tensor's"
            )
        place, before = ends[stored.name], shown_key(stored.name)
    if place > total:
        raise ValueError(f"its tensors end at byte {place}, and it has {total}; it may be truncated")
    if place < total:
        raise ValueError(f"the last {total - place} of its bytes are no tensor's")
    return found


class TensorFiles:
    """The tensors of some files by name.

    Args:
        files: to read.
        tensors_of: gives those of one file; a safetensors file's by default.

    They are read, not mapped into memory: a mapping of a file that is cut short ends the process where it is touched.

    Raises:
        DominoError: a file is damaged, or two have a tensor of one name.
    """

    def __init__(self, files: Iterable[Path], tensors_of: Callable[[Path], list[Stored]] = stored_tensors):
        self.stored: dict[str, Stored] = {}
        self._states: dict[Path, tuple[int, ...]] = {}
        for file in files:
            self._states[file] = _state(file)
            for stored in tensors_of(file):
                if stored.name in self.stored:
                    raise DominoError(
                        f"{stored.name} is in {self.stored[stored.name].file} and in {file.name}: it can't be told "
                        "which is meant. Leave only the files of one model in the folder."
                    )
                self.stored[stored.name] = stored

    def _check_same(self, files: Iterable[Path]) -> None:
        for file in files:
            if _state(file) != self._states[file]:
                raise DominoError(f"{file} changed while it was read: try again when nothing writes it.")

    def read(self, tensor: Stored, index: Index | None = None) -> np.ndarray:
        """The tensor, or the part that `index` has a slice of step 1 for each axis of.

        Raises:
            DominoError: it can't be read, or its dtype is none that NumPy and JAX know; or its file is another than
                when this was made.
        """
        if tensor.dtype not in DTYPES:
            raise DominoError(f"{tensor.name} in {tensor.file} can't be read: NumPy has no dtype {tensor.dtype}.")
        files = {source.file for source in tensor.sources}
        self._check_same(files)
        try:
            part = tensor.read(index or (slice(None),) * len(tensor.shape))
        except (OSError, EOFError) as error:
            self._check_same(files)
            raise DominoError(f"{tensor.name} in {tensor.file} can't be read: {first_line(error)}.") from None
        self._check_same(files)
        return part


def fill(array: np.ndarray, stream: RawIOBase) -> None:
    """Fill an array with the next bytes of a file.

    Raises:
        OSError, EOFError: there are not so many.
    """
    rest = array.reshape(-1).view(np.uint8).data
    while rest:
        read = stream.readinto(rest)
        if not read:
            raise EOFError("its file ends within it")
        rest = rest[read:]


def _state(file: Path) -> tuple[int, ...]:
    """What tells that a file is no longer the same.

    Raises:
        DominoError: it is gone, or can't be looked at.
    """
    try:
        found = file.stat()
    except OSError as error:
        raise DominoError(f"{file} can't be read: {first_line(error)}.") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
