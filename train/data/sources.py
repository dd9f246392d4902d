"""Rows of training data from JSONL files, tables and datasets of the Hugging Face Hub, one at a time."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


def _table(source: str | Path, builder: str, **how: Any) -> Iterator[tuple[str, Any]]:
    """Rows through the `datasets` library, without what a column has no value for."""
    with explain_missing_extra():
        import datasets
    try:
        table = datasets.load_dataset(builder, **how)
        for number, row in enumerate(table, 1):
            yield f"{source} row {number}", _filled(row)
    except Exception as error:  # its errors are of many kinds, and all mean the same here
        raise DominoError(f"the training data {source} can't be read: {first_line(error)}.") from None


def _filled(value: Any) -> Any:
    """A value of a table without the keys that are None: a table has every column in every row."""
    if isinstance(value, Mapping):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [_filled(inner) for inner in value]
    return value
