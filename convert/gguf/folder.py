"""A GGUF file as a folder like Hugging Face's: its config, tokenizer and template as files, its weights by a link.

The folder lies in the user's cache and is made once for a file. All that reads models reads folders.
"""

import atexit
import hashlib
import json
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from convert.gguf.config import config_json
from convert.gguf.container import Header, read_gguf_header
from convert.gguf.tensors import packed_tensors
from convert.gguf.tokenizer import PREFIX, Vocabulary
from convert.safetensors import TensorFiles
from domino_jax.errors import DominoError, first_line
from domino_jax.fields import Fields, number
from domino_jax.runtime.files import user_cache

SUFFIX = ".gguf"
GGUF_FILES = f"*{SUFFIX}"
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
FORM = 1  # of what is made; another makes the folders anew
SAMPLING = {  # general.sampling's names, and those of generation_config.json
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def as_folder(path: Path) -> Path:
    """The folder of a model that is given as a GGUF file, or as a folder with one and no config.json; else `path`.

    Raises:
        DominoError: the file is damaged or not supported, or the folder holds several models.
    """
    try:
        if path.suffix == SUFFIX and not path.is_dir():
            return _folder_of(gguf_parts(path))
        if path.is_dir() and not (path / "config.json").exists() and (files := gguf_files(path)):
            return _folder_of(files)
    except OSError as error:
        raise DominoError(f"{path} can't be read: {first_line(error)}.") from None
    return path


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files of a folder's model, the first with its metadata; none where it has none.

    Raises:
        DominoError: they are of several models, or a part is missing.
    """
    found = sorted(folder.glob(GGUF_FILES))
    names = {match[1] if (match := PART.fullmatch(file.name)) else file.name for file in found}
    if len(names) > 1:
        raise DominoError(
            f"{folder} holds the GGUF files of {len(names)} models ({', '.join(sorted(names)[:4])}): name one of the "
            "files."
        )
    return gguf_parts(found[0]) if found else []


def gguf_names(name: str) -> list[str]:
    """The names of all files of the model that a GGUF file of this name is, or is a part of, in their order."""
    match = PART.fullmatch(name)
    if not match:
        return [name]
    return [f"{match[1]}-{part:05}-of-{match[3]}{SUFFIX}" for part in range(1, int(match[3]) + 1)]


def gguf_parts(file: Path) -> list[Path]:
    """All files of the model that a GGUF file is, or is a part of, in their order.

    Raises:
        DominoError: one is missing.
    """
    names = gguf_names(file.name)
    # In a folder that was made here they are links, and errors name what they lead to.
    parts = [part.readlink() if _is_ours(part) else part for part in map(file.with_name, names)]
    missing = next((part for part in parts if not part.exists()), None)
    if missing is not None:
        more = f"; {file.name} is a part of a model." if len(names) > 1 else "."
        raise DominoError(f"{missing} does not exist{more}")
    return parts


def _is_ours(file: Path) -> bool:
    return file.is_symlink() and user_cache() in file.parents


def open_gguf(files: list[Path], first: Header | None = None) -> TensorFiles:
    """The tensors of a model's GGUF files, by Hugging Face's names.

    Args:
        first: the header of the first file, where it has been read.

    Raises:
        DominoError: a file is damaged, or has values that can't be dequantized.
    """
    first = first or read_gguf_header(files[0])
    return TensorFiles(files, lambda file: packed_tensors(first if file == files[0] else read_gguf_header(file), first))


def _folder_of(files: list[Path]) -> Path:
    state = [(str(file.absolute()), (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([FORM, *state]).encode()).hexdigest()[:16]
    folder = user_cache() / "gguf" / key / files[0].stem
    if not folder.is_dir():
        made = _texts(files)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = folder.with_name(f".{secrets.token_hex(4)}")
            _write(partial, made, files)
            try:
                partial.rename(folder)
            except OSError:  # another process was sooner
                shutil.rmtree(partial, ignore_errors=True)
                if not folder.is_dir():
                    raise
        except OSError:  # no place for it: for this process alone
            home = Path(tempfile.mkdtemp(prefix="domino-gguf-"))
            atexit.register(shutil.rmtree, home, ignore_errors=True)
            folder = home / files[0].stem
            _write(folder, made, files)
    return folder


def _write(folder: Path, texts: dict[str, str], files: Iterable[Path]) -> None:
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for file in files:
        (folder / file.name).symlink_to(file.absolute())


def _texts(files: list[Path]) -> dict[str, str]:
    """The files of the folder beside its weights, by name."""
    header = read_gguf_header(files[0])
    tensors = open_gguf(files, header)
    count = header.metadata.get("split.count", 0)
    if count not in (0, len(files)):
        raise DominoError(f"{files[0]} is one of {count} parts, and must be named as NAME-00001-of-{count:05}{SUFFIX}.")
    config, generation = config_json(header, tensors.stored), _sampling(header)
    made: dict[str, Any] = {}
    if f"{PREFIX}tokens" in header.metadata:
        vocabulary = Vocabulary(str(header.file), header.metadata)
        if len(vocabulary.tokens) > config["vocab_size"]:
            raise DominoError(
                f"{header.file} has {len(vocabulary.tokens)} tokens and embeddings of {config['vocab_size']}."
            )
        made = vocabulary.files(config["max_position_embeddings"])
        ids = {name: vocabulary.tokens.index(token) for name in ("bos", "eos") if (token := vocabulary.token(name))}
        config |= {f"{name}_token_id": number for name, number in ids.items()}
        generation |= {"eos_token_id": vocabulary.ends()}
    return {"config.json": json.dumps(config, indent=2), "generation_config.json": json.dumps(generation), **made}


def _sampling(header: Header) -> dict[str, Any]:
    fields = Fields(str(header.file), ("", header.metadata))
    found = {ours: fields.get(f"general.sampling.{theirs}", number(), None) for theirs, ours in SAMPLING.items()}
    return {name: value for name, value in found.items() if value is not None}
