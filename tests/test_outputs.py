"""Where commands write: never into what is something else's, never over what they read."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from domino_jax.errors import DominoError
from domino_jax.runtime.files import MARKS, check_output, output_kind, source_at

# Commands that write a folder: their words for an output, a model to read and a file to read; what they go on with.
FOLDERS: dict[str, tuple[str, Callable[[Path, Path, Path], list[object]], str | None]] = {
    "train": (
        "train.__main__",
        lambda out, model, file: ["--target", model, "--data", file, "--out", out],
        None,  # a run is gone on with by --resume
    ),
    "train capture": (
        "train.__main__",
        lambda out, model, file: ["capture", "--target", model, "--data", file, "--out", out],
        "captured features",
    ),
    "train pretrain": ("train.__main__", lambda out, model, file: ["pretrain", "--text", model, "--out", out], None),
    "train ablation": (
        "train.__main__",
        lambda out, model, file: (
            ["ablation", "--target", model, "--data", file, "--prompts", file, "--out", out, "--steps", 1]
        ),
        "runs of an ablation",
    ),
    "train demo": ("train.__main__", lambda out, model, file: ["demo", "--target", model, "--out", out], "a demo"),
    "convert": ("convert.__main__", lambda out, model, file: [model, out], None),
    "infer.bench checkpoints": (
        "infer.bench.command",
        lambda out, model, file: ["checkpoints", "--model", model, "--out", out],
        None,
    ),
}
SHARED = {  # folders of pictures, which may lie among other files
    "--plot": lambda out, model, file: ["--model", model, "--prompts", file, "--plot", out],
    "--profile": lambda out, model, file: ["--model", model, "--prompts", file, "--profile", out],
}
FILES: dict[str, tuple[str, Callable[[Path, Path, Path], list[object]]]] = {
    "infer --svg": (
        "infer.__main__",
        lambda out, model, file: ["--model", model, "--draft", model, "--prompts", file, "--show-drafts", "--svg", out],
    ),
    "infer.bench --json": ("infer.bench.command", lambda out, model, file: ["--prompts", file, "--json", out]),
    "infer.bench serve --json": (
        "infer.bench.command",
        lambda out, model, file: ["serve", "--prompts", file, "--json", out],
    ),
    "infer.bench checkpoints --json": (
        "infer.bench.command",
        lambda out, model, file: ["checkpoints", "--model", model, "--json", out],
    ),
    "infer.bench --quality --json": (
        "infer.bench.command",
        lambda out, model, file: ["--model", model, "--quality", f"set={file}", "--json", out],
    ),
    "train regenerate": (
        "train.__main__",
        lambda out, model, file: ["regenerate", "--target", model, "--data", file, "--out", out],
    ),
    "train instructions": (
        "train.__main__",
        lambda out, model, file: ["instructions", "--target", model, "--out", out],
    ),
    "train prompts": ("train.__main__", lambda out, model, file: ["prompts", "--tokenizer", model, "--out", out]),
    "train bench": ("train.__main__", lambda out, model, file: ["bench", "--out", out]),
}
TAKEN = {
    "a model": ("config.json",),
    "a training run": ("settings.toml", "config.json"),
    "captured features": ("features.json", "features-1.safetensors"),
    "runs of an ablation": ("ablation.settings.json", "joint-0"),
    "a demo": ("demo.settings.json", "target"),
    "other files": ("thesis.tex",),
}


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("mine")
    return folder


def contents(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text() if p.is_file() else "" for p in root.rglob("*")}


def refused(module: str, words: list[object], capsys: pytest.CaptureFixture[str], root: Path) -> str:
    """Run a command that must refuse with one sentence and leave everything as it was; returns what it says."""
    before = contents(root)
    status = import_module(module).main(list(map(str, words)))
    out, err = capsys.readouterr()
    assert contents(root) == before
    assert (status in (1, 2), out, err.count("\n")) == (True, "", 1), err
    assert err.startswith("error: ")
    return err


@pytest.fixture
def places(tmp_path) -> tuple[Path, Path, Path]:
    """The root, a model's folder and a file of data."""
    fill(tmp_path, "data.jsonl")
    return tmp_path, fill(tmp_path / "model", "config.json", "model.safetensors"), tmp_path / "data.jsonl"


@pytest.mark.parametrize("taken", TAKEN)
@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_that_holds_something_else_is_not_written(places, capsys, command, taken):
    root, model, file = places
    module, words, goes_on = FOLDERS[command]
    if taken == goes_on:
        pytest.skip("its own output, which it goes on with")
    out = fill(root / "out", *TAKEN[taken])
    said = refused(module, words(out, model, file), capsys, root)
    assert f"{out} already holds " in said and ("a run" if command == "train" else taken).split()[-1] in said


@pytest.mark.parametrize("flag", SHARED)
@pytest.mark.parametrize("taken", [kind for kind in TAKEN if kind != "other files"])
def test_pictures_and_traces_go_among_other_files_alone(places, capsys, flag, taken):
    root, model, file = places
    out = fill(root / "out", *TAKEN[taken])
    said = refused("infer.bench.command", SHARED[flag](out, model, file), capsys, root)
    assert f"{out} already holds {taken}: " in said


def other_words(source: Path, root: Path, kind: str) -> Path:
    """Another path to a folder, or into it."""
    if kind == "link":
        (root / "link").symlink_to(source)
        return root / "link"
    if kind == "link to its parent":
        (root / "up").symlink_to(source.parent)
        return root / "up" / source.name
    ways = {"dots": root / "nowhere" / ".." / source.name, "within": source / "out", "deep within": source / "a" / "b"}
    (root / "nowhere").mkdir()
    return ways[kind]


@pytest.mark.parametrize("way", ["link", "link to its parent", "dots", "within", "deep within"])
@pytest.mark.parametrize("command", [*FOLDERS, *SHARED])
def test_a_source_is_no_destination(places, capsys, monkeypatch, command, way):
    root, model, file = places
    module, words, _ = FOLDERS[command] if command in FOLDERS else ("infer.bench.command", SHARED[command], None)
    said = refused(module, words(other_words(model, root, way), model, file), capsys, root)
    assert "is to be written, and" in said and "is read" in said
    monkeypatch.chdir(root)
    assert "is read" in refused(module, words(Path("./model"), Path("model"), Path("data.jsonl")), capsys, root)


@pytest.mark.parametrize(
    "command", [name for name in FILES if name not in ("train bench", "train instructions", "train prompts")]
)
@pytest.mark.parametrize("way", ["itself", "link", "hard link", "dots"])
def test_a_file_that_is_read_is_not_written(places, capsys, command, way):
    root, model, file = places
    module, words = FILES[command]
    source = model / "config.json" if "checkpoints" in command else file
    out = root / "out.json"
    if way == "link":
        out.symlink_to(source)
    elif way == "hard link":
        out.hardlink_to(source)
    else:
        out = source if way == "itself" else source.parent / ".." / source.parent.name / source.name
    if "checkpoints" in command and way == "hard link":
        pytest.skip("of a file in a folder that is read; the folder alone is known")
    assert "is read" in refused(module, words(out, model, file), capsys, root)


@pytest.mark.parametrize("command", [name for name in FILES if name != "train regenerate"])
@pytest.mark.parametrize("taken", ["a model", "a training run", "captured features"])
def test_a_part_of_a_whole_folder_is_not_written_over(places, capsys, command, taken):
    root, model, file = places
    module, words = FILES[command]
    out = fill(root / "out", *TAKEN[taken])
    said = refused(module, words(out / TAKEN[taken][0], model, file), capsys, root)
    assert f"would be written over a part of {taken}: " in said


def test_answers_of_something_else_are_not_added_to(tmp_path):
    from train.regenerate.output import Answers

    out = fill(tmp_path, "notes.jsonl") / "notes.jsonl"
    with pytest.raises(DominoError, match="was not written by this command"):
        Answers(out, {}, {})
    assert contents(tmp_path) == {"notes.jsonl": "mine"}


@pytest.mark.parametrize("kind", TAKEN)
def test_a_folder_is_known_by_its_files(tmp_path, kind):
    fill(tmp_path / "a", *TAKEN[kind])
    assert output_kind(tmp_path / "a") == kind and kind in dict(MARKS)
    check_output(tmp_path / "a", kind)


def test_locks_and_what_a_disk_has_leave_a_folder_empty(tmp_path):
    (tmp_path / "lost+found").mkdir()
    fill(tmp_path, ".lock", ".DS_Store", ".model.1234.tmp")
    assert output_kind(tmp_path) is None is output_kind(tmp_path / "missing")
    check_output(tmp_path)
    fill(tmp_path, "file")
    with pytest.raises(DominoError, match="is a file"):
        check_output(tmp_path / "file")


def test_sources_that_are_missing_or_links_in_a_circle_are_no_error(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert source_at(tmp_path / "out", [tmp_path / "a", tmp_path / "missing"]) is None
    assert source_at(tmp_path / "model2", [tmp_path / "model"]) is None  # a name that begins alike


@pytest.mark.parametrize("what", ["data", "target", "steps", "config"])
def test_an_ablation_goes_on_with_its_own_settings_alone(tmp_path, monkeypatch, what):
    from train.evaluate import ablation

    monkeypatch.setattr(ablation, "_run", lambda *_: 0)
    monkeypatch.chdir(tmp_path)
    recipe = '[data]\ndata = ["x"]\n'
    (tmp_path / "other.toml").write_text(recipe)
    fill(tmp_path, "a.jsonl", "b.jsonl")
    words: dict[str, str] = {"target": "qwen3-4b", "data": "a.jsonl", "prompts": "a.jsonl", "out": "out", "steps": "3"}

    def run(**change: str) -> int:
        given = [(f"--{name}", value) for name, value in (words | change).items()]
        return ablation.main([word for pair in given for word in pair])

    assert run() == 0
    os.chdir("out")
    assert run(data=str(tmp_path / "a.jsonl"), out=str(tmp_path / "out")) == 0
    os.chdir(tmp_path)
    change = {"data": "b.jsonl", "target": "qwen3-8b", "steps": "4", "config": "other.toml"}[what]
    assert run(**{what: change}) == 1
