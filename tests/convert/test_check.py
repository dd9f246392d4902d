"""A check that is broken off: by Ctrl-C anywhere, and by a reader that leaves."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import make_target
from safetensors.numpy import load_file, save_file

from convert import check
from convert.__main__ import main
from convert.tensors import SINGLE


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    make_target(folder, num_hidden_layers=1)
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """The same with a value that is NaN."""
    folder = tmp_path_factory.mktemp("broken")
    make_target(folder, num_hidden_layers=1)
    tensors = load_file(folder / SINGLE)
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


# Where the check is when Ctrl-C comes, and the last that is known then.
PLACES = {
    "folder_format": None,
    "tensor_files": "parameters",
    "account_tensors": "files",
    "compare_derived": "dtype",
    "_not_finite": "tensors",
    "load_tokenizer": "values",
    "end_tokens": "values",
    "_parity": "tokenizer",
    "load_weights": "tokenizer",
}


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupted_check_says_what_it_knows(sound, monkeypatch, capsys, place):
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, place, interrupt)
    assert main(["--check", str(sound)]) == 130
    out, err = capsys.readouterr()
    known = [line.split()[0] for line in out.splitlines()]
    last = PLACES[place]
    assert known[-1:] == ([last] if last else []) and "sound" not in out
    assert err == ("interrupted, what is known so far is above\n" if last else "interrupted\n")


def test_what_was_found_wrong_before_is_said_too(broken, monkeypatch, capsys):
    monkeypatch.setattr(check, "load_tokenizer", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["--check", str(broken)]) == 130
    assert "problem      model.norm.weight has 1 non-finite values of 32" in capsys.readouterr().out


@pytest.mark.parametrize("most", [0, 1, 10**6], ids=["unbuffered", "lines", "buffered"])
@pytest.mark.parametrize(("name", "code"), [("sound", 0), ("broken", 1)])
def test_the_exit_code_is_the_answer_whoever_reads(request, monkeypatch, capfd, name, code, most):
    """Standard output is a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(check, "_parity", lambda *_: "not compared")
    with os.fdopen(writer, "w", buffering=most or 1, encoding="utf-8") as stream:
        if most == 0:
            stream.reconfigure(write_through=True)
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["--check", str(request.getfixturevalue(name))]) == code
    monkeypatch.undo()
    assert "Traceback" not in capfd.readouterr().err
