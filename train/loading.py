"""Which target a command means, and whether it is the one of before."""

import hashlib
from pathlib import Path

from rich.console import Console

from convert import orbax, registry
from domino_jax.errors import DominoError

SAMPLES, SAMPLE_BYTES = 64, 1 << 16  # of each file, for `identity`


def find(target: str, flag: str = "--target") -> Path:
    """The folder of a target by a name such as qwen3-4b, a folder, or org/repo on the Hub, fetched where needed.

    Raises:
        DominoError: nothing is found under it, or fetching fails.
    """
    return registry.resolve_folders(target, registry.NO_DRAFT, Console(stderr=True), flag=flag)[0]


def identity(folder: Path) -> str:
    """A digest by which a model is known again: names and sizes of its files, and blocks from all over each.

    Blocks, since reading all of a large model takes longer than starting a run should. Files that decide neither what
    the model says nor what it is asked (a card, a licence) do not count.
    """
    digest = hashlib.sha256()
    kinds = {".safetensors", ".json", ".jinja", ".txt", ".model"}
    inner = [folder / orbax.WEIGHTS, folder / orbax.CHECKPOINTS]
    try:
        files = [file for file in folder.iterdir() if file.is_file() and file.suffix in kinds]
        files += [file for place in inner if place.is_dir() for file in place.rglob("*") if file.is_file()]
        for file in sorted(files):
            size = file.stat().st_size
            digest.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
            step = max(SAMPLE_BYTES, size // SAMPLES)
            with file.open("rb") as data:
                for offset in (*range(0, size, step), max(0, size - SAMPLE_BYTES)):
                    data.seek(offset)
                    digest.update(data.read(SAMPLE_BYTES))
    except OSError as error:
        raise DominoError(f"{folder} can't be read: {error}.") from None
    return digest.hexdigest()
