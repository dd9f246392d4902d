"""Weights whose codes have a tensor of a byte each, [out, in]: FP8 and int8."""

from functools import cache

import ml_dtypes
import numpy as np

from convert.quantized.modules import SCALES, QuantizedModule, QuantizedWeight, Tiles, grid_shape
from convert.safetensors import Stored


def scaled_codes(
    module: QuantizedModule,
    codes: Stored,
    scale: str,
    tile: tuple[int, int] | None,
    words: str,
    zero: str | None = None,
) -> QuantizedWeight:
    """The weight of a matrix of codes, (codes - zero points) times scales.

    Args:
        scale, zero: the names of the tensors of scales and of zero points, which have a grid of tiles.
        tile: height and width; where None a row, or the whole matrix where there is one scale.

    Raises:
        DominoError: they are missing, or do not fit.
    """
    shape, scales = (codes.shape[0], codes.shape[1]), module.part(scale, SCALES, dims=None)
    if tile is None:
        one = size(scales) == 1
        tile, words = shape if one else (1, shape[1]), f"{words}, {'one scale' if one else 'a scale a row'}"
    grid = grid_shape(shape, tile)
    check_grid(module, scales, grid, tile)
    parts, zeros = [codes, scales], None
    if zero is not None:
        points = module.part(zero, ("I8",), dims=None)
        check_grid(module, points, grid, tile)
        parts.append(points)
        zeros = Tiles(points, *tile)
    tiles = Tiles(scales, *tile)

    def values(rows: range, columns: range) -> np.ndarray:
        found = decoded(codes.read((slice(rows.start, rows.stop), slice(columns.start, columns.stop))))
        if zeros is not None:
            found -= zeros.values(rows, columns)
        found *= tiles.values(rows, columns)
        return found

    return module.weight(shape, parts, words, values)


def size(stored: Stored) -> int:
    """How many values a tensor has."""
    return int(np.prod(stored.shape))


def check_grid(module: QuantizedModule, part: Stored, grid: tuple[int, int], tile: tuple[int, int]) -> None:
    """Raises: DominoError: a tensor has not one entry a tile."""
    least = [one for one in grid if one > 1]
    if part.shape != grid and (len(least) == 2 or [one for one in part.shape if one > 1] != least):
        module.check_shape(part, grid, f"tiles of {tile[0]} by {tile[1]}")


def decoded(codes: np.ndarray) -> np.ndarray:
    """The values of codes in float32."""
    if codes.dtype == np.int8:
        return codes.astype(np.float32)
    return _of_e4m3()[codes.view(np.uint8)]


@cache
def _of_e4m3() -> np.ndarray:
    """The values of the 256 codes of E4M3: looking them up is faster than converting each."""
    return np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
