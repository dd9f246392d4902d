"""Rows of training data from JSONL files, tables and datasets of the Hugging Face Hub, one at a time."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convert.identity import file_fingerprint
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.extras import explain_missing_extra
from domino_jax.runtime.files import read_jsonl
from domino_jax.runtime.parsing import KIND_BYTES, other_kind

HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")
TABLES = {".parquet": "parquet", ".arrow": "arrow"}
LINES = (".jsonl", ".json", ".ndjson")
FORMS = {".parquet": "Parquet", ".arrow": "Arrow", ".csv": "CSV", ".tsv": "TSV", ".txt": "text"} | dict.fromkeys(
    LINES, "JSON lines"
)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # endings after one of FORMS, which the library unpacks in a folder
EXPECTED = "files of one form (JSON lines, Parquet, Arrow, CSV) with the same columns"
LISTED = 5  # files in a message


def read_rows(source: str | Path, split: str = "train") -> Iterator[tuple[str, Any]]:
    """Each row with the words that say where it stands.

    Args:
        source: a JSONL file; a .parquet or .arrow file, or a folder that the `datasets` library reads; or a dataset of
            the Hub, `org/name` or `org/name:config`.
        split: which part of a dataset; a file has none.

    Raises:
        DominoError: the source is missing or can't be read, or a line is not JSON.
    """
    path, hub = Path(source), HUB_NAME.fullmatch(str(source))
    if path.is_file() and path.suffix in TABLES:
        _check_table(path)
        return _table(source, TABLES[path.suffix], data_files=[str(path)], split="train")
    if path.is_dir():
        _check_folder(path)
        return _table(source, str(path), split=split)
    if path.exists() or hub is None or path.suffix in (*LINES, *TABLES):
        return ((line.where, line.value) for line in read_jsonl(path, invalid="not a training sequence"))
    return _table(source, hub["name"], name=hub["config"], split=split)


def source_fingerprint(source: str | Path, split: str = "train") -> list[str] | None:
    """What the data of a source is known again by: its files' sizes, times and pieces; None where it has no files.

    Raises:
        DominoError: the source is missing or can't be read.
    """
    path, hub = Path(source), HUB_NAME.fullmatch(str(source))
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    elif path.exists() or hub is None or path.suffix in (*LINES, *TABLES):
        files = [path]
    else:
        table = _load(source, hub["name"], name=hub["config"], split=split)
        files = [Path(file["filename"]) for file in table.cache_files]
    found = [f"{file_fingerprint(file)} {file.stat().st_mtime_ns}" for file in files]
    return [split, *found] if found else None


def _load(source: str | Path, builder: str, **how: Any) -> Any:
    """A table of the `datasets` library."""
    with explain_missing_extra():
        import datasets
    try:
        return datasets.load_dataset(builder, **how)
    except Exception as error:  # its errors are of many kinds, and all mean the same here
        raise DominoError(_unreadable(source, error)) from None


def _unreadable(source: str | Path, error: Exception) -> str:
    """Why a table can't be read: what its library says, and what was behind that."""
    deepest: BaseException = error
    while (cause := deepest.__cause__ or deepest.__context__) is not None:
        deepest = cause
    said = first_line(error)
    said = first_line(deepest) if said.startswith("An error occurred") else said
    more = ""
    folder = Path(source)
    if folder.is_dir() and (files := data_files(folder)):
        more = f"; expected {EXPECTED}, found {_names(files, folder)}"
    return f"the training data {source} can't be read: {said}{more}."


def _check_table(path: Path) -> None:
    """Refuse what only has a table's name.

    Raises:
        DominoError: it is something else, or can't be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(KIND_BYTES)
    except OSError as error:
        raise DominoError(f"{path} can't be read: {first_line(error)}.") from None
    found = other_kind(head)
    if found and FORMS[path.suffix] in found:
        return
    raise DominoError(f"{path} {found or f'has the name of a table, and is none ({FORMS[path.suffix]})'}.")


def data_files(folder: Path) -> list[Path]:
    """The files of a folder that the library may take for data: those of a form that it knows."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and _form(file) and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def _form(file: Path) -> str | None:
    stem = file.with_suffix("") if file.suffix in COMPRESSED else file
    return FORMS.get(stem.suffix)


def _check_folder(folder: Path) -> None:
    """Refuse a folder of several forms: the library reads the most frequent one, and leaves out the others silently.

    Raises:
        DominoError: there are several, and no README.md that says which are to be read.
    """
    readme = folder / "README.md"
    if readme.is_file() and "configs:" in readme.read_text(encoding="utf-8", errors="replace"):
        return
    files = data_files(folder)
    first = {_form(file): file for file in reversed(files)}
    if len(first) > 1:
        found = _names(sorted(first.values()), folder)
        raise DominoError(
            f"{folder} holds files of several forms ({found}): expected {EXPECTED}; give its files by name."
        )


def _names(files: list[Path], folder: Path) -> str:
    return ", ".join(str(f.relative_to(folder)) for f in files[:LISTED]) + (" ..." if len(files) > LISTED else "")


def _table(source: str | Path, builder: str, **how: Any) -> Iterator[tuple[str, Any]]:
    """Rows of a table, without what a column has no value for."""
    table = iter(enumerate(_load(source, builder, **how), 1))
    while True:
        try:
            number, row = next(table)
        except StopIteration:
            return
        except Exception as error:  # as above
            raise DominoError(_unreadable(source, error)) from None
        yield f"{source} row {number}", _filled(row)


def _filled(value: Any) -> Any:
    """A value of a table without the keys that are None: a table has every column in every row."""
    if isinstance(value, Mapping):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [_filled(inner) for inner in value]
    return value
