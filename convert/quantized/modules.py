"""The stored tensors of one module, and the weight that they make."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from convert.safetensors import Index, Stored
from domino_jax.errors import DominoError

BLOCK_VALUES = 2**22  # made at once
SCALES = ("F32", "F16", "BF16", "F8_E8M0")  # dtypes of scales

Values = Callable[[range, range], np.ndarray]  # rows and columns of a weight [out, in] -> their values in float32


@dataclass(frozen=True)
class QuantizedWeight(Stored):
    """A weight [out, in] that several stored tensors make; `dtype` is that of its values."""

    made_of: tuple[Stored, ...]
    words: str
    values: Values
    axis: int  # the one along which neighbours lie far from each other in its files

    @property
    def sources(self) -> tuple[Stored, ...]:
        return self.made_of

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.made_of)

    @property
    def form(self) -> str:
        return self.words

    def read(self, index: Index) -> np.ndarray:
        rows, columns = (range(*one.indices(size)) for one, size in zip(index, self.shape, strict=True))
        part = np.empty((len(rows), len(columns)), np.float32)
        if not part.size:
            return part
        along, across = (rows, columns) if self.axis == 0 else (columns, rows)
        step = max(1, BLOCK_VALUES // len(across))
        for start in range(0, len(along), step):
            block = along[start : start + step]
            if self.axis == 0:
                part[start : start + step] = self.values(block, columns)
            else:
                part[:, start : start + step] = self.values(rows, block)
        return part


@dataclass(frozen=True)
class QuantizedModule:
    """The stored tensors of a module.

    Args:
        name: such as "model.layers.0.mlp.down_proj".
        parts: by what follows it: "qweight".
        read: gives the values of one.
    """

    name: str
    parts: Mapping[str, Stored]
    read: Callable[[Stored], np.ndarray]

    def part(self, ending: str, dtypes: Sequence[str], dims: int | None = 2) -> Stored:
        """One of its tensors.

        Args:
            dims: how many axes it has; any when None.

        Raises:
            DominoError: it is missing, or of another dtype or number of axes.
        """
        found = self.parts.get(ending)
        if found is None:
            first = next(iter(self.parts.values()))
            raise DominoError(f"{first.file} has {first.name}, and there is no {self.name}.{ending} beside it.")
        if found.dtype not in dtypes:
            *rest, last = dtypes
            expected = f"{', '.join(rest)} or {last}" if rest else last
            raise DominoError(f"{found.file} has {found.name} in {found.dtype}, expected {expected}.")
        if dims is not None and len(found.shape) != dims:
            raise DominoError(f"{found.file} has {found.name} of shape {list(found.shape)}, expected {dims} axes.")
        return found

    def check_shape(self, part: Stored, expected: Sequence[int], why: str) -> None:
        """Raises: DominoError: a tensor has another shape."""
        if part.shape != tuple(expected):
            raise DominoError(
                f"{part.file} has {part.name} of shape {list(part.shape)}, expected {list(expected)} ({why})."
            )

    def refuse(self, *endings: str) -> None:
        """Raises: DominoError: it has one of these tensors, which the form has no place for."""
        for ending in endings:
            if ending in self.parts:
                part, others = self.parts[ending], sorted(self.parts.keys() - set(endings))
                raise DominoError(
                    f"{part.file} has {part.name} beside {', '.join(others)}: the quantization_config has no place "
                    "for it."
                )

    def weight(
        self, shape: tuple[int, int], parts: Sequence[Stored], words: str, values: Values, axis: int = 0
    ) -> QuantizedWeight:
        """The weight that some of its tensors make."""
        first = parts[0]
        name = f"{self.name}.weight"
        return QuantizedWeight(first.file, name, shape, "F32", first.begin, tuple(parts), words, values, axis)


@dataclass(frozen=True)
class Tiles:
    """Scales or zero points that tiles of a weight share: a grid of R by C entries in a stored tensor.

    Args:
        stored: of shape [R, C], or with fewer axes where R or C is 1.
        height, width: of a tile, in rows and columns of the weight.
        groups: the tensor [in] that says which of the C entries each column has; by their width where None.
    """

    stored: Stored
    height: int
    width: int
    groups: Stored | None = None

    def values(self, rows: range, columns: range) -> np.ndarray:
        """What some rows and columns of the weight have in float32, one row or column where all have the same."""
        first, last = rows[0] // self.height, rows[-1] // self.height + 1
        if len(self.stored.shape) == 2:
            grid = self.stored.read((slice(first, last), slice(None)))
        else:
            grid = read_whole(self.stored).reshape(-1, 1)[first:last]
        grid = grid.astype(np.float32)
        if len(grid) > 1:
            grid = grid[np.asarray(rows) // self.height - first]
        if grid.shape[1] > 1:
            grid = grid[:, group_numbers(columns, self.width, self.groups, grid.shape[1])]
        return grid


def group_numbers(columns: range, width: int, groups: Stored | None, count: int) -> np.ndarray:
    """Which group each of some columns is of.

    Raises:
        DominoError: the tensor that says so names a group that is not there.
    """
    if groups is None:
        return np.asarray(columns) // width
    found = groups.read((slice(columns.start, columns.stop),))
    wrong = found[(found < 0) | (found >= count)]
    if len(wrong):
        raise DominoError(f"{groups.file} has {groups.name} with group {wrong[0]}, and there are {count} groups.")
    return found


def grid_shape(shape: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """How many tiles a weight has along each axis; the last ones may be cut."""
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])


def read_whole(stored: Stored) -> np.ndarray:
    """All values of a stored tensor."""
    return stored.read((slice(None),) * len(stored.shape))


def unpack(words: np.ndarray, bits: int, axis: int, places: Sequence[int] | None = None) -> np.ndarray:
    """The codes that 32-bit words hold along an axis, as bytes: 32 // bits of them each, the lowest bits first.

    Args:
        words: a matrix.
        places: in which place of a word each of its codes is, counted from the lowest bits.
    """
    count = 32 // bits
    shifts = (bits * np.asarray(range(count) if places is None else places)).astype(np.uint32)
    spread = words.view("<u4")[:, None, :] if axis == 0 else words.view("<u4")[:, :, None]
    codes = (spread >> (shifts[:, None] if axis == 0 else shifts)) & np.uint32(2**bits - 1)
    shape = (-1, words.shape[1]) if axis == 0 else (len(words), -1)
    return codes.astype(np.uint8).reshape(shape)


def packed_slice(values: range, bits: int) -> tuple[slice, slice]:
    """Which words hold a range of codes, and where among the codes of those words it is."""
    count = 32 // bits
    first, last = values.start // count, -(-values.stop // count)
    return slice(first, last), slice(values.start - first * count, values.stop - first * count)
