"""What a model and its tokenizer are known again by."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert import hf, orbax
from convert.companions import text_files
from convert.tensors import open_tensors
from domino_jax.errors import DominoError, first_line

PIECE_BYTES = 4096  # bytes of a tensor's begin, middle and end that count
BLOCKS, BLOCK_BYTES = 64, 1 << 16  # of a file that is no safetensors


def model_fingerprint(folder: Path) -> str:
    """SHA-256 of a model's config and of pieces of its weights, for a Hugging Face, an Orbax or a run's folder.

    Of each tensor of safetensors the name, dtype, shape, and the first, middle and last 4 KiB count, however tensors
    are divided into files; of Orbax's files the names, the sizes, and blocks from all over each. Reading a whole model
    would take minutes. Trained weights differ there; a few values changed elsewhere are not noticed. The same weights
    have another fingerprint in the other form.

    Raises:
        DominoError: there is no config.json or there are no weights, or a file is damaged.
    """
    digest = hashlib.sha256(json.dumps(hf.read_json(folder / "config.json"), sort_keys=True).encode())
    places = [folder / name for name in (orbax.WEIGHTS, orbax.CHECKPOINTS) if (folder / name).is_dir()]
    if places and (orbax.is_orbax(folder) or orbax.is_run(folder)):
        for file in sorted(file for place in places for file in place.rglob("*") if file.is_file()):
            digest.update(file.relative_to(folder).as_posix().encode())
            digest.update(file_fingerprint(file).encode())
    else:
        for piece in _tensor_pieces(folder):
            digest.update(piece)
    return digest.hexdigest()


def _tensor_pieces(folder: Path) -> Iterator[bytes]:
    found = open_tensors(folder).stored
    for name in sorted(found):
        for tensor in found[name].sources:
            begin, end = tensor.begin, tensor.begin + tensor.bytes
            yield f"{tensor.name} {tensor.dtype} {list(tensor.shape)}".encode()
            try:
                with tensor.file.open("rb") as stream:
                    middle, last = max(begin, (begin + end - PIECE_BYTES) // 2), max(begin, end - PIECE_BYTES)
                    for place in sorted({begin, middle, last}):
                        stream.seek(place)
                        yield stream.read(min(PIECE_BYTES, end - place))
            except OSError as error:
                raise DominoError(f"{tensor.file} can't be read: {first_line(error)}.") from None


def file_fingerprint(file: Path) -> str:
    """SHA-256 of a file's size and of blocks from all over it; all of it, where it is small.

    Raises:
        DominoError: it can't be read.
    """
    try:
        size = file.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with file.open("rb") as data:
            for offset in (*range(0, size, max(BLOCK_BYTES, size // BLOCKS)), max(0, size - BLOCK_BYTES)):
                data.seek(offset)
                digest.update(data.read(BLOCK_BYTES))
    except OSError as error:
        raise DominoError(f"{file} can't be read: {first_line(error)}.") from None
    return digest.hexdigest()


def text_fingerprint(folder: Path) -> str:
    """SHA-256 of the files beside a model's weights that decide what it is asked and where it stops.

    These are its tokenizer's, its chat template, and generation_config.json.
    """
    digest = hashlib.sha256()
    for file in text_files(folder):
        digest.update(f"{file.relative_to(folder).as_posix()} {file_fingerprint(file)}\n".encode())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """SHA-256 of all that decides what a loaded tokenizer makes of text and of messages; None where that can't be told.

    That is the case for a tokenizer without the `tokenizers` library behind it.
    """
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    parts = [type(tokenizer).__name__, backend.to_str(), str(tokenizer.chat_template), json.dumps(special)]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
