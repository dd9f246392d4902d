"""Rows of training data from JSONL files, tables and datasets of the Hugging Face Hub, one at a time."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convert.identity import file_fingerprint
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.extras import explain_missing_extra
from domino_jax.runtime.files import read_jsonl

HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")
TABLES = {".parquet": "parquet", ".arrow": "arrow"}
LINES = (".jsonl", ".json", ".ndjson")


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
        return _table(source, TABLES[path.suffix], data_files=[str(path)], split="train")
    if path.is_dir():
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
        raise DominoError(f"the training data {source} can't be read: {first_line(error)}.") from None


def _table(source: str | Path, builder: str, **how: Any) -> Iterator[tuple[str, Any]]:
    """Rows of a table, without what a column has no value for."""
    table = iter(enumerate(_load(source, builder, **how), 1))
    while True:
        try:
            number, row = next(table)
        except StopIteration:
            return
        except Exception as error:  # as above
            raise DominoError(f"the training data {source} can't be read: {first_line(error)}.") from None
        yield f"{source} row {number}", _filled(row)


def _filled(value: Any) -> Any:
    """A value of a table without the keys that are None: a table has every column in every row."""
    if isinstance(value, Mapping):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [_filled(inner) for inner in value]
    return value
