"""Tensors of safetensors files, read part by part in bounded memory."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from domino_jax.errors import DominoError, first_line

# Files are memory-mapped, and what was read of a mapping counts as this process's memory until it is closed.
MOST_MAPPED = 64 * 2**20
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


class Stored(NamedTuple):
    """Where a tensor is and what it is; its values are read later."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: "BF16"

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * ITEM_BYTES.get(self.dtype, 1)


class TensorFiles(AbstractContextManager["TensorFiles"]):
    """The tensors of some files by name.

    Raises:
        DominoError: a file is damaged, or two have a tensor of one name.
    """

    def __init__(self, files: Iterable[Path]):
        self.stored: dict[str, Stored] = {}
        self._handles: dict[Path, Any] = {}
        self._mapped = 0
        for file in files:
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                part = handle.get_slice(name)
                if name in self.stored:
                    raise DominoError(
                        f"{name} is in {self.stored[name].file} and in {file.name}: it can't be told which is meant. "
                        "Leave only the files of one model in the folder."
                    )
                self.stored[name] = Stored(file, name, tuple(part.get_shape()), part.get_dtype())

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise DominoError(
                    f"{file} is not a whole safetensors file ({error}); it may be truncated: fetch it again."
                ) from None
        return self._handles[file]

    def read(self, tensor: Stored, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A copy of the tensor, or of the part that `index` has a slice for each axis of.

        Raises:
            DominoError: it can't be read, or its dtype is none that NumPy and JAX know.
        """
        try:
            handle = self._open(tensor.file)
            part = handle.get_tensor(tensor.name) if index is None else handle.get_slice(tensor.name)[index]
        except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
            raise DominoError(f"{tensor.name} in {tensor.file} can't be read: {first_line(error)}.") from None
        self._mapped += part.nbytes
        if self._mapped > MOST_MAPPED:
            self.close()
        return part

    def close(self) -> None:
        """Give the mappings back; reading opens the files again."""
        self._handles.clear()
        self._mapped = 0

    def __exit__(self, *_: object) -> None:
        self.close()
