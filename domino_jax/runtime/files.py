"""Files: JSON lines, writes that are whole or not there, what kind of output a folder is, and locks on outputs."""

import codecs
import fnmatch
import json
import mmap
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.parsing import KIND_BYTES, other_kind, parse_json

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None

LOCK = ".lock"  # of a folder
OutputKind = Literal["a training run", "captured features", "runs of an ablation", "a demo", "a model", "other files"]
# What tells them apart, the first that is there: a training run has a config.json, too.
MARKS: tuple[tuple[OutputKind, tuple[str, ...]], ...] = (
    ("a training run", ("settings.toml", "origin.json")),
    ("captured features", ("features.json",)),
    ("runs of an ablation", ("ablation.settings.json",)),
    ("a demo", ("demo.settings.json",)),
    ("a model", ("config.json", "*.safetensors", "tokenizer.json")),
    ("other files", ("*",)),
)
ARRAY = "is a JSON array: give one object a line (JSONL), as jq -c '.[]' writes it"
OBJECT = "begins with a JSON object over several lines: give one object a line (JSONL), as jq -c . writes it"


class JsonLine(NamedTuple):
    """One line of a JSON lines file."""

    value: Any
    where: str  # "FILE, line 3"
    start: int  # its first byte in the file


def read_jsonl(
    path: Path, what: str | None = None, *, invalid: str = "not JSON", lenient: bool = False
) -> Iterator[JsonLine]:
    """Each line that is not blank, parsed when it is reached; a byte order mark at the beginning is allowed.

    Args:
        what: what the file should hold ("prompts"), for the error of a file without lines; None allows an empty file.
        invalid: what a line that is not JSON is called in its error.
        lenient: leave such a line out instead, and allow NaN; for files that this project wrote itself.

    Raises:
        DominoError: the file can't be read, has no lines or is of another kind, or a line is not JSON.
    """
    end, found = 0, False
    try:
        with path.open("rb") as file:  # a line ends at \n alone: JSON may hold other line separators
            if kind := other_kind(file.peek(KIND_BYTES)[:KIND_BYTES]):
                raise DominoError(f"{path} {kind}.")
            for number, line in enumerate(file, 1):
                start, end = end, end + len(line)
                if not line.removeprefix(codecs.BOM_UTF8).strip():
                    continue
                first, found, where = not found, True, f"{path}, line {number}"
                try:
                    value = parse_json(line, nan=lenient)
                except ValueError as error:
                    if lenient:
                        continue
                    if first and (whole := _whole_file(line, error)) and any(map(bytes.strip, file)):
                        raise DominoError(f"{path} {whole}.") from None
                    raise DominoError(f"{where} is {invalid}: {_in_line(error)}.") from None
                if first and isinstance(value, list):
                    raise DominoError(f"{path} {ARRAY}.")
                yield JsonLine(value, where, start)
    except OSError as error:
        raise DominoError(f"{path} can't be read: {first_line(error)}.") from None
    if what and not found:
        raise DominoError(f"{path} has no {what}.")


def _whole_file(line: bytes, error: ValueError) -> str | None:
    """What the file is if its first line, which is not JSON, only begins a value that later lines may go on with."""
    begins = line.removeprefix(codecs.BOM_UTF8).strip()[:1]
    if not isinstance(error, json.JSONDecodeError) or error.pos < len(error.doc.rstrip(", \t\r\n")):
        return None
    return ARRAY if begins == b"[" else OBJECT if begins == b"{" else None


def _in_line(error: ValueError) -> str:
    """What a parser says about one line; it does not know which line that is."""
    return f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)


def whole_lines(path: Path) -> int:
    """How many bytes of a file come before its end, or before a last line that was cut off within."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return 0
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
            return held.rfind(b"\n") + 1


def read_line(path: Path, start: int) -> Any:
    """The JSON value of the line that begins at byte `start` of a file that `read_jsonl` has read."""
    with path.open("rb") as file:
        file.seek(start)
        return parse_json(file.readline())


@contextmanager
def write_atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which becomes `path` when the block ends: whole, or not at all.

    The block writes the temporary file. It is removed where the block raises.

    Raises:
        OSError: the file can't take its place.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to a file, whole or not at all."""
    with write_atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def user_cache() -> Path:
    """The user's folder for what can be made again; it need not exist, and for a user without a home it can't."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        home = Path(os.devnull)
    return home / "domino-jax"


def output_kind(folder: Path) -> OutputKind | None:
    """What a folder holds; None where it is missing or empty.

    What is hidden does not count (locks, and what killed processes left), nor does what an empty disk has.

    Raises:
        DominoError: it is a file, or can't be read.
    """
    try:
        names = [file.name for file in folder.iterdir() if not file.name.startswith(".") and file.name != "lost+found"]
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise DominoError(f"{folder} can't be written: it is a file, and is to be a folder.") from None
    except OSError as error:
        raise DominoError(f"{folder} can't be read: {first_line(error)}.") from None
    return next((kind for kind, marks in MARKS for mark in marks if fnmatch.filter(names, mark)), None)


def check_output(folder: Path, kind: OutputKind | None = None, sources: Iterable[Path] = ()) -> None:
    """Refuse a folder for an output that holds something else already, or that is a source or lies in one.

    Args:
        kind: what the folder may hold already, since the command goes on with it; nothing when None.
        sources: files and folders that the command reads.

    Raises:
        DominoError: it does, or is one.
    """
    source = source_at(folder, sources)
    if source is not None:
        raise DominoError(f"{folder} is to be written, and {source} there is read: give another folder.")
    found = output_kind(folder)
    if found not in (None, kind):
        rest = "" if kind is None else f", or of {kind}"
        raise DominoError(f"{folder} already holds {found}: give a folder that is new or empty{rest}.")


def source_at(path: Path, sources: Iterable[Path]) -> Path | None:
    """The source that an output at `path` would be written over or into, whatever links lead there; None if none."""
    real = Path(os.path.realpath(path))  # which lets a circle of links be
    for source in sources:
        place = Path(os.path.realpath(source))
        if real.is_relative_to(place):
            return source
        with suppress(OSError):
            if real.samefile(place):  # two names of one file
                return source
    return None


@contextmanager
def lock_folder(folder: Path, kind: OutputKind | None = None, sources: Iterable[Path] = ()) -> Iterator[None]:
    """Hold an output folder for this process alone until the block ends; makes it where it is missing.

    A folder that was made here and is still empty in the end is removed again.

    Args:
        kind, sources: see `check_output`.

    Raises:
        DominoError: another process holds it, it can't be written, or it is not to be written (see `check_output`).
    """
    sources = tuple(sources)
    check_output(folder, kind, sources)  # before a lock is left in what is another's
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DominoError(f"{folder} can't be written: {first_line(error)}.") from None
    try:
        with _lock(folder / LOCK, folder):
            check_output(folder, kind, sources)  # another process may have written it meanwhile
            yield
    finally:
        if made:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def lock_file(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold an output file for this process alone until the block ends, by a lock file beside it.

    Args:
        wait: until another process that holds it lets go, instead of refusing.

    Raises:
        DominoError: another process holds it, or its folder can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DominoError(f"{path} can't be written: {first_line(error)}.") from None
    with _lock(path.with_name(f".{path.name}{LOCK}"), path, wait):
        yield


@contextmanager
def _lock(path: Path, output: Path, wait: bool = False) -> Iterator[None]:
    handle = _locked(path, output, wait)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _locked(path: Path, output: Path, wait: bool) -> int:
    """The open lock file; the system lets go of the lock when the process ends, however it does."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise DominoError(f"{output} can't be written: {first_line(error)}.") from None
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            raise DominoError(
                f"{output} is being written by another process: wait until that ends, or give another place."
            ) from None
        except OSError:
            pass  # some network file systems have no locks; there, two processes are not told apart
        # Who held the lock before may have removed its file in between, and a removed file locks nobody out.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)
