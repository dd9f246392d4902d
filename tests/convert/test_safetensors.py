"""Safetensors files that are damaged, vanish or change: a sentence that names file and tensor, whatever reads them."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from factory import make_target
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from convert import hf, safetensors
from convert.__main__ import main
from convert.check import check_folder
from convert.folders import convert_folder
from convert.identity import model_fingerprint
from convert.safetensors import LARGEST_HEADER, Stored, TensorFiles, stored_tensors
from convert.tensors import SINGLE, open_tensors
from domino_jax.errors import DominoError

Header = dict[str, Any]
NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"  # [32] and [260, 32] float32


def write(file: Path, header: Header | bytes, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(header: Header, **changes: Any) -> bytes:
    """The header with fields of the norm's weight changed, or without them (...)."""
    changed = {key: value for key, value in (header[NORM] | changes).items() if value is not ...}
    return json.dumps(header | {NORM: changed}).encode()


def moved(by: int, grow: int = 0) -> Callable[[Header, bytes], tuple[bytes, bytes]]:
    def change(header: Header, data: bytes) -> tuple[bytes, bytes]:
        begin, end = header[NORM]["data_offsets"]
        return entry(header, data_offsets=[begin + by, end + by + grow]), data

    return change


def fields(**changes: Any) -> Callable[[Header, bytes], tuple[bytes, bytes]]:
    return lambda header, data: (entry(header, **changes), data)


def text(change: Callable[[bytes], bytes]) -> Callable[[Header, bytes], tuple[bytes, bytes]]:
    return lambda header, data: (change(json.dumps(header).encode()), data)


# How a sound file's header and data are changed, and what is said.
DAMAGES: dict[str, tuple[Callable[[Header, bytes], tuple[Any, ...]], str]] = {
    "an empty file": (lambda h, d: (), "it has 0 bytes and is too short for a header; it may be truncated"),
    "a length alone": (lambda h, d: (b"", b"", 700), "would have a header of 700 bytes; it may be truncated"),
    "the longest length": (lambda h, d: (h, d, 2**64 - 1), "would have a header of 18446744073709551615 bytes"),
    "a length into the data": (lambda h, d: (h, d, len(json.dumps(h)) + 9), "its header is not"),
    "a length that cuts the header": (lambda h, d: (h, d, len(json.dumps(h)) - 9), "its header is not JSON ("),
    "no length": (lambda h, d: (h, d, 0), "its header is not JSON ("),
    "data cut short": (lambda h, d: (h, d[:-3]), "it may be truncated"),
    "data too long": (lambda h, d: (h, d + b"12345"), "the last 5 of its bytes are no tensor's"),
    "bytes that are no UTF-8": (
        text(lambda t: t.replace(b"norm", b"n\xfarm", 1)),
        "its header is not UTF-8, from",
    ),
    "UTF-16": (lambda h, d: (json.dumps(h).encode("utf-16"), d), "its header is not UTF-8"),
    "a list": (lambda h, d: (json.dumps([h]).encode(), d), "its header is a list, and an object is expected"),
    "a key twice": (text(lambda t: t[:-1] + b"," + t[1:]), "twice"),
    "a field twice": (text(lambda t: t.replace(b'{"dtype"', b'{"dtype": "F16", "dtype"', 1)), "the key 'dtype' twice"),
    "a NaN": (fields(shape=[np.nan]), "it holds NaN"),
    "nesting": (text(lambda t: b'{"a":' * 5000 + t + b"}" * 5000), "nested"),
    "a tensor that is null": (lambda h, d: (h | {NORM: None}, d), f"its header gives {NORM} as null"),
    "an unknown dtype": (fields(dtype="F33"), f"{NORM} has the dtype 'F33', which is none of safetensors'"),
    "a dtype of another library": (fields(dtype="float32"), f"{NORM} has the dtype 'float32'"),
    "no dtype": (fields(dtype=...), f"{NORM} has the dtype None"),
    "another dtype": (fields(dtype="F16"), f"{NORM} has 128 bytes, and F16 of shape [32] takes 64"),
    "a negative size": (fields(shape=[-1, -32]), f"{NORM} has the shape [-1, -32], expected a list of sizes"),
    "a size with a fraction": (fields(shape=[32.0]), f"{NORM} has the shape [32.0]"),
    "a size that is true": (fields(shape=[True, 32]), f"{NORM} has the shape [True, 32]"),
    "sizes that overflow": (fields(shape=[2**40, 2**40]), f"{NORM} has 128 bytes, and F32 of shape"),
    "a shape of other bytes": (fields(shape=[31]), f"{NORM} has 128 bytes, and F32 of shape [31] takes 124"),
    "no shape": (fields(shape=...), f"{NORM} has the shape None"),
    "a shape that is a number": (fields(shape=32), f"{NORM} has the shape 32"),
    "negative offsets": (fields(data_offsets=[-128, 0]), f"{NORM} has the data_offsets [-128, 0], which is no range"),
    "offsets backwards": (fields(data_offsets=[128, 0]), f"{NORM} has the data_offsets [128, 0], which is no range"),
    "three offsets": (fields(data_offsets=[0, 1, 2]), f"{NORM} has the data_offsets [0, 1, 2], expected"),
    "offsets as text": (fields(data_offsets=["0", "128"]), f"{NORM} has the data_offsets ['0', '128'], expected"),
    "offsets that overlap": (moved(-8), "share bytes"),
    "offsets beyond the file": (moved(10**12), "no tensor's"),
    "one byte more": (moved(0, 1), f"{NORM} has 129 bytes"),
    "a tensor's bytes without the tensor": (
        lambda h, d: ({name: value for name, value in h.items() if name != NORM}, d),
        "no tensor's",
    ),
    "metadata that is a list": (lambda h, d: (h | {"__metadata__": [1]}, d), "not a whole safetensors file"),
    "a name that breaks the line": (lambda h, d: (h | {"a\nb" * 40: {"dtype": "F32"}}, d), "has the shape None"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[Path, Header, bytes]:
    folder = tmp_path_factory.mktemp("sound")
    make_target(folder, tokenizer=False, num_hidden_layers=1)
    whole = (folder / SINGLE).read_bytes()
    size = 8 + struct.unpack("<Q", whole[:8])[0]
    return folder, json.loads(whole[8:size]), whole[size:]


READERS: dict[str, Callable[[Path], Any]] = {
    "load": lambda folder: hf.load_hf(folder, hf.parse_config(hf.read_json(folder / "config.json"))),
    "convert": lambda folder: convert_folder(folder, folder.parent / "converted"),
    "fingerprint": model_fingerprint,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_sentence_that_names_it(sound, tmp_path, damage, capsys):
    source, header, data = sound
    change, says = DAMAGES[damage]
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    # As the Hub's cache has it, whose folders hold links.
    blob, file = tmp_path / "blob", folder / SINGLE
    changed = change(header, data)
    write(blob, *changed) if changed else blob.write_bytes(b"")
    file.symlink_to(blob)
    for read in READERS.values():
        with pytest.raises(DominoError) as caught:
            read(folder)
        said = str(caught.value)
        assert said.startswith(f"{file} is not a whole safetensors file: ") and said.endswith("; fetch it again.")
        assert says in said and "\n" not in said and len(said) < 400
    assert not (tmp_path / "converted").exists()
    assert main(["--check", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert (
        f"{file} is not a whole safetensors file: " in out and says in out and "1 problems" in out and not err.strip()
    )


def test_the_damages_are_damages(sound, tmp_path):
    """safetensors' own reader takes none of them."""
    _, header, data = sound
    taken = []
    for name, (change, _) in DAMAGES.items():
        changed = change(header, data)
        write(tmp_path / "file", *changed) if changed else (tmp_path / "file").write_bytes(b"")
        try:
            with safe_open(tmp_path / "file", framework="numpy"):
                taken.append(name)
        except (SafetensorError, OSError):
            pass
    assert taken == []


def test_a_header_is_read_as_the_library_reads_it(tmp_path):
    rng, file = np.random.default_rng(0), tmp_path / "file.safetensors"
    dtypes = ("float32", "float16", "float64", "int64", "uint8", "bool", "int16", "uint32")
    shapes = [(3, 4), (), (0, 5), (7,), (2, 1, 3), (1,), (5,), (2, 2)]
    tensors = {
        f"{dtype} {shape}": rng.integers(0, 2, shape).astype(dtype) for dtype, shape in zip(dtypes, shapes, strict=True)
    }
    save_file(tensors, file, metadata={"format": "pt"})
    whole = file.read_bytes()
    found = {stored.name: stored for stored in stored_tensors(file)}
    assert found.keys() == tensors.keys()
    with safe_open(file, framework="numpy") as theirs:
        for name, stored in found.items():
            part = theirs.get_slice(name)
            assert (list(stored.shape), stored.dtype) == (part.get_shape(), part.get_dtype())
            assert whole[stored.begin : stored.begin + stored.bytes] == tensors[name].tobytes()


def test_a_header_that_is_too_long_is_not_read(tmp_path):
    file = tmp_path / "file.safetensors"
    with file.open("wb") as stream:  # a sparse file
        stream.write(struct.pack("<Q", LARGEST_HEADER + 1))
        stream.truncate(LARGEST_HEADER + 9)
    with pytest.raises(DominoError, match=f"its header would have {LARGEST_HEADER + 1} bytes, and {LARGEST_HEADER}"):
        stored_tensors(file)


def other(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


MEANWHILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "deleted": (Path.unlink, "can't be read: no such file or directory"),
    "moved away": (lambda file: file.rename(file.with_name("elsewhere")), "can't be read: no such file or directory"),
    "replaced by another": (other, "changed while it was read"),
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:-9]), "changed while it was read"),
    "emptied": (lambda file: file.write_bytes(b""), "changed while it was read"),
    "appended to": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "changed while it was read"),
    "a folder now": (lambda file: (file.unlink(), file.mkdir()), "changed while it was read"),
}


@pytest.mark.parametrize("way", MEANWHILE)
def test_a_file_that_vanishes_or_changes_while_it_is_read_is_a_sentence(sound, tmp_path, monkeypatch, way):
    source, header, data = sound
    change, says = MEANWHILE[way]
    plain, read = TensorFiles.read, []

    def meanwhile(self: TensorFiles, *arguments: Any) -> np.ndarray:
        read.append(arguments)
        if len(read) == 3:
            change(tmp_path / "model" / SINGLE)
        return plain(self, *arguments)

    monkeypatch.setattr(TensorFiles, "read", meanwhile)

    def begin() -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        read.clear()
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        if (folder / SINGLE).is_dir():
            (folder / SINGLE).rmdir()
        write(folder / SINGLE, header, data)
        return folder

    for reader in ("load", "convert"):
        with pytest.raises(DominoError, match=says) as caught:
            READERS[reader](begin())
        assert SINGLE in str(caught.value) and "\n" not in str(caught.value)
    report = check_folder(begin())
    assert [problem for problem in report.problems if says in problem] == report.problems != []
    assert ("tensors", "13 found, 13 expected") in report.lines


def test_a_file_that_vanishes_before_it_is_opened_is_a_sentence(sound, tmp_path, monkeypatch):
    source, header, data = sound
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    write(tmp_path / SINGLE, header, data)
    monkeypatch.setattr("convert.tensors.tensor_files", lambda folder: [folder / SINGLE, folder / "gone.safetensors"])
    with pytest.raises(DominoError, match=r"gone\.safetensors can't be read: no such file or directory"):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    "cut",
    [
        lambda file: os.truncate(file, file.stat().st_size // 2),
        lambda file: os.truncate(file, 0),
        lambda file: os.truncate(file, 100),
    ],
    ids=["half", "to nothing", "within the header"],
)
@pytest.mark.parametrize("index", [None, (slice(3, None), slice(None)), (slice(None), slice(2, 5))], ids=str)
def test_a_file_that_is_cut_within_a_read_is_a_sentence(tmp_path, monkeypatch, cut, index):
    """Where a mapping of the file would end the process (SIGBUS)."""
    file = tmp_path / "file.safetensors"
    save_file({"a": np.ones((4096, 64), np.float32)}, file)
    files = TensorFiles([file])
    plain = Stored.read

    def read(*arguments: Any) -> np.ndarray:
        cut(file)
        return plain(*arguments)

    monkeypatch.setattr(Stored, "read", read)
    with pytest.raises(DominoError, match="changed while it was read"):
        files.read(files.stored["a"], index)


@pytest.mark.parametrize("block", [1, 100, 2**20], ids="blocks of {} bytes".format)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fn", "float16", "int8", "bool"])
def test_parts_of_a_tensor_are_what_numpy_cuts_out_of_the_whole(tmp_path, monkeypatch, block, dtype):
    monkeypatch.setattr(safetensors, "BLOCK_BYTES", block)
    rng, file = np.random.default_rng(0), tmp_path / "file.safetensors"
    tensors = {
        str(shape): rng.integers(0, 2, shape).astype(jnp.dtype(dtype)) for shape in ((7, 6, 5), (9, 4), (8,), ())
    }
    save_file(tensors | {"empty": np.zeros((0, 3), np.float32)}, file)
    files = TensorFiles([file])
    assert files.read(files.stored["empty"]).shape == (0, 3)
    for name, whole in tensors.items():
        stored = files.stored[name]
        for _ in range(10):
            bounds = [sorted(rng.integers(0, size + 1, 2).tolist()) for size in whole.shape]
            index = tuple(slice(*pair) if rng.random() < 0.7 else slice(None) for pair in bounds)
            found = files.read(stored, index)
            assert found.dtype == whole.dtype and found.shape == whole[index].shape
            np.testing.assert_array_equal(found, whole[index])
        np.testing.assert_array_equal(files.read(stored), whole)
