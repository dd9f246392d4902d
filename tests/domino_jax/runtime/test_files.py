"""Files: JSON lines, writes that are whole or not there, and locks on outputs."""

import subprocess
import sys
from pathlib import Path

import pytest

from domino_jax.errors import DominoError
from domino_jax.runtime.files import lock_file, lock_folder, read_jsonl, read_line, whole_lines, write_atomic

ROOT = Path(__file__).parents[3]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_lines_say_where_they_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n"b\xe2\x80\xa8c"\r\n3')  # a byte order mark, blank lines, U+2028
    lines = list(read_jsonl(path, "rows"))
    assert [line.value for line in lines] == [{"a": 1}, "b\u2028c", 3]
    assert [line.where for line in lines] == [f"{path}, line {n}" for n in (1, 4, 5)]
    assert [read_line(path, line.start) for line in lines] == [line.value for line in lines]
    assert whole_lines(path) == 25


@pytest.mark.parametrize("line", ["{", "[" * 100_000, "\\", "nul"])
def test_a_line_that_is_not_json_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f"1\n{line}\n2\n")
    with pytest.raises(DominoError) as error:
        list(read_jsonl(path, "rows"))
    assert str(error.value).startswith(f"{path}, line 2 is not JSON: ") and "\n" not in str(error.value)
    assert [line.value for line in read_jsonl(path, lenient=True)] == [1, 2]


def test_a_file_that_is_missing_or_empty_is_named(tmp_path):
    with pytest.raises(DominoError, match="can't be read"):
        list(read_jsonl(tmp_path / "missing.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DominoError, match=r"empty\.jsonl has no prompts\."):
        list(read_jsonl(tmp_path / "empty.jsonl", "prompts"))
    assert not list(read_jsonl(tmp_path / "empty.jsonl"))
    (tmp_path / "nothing").write_text("")
    assert whole_lines(tmp_path / "nothing") == 0


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    with write_atomic(path) as first, write_atomic(path) as second:  # two writers do not share a temporary file
        first.write_text("1")
        second.write_text("2")
    assert path.read_text() == "1" and names(tmp_path) == ["a.json"]
    with pytest.raises(KeyboardInterrupt), write_atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "1" and names(tmp_path) == ["a.json"]


HOLDER = """
import sys, time
from pathlib import Path
from domino_jax.runtime.files import lock_file, lock_folder
with {lock}(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.e2e
@pytest.mark.parametrize(("lock", "name"), [(lock_folder, "run"), (lock_file, "deep/out.jsonl")])
def test_an_output_is_one_processs_until_it_ends_or_is_killed(tmp_path, lock, name):
    path = tmp_path / name
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(lock=lock.__name__), str(path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        for _ in range(2):  # a refusal leaves the lock where it is
            with pytest.raises(DominoError) as error, lock(path):
                pytest.fail("two processes hold it")
            assert str(error.value).startswith(f"{path} is being written by another process: ")
    finally:
        holder.kill()
        holder.wait()
    with lock(path), pytest.raises(DominoError), lock(path):
        pass
    with lock(path):
        pass
    assert [entry.name for entry in tmp_path.rglob("*") if entry.name.endswith("lock")] == []


def test_a_folder_that_is_made_for_nothing_is_removed(tmp_path):
    with lock_folder(tmp_path / "a"):
        pass
    with lock_folder(tmp_path / "b"):
        (tmp_path / "b" / "written").touch()
    (tmp_path / "c").mkdir()
    with lock_folder(tmp_path / "c"):
        pass
    assert names(tmp_path) == ["b", "c"]
    (tmp_path / "file").touch()
    with pytest.raises(DominoError, match="can't be written"), lock_folder(tmp_path / "file"):
        pass


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path):
    """Its last holder removes it; who opened it before that must not hold what nobody else can see."""
    with lock_file(tmp_path / "a"):
        (tmp_path / ".a.lock").unlink()
        with lock_file(tmp_path / "a"), pytest.raises(DominoError), lock_file(tmp_path / "a"):
            pass


def test_lines_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("1\n" + "{" * 10)
    assert next(read_jsonl(path)).value == 1
