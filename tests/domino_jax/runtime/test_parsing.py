"""What people give as JSON, JSON lines, TOML and text: what is no such file is named, and JSON is read strictly."""

import bz2
import gzip
import io
import json
import lzma
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.hf import read_json
from convert.identity import model_fingerprint
from domino_jax.errors import DominoError
from domino_jax.runtime.files import read_jsonl
from domino_jax.runtime.parsing import MOST_NESTED, parse_json
from infer.bench import spread
from infer.bench.questions import read_sets
from infer.prompts import read_prompts
from train.data.sources import read_rows
from train.monitor.curves import read_metrics
from train.options import read_recipe
from train.regenerate.output import FollowedAnswers
from train.regenerate.prompts import Lines

ROW = b'{"input_ids": [1, 2], "loss_mask": [0, 1], "prompt": "hi"}\n'


def zipped(content: bytes) -> bytes:
    with zipfile.ZipFile(made := io.BytesIO(), "w") as file:
        file.writestr("data.jsonl", content)
    return made.getvalue()


def parquet(_: bytes) -> bytes:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({"prompt": ["hi"]}), made := io.BytesIO())
    return made.getvalue()


def arrow(_: bytes) -> bytes:
    import pyarrow

    table = pyarrow.table({"prompt": ["hi"]})
    with pyarrow.ipc.new_stream(made := io.BytesIO(), table.schema) as writer:
        writer.write_table(table)
    return made.getvalue()


# The readers of JSON lines, and those of one JSON or TOML text in a file.
LINES: dict[str, Callable[[Path], Any]] = {
    "infer --prompts": read_prompts,
    "train --data": lambda path: list(read_rows(path)),
    "train regenerate --data": lambda path: Lines(path, 9),
    "infer.bench --quality": lambda path: read_sets((f"a={path}",), None),
}
WHOLE: dict[str, Callable[[Path], Any]] = {
    "config.json": read_json,
    "infer.bench.spread": lambda path: spread._read_run(path),
    "train --config": read_recipe,
}
OTHERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "gzip": (gzip.compress, "is compressed by gzip: unpack it first"),
    "zip": (zipped, "is a zip archive: unpack it first"),
    "bzip2": (bz2.compress, "is compressed by bzip2: unpack it first"),
    "xz": (lzma.compress, "is compressed by xz: unpack it first"),
    "Parquet": (parquet, "is a Parquet table: give its name the ending .parquet"),
    "Arrow": (arrow, "is an Arrow table: give its name the ending .arrow"),
    "UTF-16": (lambda content: content.decode().encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
}


def said(reader: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(DominoError) as error:
        reader(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


@pytest.mark.parametrize("kind", OTHERS)
def test_every_reader_names_a_file_of_another_kind(tmp_path, kind):
    make, says = OTHERS[kind]
    path = tmp_path / "data.jsonl"
    path.write_bytes(make(ROW))
    for reader in (LINES | WHOLE).values():
        assert says in said(reader, path)


INDENTED = {
    "an array": (json.dumps([{"prompt": "hi"}], indent=1), "is a JSON array: give one object a line (JSONL)"),
    "an array in a line": ('[{"prompt": "hi"}, {"prompt": "ho"}]', "is a JSON array"),
    "an array, an object a line": ('[{"prompt": "hi"},\n{"prompt": "ho"}]\n', "is a JSON array"),
    "an array after a mark": ("\ufeff\n[\n]\n", "is a JSON array"),
    "an object": (json.dumps({"prompt": "hi"}, indent=4), "begins with a JSON object over several lines"),
    "objects": ('{\n "prompt": "hi"\n}\n' * 2, "begins with a JSON object over several lines"),
    "an object, broken late": ('{"prompt": "hi",\n"more": [1]}', "begins with a JSON object over several lines"),
}


@pytest.mark.parametrize("name", INDENTED)
def test_every_reader_of_lines_names_json_that_is_not_a_line_each(tmp_path, name):
    text, says = INDENTED[name]
    path = tmp_path / "data.jsonl"
    path.write_text(text, encoding="utf-8")
    for reader in LINES.values():
        assert f"{path} {says}" in said(reader, path)


@pytest.mark.parametrize("text", ['{"prompt": "h', "{", '{"prompt": ["a", ', "["])
def test_a_line_that_was_cut_off_is_named_as_that_line(tmp_path, text):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    for reader in LINES.values():
        assert f"{path}, line 1 is " in (found := said(reader, path)) and "line 1 column" not in found


STRICT = {
    "NaN": ('{"a": NaN}', "holds NaN"),
    "minus infinity": ('{"a": [-Infinity]}', "holds -Infinity"),
    "a number beyond floats": ('{"a": 1e999}', "holds 1e999"),
    "a key twice": ('{"b": {"a": 1, "c": 2, "a": 1}}', "gives the key 'a' twice"),
    "lists": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "is nested more than 200 deep"),
    "objects that Python still reads": ('{"a": ' * 300 + "1" + "}" * 300, "is nested more than 200 deep"),
    "objects that never end": ('{"a": ' * 100_000, "is nested more than 200 deep"),
}


@pytest.mark.parametrize("name", STRICT)
def test_json_is_read_strictly_in_every_file(tmp_path, name):
    text, says = STRICT[name]
    path = tmp_path / "config.json"
    path.write_text(text)
    for reader in (*LINES.values(), *list(WHOLE.values())[:2]):
        assert says in said(reader, path)
    assert not read_metrics(path)  # of a run's own, NaN is a figure, and what is no row is left out
    header = text.encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    path.write_text("{}")
    assert "is not a whole safetensors file" in said(lambda _: model_fingerprint(tmp_path), tmp_path)


@pytest.mark.parametrize("text", ["[[1], {}]", '{"a": {"a": 1}}', '"[[["', "1e308", "[" * 200 + "]" * 200, "null"])
def test_what_is_json_is_read(text):
    assert parse_json(text) == parse_json("\ufeff" + text) == parse_json(text.encode("utf-8-sig")) == json.loads(text)
    assert text.count("[") <= MOST_NESTED


def test_a_byte_order_mark_is_allowed_in_every_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + ROW)
    for name, reader in LINES.items():
        if name != "infer --prompts":
            assert reader(path)
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "hi"}\n')
    assert read_prompts(path)[0].text == "hi"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_bytes(b'\xef\xbb\xbftarget = "t"\n')
    assert read_recipe(path).target == "t"
    path.write_bytes(b"\xef\xbb\xbf")
    assert not list(read_jsonl(path))


WHOLE_FILES = [
    b'{"prompt": "hi", "input_ids": null}\n{"messages": [{"role": "user", "content": "x\\ud83d\\ude00"}]}\n',
    b'[data]\ndata = ["a"]\n[run]\nsteps = 3\n',
    b'[\n {\n  "batch": 1,\n  "mode": "lean",\n  "drafts": 0\n }\n]',
    b'{"row": 0, "turn": 1, "tokens": [1, 2]}\n{"step": 3, "loss": 1.5}\n',
]
PIECES = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r\n",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b"NaN",
    b"1e999",
]
PIECES += [b"\\", b"null", b"-", b"\x1f\x8b", b"PAR1", b"\xe2\x80\xa8", b"\x85", b"9" * 5000, b" ", b"=", b"'''", b"#"]


def damage(path: Path, rounds: int) -> None:
    """Change a few bytes of files, and give them to every reader: each reads them, or says in a sentence why not."""
    chance, refused = random.Random(rounds), 0
    others = {"metrics": read_metrics, "answers": FollowedAnswers}
    for _ in range(rounds):
        content = bytearray(chance.choice(WHOLE_FILES))
        for _ in range(chance.randint(1, 4)):
            place, how = chance.randrange(len(content) + 1), chance.random()
            if how < 0.15:
                del content[place:]
            else:
                noise = bytes(chance.randrange(256) for _ in range(chance.randint(1, 6)))
                width = chance.randint(1, 9) if how < 0.5 else 0
                content[place : place + width] = noise if how > 0.85 else chance.choice(PIECES)
        path.write_bytes(content)
        for reader in (LINES | WHOLE | others).values():
            try:
                reader(path)
            except DominoError as error:
                refused += 1
                assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 700
    assert refused > rounds


def test_damaged_files_are_read_or_refused_in_a_sentence(tmp_path):
    damage(tmp_path / "a", 100)


@pytest.mark.slow
def test_many_damaged_files_are_read_or_refused_in_a_sentence(tmp_path):
    damage(tmp_path / "a", 5000)


def test_rows_that_are_bytes_of_numbers_are_no_text(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(np.arange(9, dtype="<f4").tobytes())
    for reader in LINES.values():
        assert f"{path}, line 1 is" in said(reader, path)
