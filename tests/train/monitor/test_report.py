"""What people see of a run: metrics on disk, curves, the report, TensorBoard events, progress."""

import builtins
import io
import json
import struct
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console

from train.monitor import curves, events, progress, report
from train.monitor.progress import Progress

J = 4


def make_row(step: int, **more) -> curves.Row:
    return {
        "step": step,
        "loss": 4 - step / 100,
        "final_loss": 3.9 - step / 100,
        "base_loss": 4.1 - step / 100,
        "final_acceptance": 1 + step / 50,
        "base_acceptance": 1 + step / 80,
        "final_accuracy": step / 200,
        "base_accuracy": step / 300,
        "final_accuracy_by_position": [step / 100 / j for j in range(1, J + 1)],
        "base_accuracy_by_position": [step / 150 / j for j in range(1, J + 1)],
        "lambda": 1 - step / 100,
        "lr": 1e-3,
        "gradient_norm": 2.0,
        "tokens_per_second": 1000.0 * step if step > 10 else None,
        **more,
    }


@pytest.fixture
def rows() -> list[curves.Row]:
    made = [make_row(step) for step in range(10, 101, 10)]
    made[4] |= {"validation_tau": 2.5, "validation_tau_base": 1.5, "validation_estimated": 2.25}
    made[9] |= {"validation_tau": 2.45, "validation_tau_base": 1.75}
    return made


SETTINGS = {
    "target": Path("target"),
    "data": {"length": 3072, "features": None},
    "drafter": {"taps": (1, 9, 17), "head": True},
}


def test_metrics_are_read_past_a_line_that_was_cut_off_and_go_on_from_a_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert curves.read_metrics(path) == [] == curves.resume_metrics(path, 5)
    for step in range(1, 8):
        curves.append_metrics({"step": step, "loss": float("nan") if step == 7 else step / 2}, path)
    with path.open("ab") as file:
        file.write(b'{"step": 8, "tail": "\xce')  # the disk was full, within a letter
    assert [row["step"] for row in curves.read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["step"] for row in curves.resume_metrics(path, 5)] == [1, 2, 3, 4, 5]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    path.write_text('3\n{"loss": 1}\n{"step": 9}\n')
    assert curves.read_metrics(path) == [{"step": 9}]


def test_the_panels_hold_what_was_measured(rows):
    panels = {panel.title: panel for panel in curves.panels(rows)}
    steps = list(range(10, 101, 10))
    losses = panels["cross-entropy, nats"].lines
    assert losses["final"] == (steps, [3.9 - s / 100 for s in steps]) and set(losses) == {"final", "base", "λ-weighted"}
    acceptance = panels["acceptance length, tokens"]
    assert acceptance.lines["base, estimated"] == (steps, [1 + s / 80 for s in steps])
    assert acceptance.points == {
        "final, decoding": ([50, 100], [2.5, 2.45]),
        "base, decoding": ([50, 100], [1.5, 1.75]),
    }
    assert panels["tokens/s"].lines["tokens/s"][0] == steps[1:], "the first had no speed yet"
    assert panels["λ"].lines["λ"][1][-1] == 0 and panels["learning rate"].lines["learning rate"][1] == [1e-3] * 10
    assert panels["gradient norm"].log
    latest = panels["accuracy by proposal, latest"]
    assert latest.over == "proposal" and latest.lines["final"] == ([1, 2, 3, 4], [1, 1 / 2, 1 / 3, 1 / 4])
    over_time = curves.positions(rows)
    assert over_time is not None and over_time.steps == steps
    assert over_time.branches["base"][3] == [40 / 150 / j for j in range(1, J + 1)]


def test_rows_of_an_older_run_are_drawn_without_what_they_lack(tmp_path):
    old = [{"step": step, "loss": 3.0, "final_loss": 2.0} for step in (1, 2)]
    assert [panel.title for panel in curves.panels(old)] == ["cross-entropy, nats"]
    assert curves.positions(old) is None
    assert report.write_report(tmp_path, old, {}, 2) is None
    text = (tmp_path / "report.md").read_text()
    assert (tmp_path / "curves.png").exists() and "curves.png" in text and "positions.png" not in text
    assert "Warnings" not in text and "Validation" not in text
    assert report.write_report(tmp_path / "nothing", [], {}, 5) is not None, "there is no such folder"


@pytest.mark.filterwarnings("error")
def test_a_single_row_and_values_that_are_missing_can_be_drawn(tmp_path):
    first = {"step": 1, "gradient_norm": 0.0, "loss": float("nan"), "final_accuracy_by_position": [0.5, None]}
    second = {"step": 1, "validation_tau": 2.0, "base_accuracy_by_position": [0.25]}
    for rows in ([first], [first, second], [first, second, second | {"step": 2}]):
        assert report.write_report(tmp_path, rows, {}, 4) is None
    assert "| final | 0.500 |  |\n| base | 0.250 |  |" in (tmp_path / "report.md").read_text()


def test_a_report_is_written_whole_with_its_pictures(tmp_path, rows):
    assert (
        report.write_report(tmp_path, rows, SETTINGS, 200, seconds_left=3905, notes=["the target was too old."]) is None
    )
    assert {file.name for file in tmp_path.iterdir()} == {"report.md", "curves.png", "positions.png"}
    for name in ("curves.png", "positions.png"):
        picture = matplotlib.image.imread(tmp_path / name)
        assert picture.shape[0] > 200 and picture.shape[1] > 800
        assert picture[..., :3].std() > 0.02, "it is not blank"
    text = (tmp_path / "report.md").read_text()
    assert "Step 100 of 200 (50%): running, about 1:05:05 left." in text
    assert "- the target was too old." in text
    assert "| cross-entropy, nats | 2.9000 | 3.1000 |" in text
    assert "| true τ (decoding) | 2.450 | 1.750 |" in text
    assert "| gradient norm | 2.000 |" in text and "| tokens/s | 100,000 |" in text
    assert "| final | 1.000 | 0.500 | 0.333 | 0.250 |" in text
    assert "Best: τ 2.500 at step 50." in text
    assert "| 50 (best) | 2.500 | 1.500 | 2.250 |" in text
    assert "| 100 | 2.450 | 1.750 | 3.000 |" in text, "the estimate of the training stands in"
    assert "![curves](curves.png)" in text and "![positions](positions.png)" in text
    assert "| target | target |" in text and "| drafter.taps | 1 9 17 |" in text and "features" not in text
    assert "left" not in report.compose(rows, {}, 100, state="finished", seconds_left=0.0)


def test_the_best_validation_stays_in_the_list():
    rows = [{"step": s, "validation_tau": 3.0 if s in (2, 4) else 2.0} for s in range(1, 40)]
    text = report.compose(rows, {}, 40)
    assert "Best: τ 3.000 at step 2." in text and "| 2 (best) |" in text and "(best)" not in text.split("| 2 (best)")[1]
    assert "| 39 | 2.000 |" in text and "| 29 |" not in text


@pytest.mark.parametrize(
    ("newest", "word"),
    [
        ({"validation_tau": 1.2, "validation_tau_base": 1.1}, "thinking"),
        ({"validation_tau": 2.4, "validation_tau_base": 2.6}, "With its head"),
        ({"validation_tau": 2.2, "validation_tau_base": 1.5}, "below the best, 2.50 at step 50"),
        ({"validation_tau": 2.45, "validation_tau_base": 1.5}, None),
        ({"validation_tau": 1.2, "validation_estimated": 1.3}, "below the best"),
    ],
)
def test_warnings_say_what_to_look_at(rows, newest, word):
    rows[9] = make_row(100) | newest
    found = report.warnings(rows)
    assert any(word in sentence for sentence in found) if word else found == []
    assert any("thinking" in sentence for sentence in found) == (word == "thinking")


def records(path: Path) -> list[bytes]:
    """The records of a TFRecord file: length, its checksum, data, its checksum."""
    held, found = path.read_bytes(), []
    while held:
        (size,) = struct.unpack("<Q", held[:8])
        found.append(held[12 : 12 + size])
        held = held[16 + size :]
    return found


def shown(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard would show: a session's start hides what stood at its step and after."""
    from tensorboardX.proto import event_pb2

    made: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("*.tfevents.*")):
        for record in records(file):
            event = event_pb2.Event.FromString(record)  # type: ignore[attr-defined]
            if event.HasField("session_log") and event.session_log.status == 1:
                made = {tag: {s: v for s, v in line.items() if s < event.step} for tag, line in made.items()}
            for value in event.summary.value:
                made.setdefault(value.tag, {})[event.step] = value.simple_value
    return made


def test_events_can_be_read_back_and_a_resumed_run_hides_what_it_does_anew(tmp_path, rows):
    pytest.importorskip("tensorboardX")
    notes: list[str] = []
    first = events.Events(tmp_path / "tensorboard", 0, notes.append)
    for row in rows:
        first.write(row)
    before = shown(tmp_path / "tensorboard")  # without close, as when killed
    assert before["loss/final"][100] == pytest.approx(2.9) and len(before["loss/final"]) == 10
    assert before["acceptance/final_true"] == pytest.approx({50: 2.5, 100: 2.45})
    assert before["accuracy_final_by_proposal/04"][100] == pytest.approx(0.25)
    assert before["schedule/lambda"][100] == 0 and len(before["speed/tokens_per_second"]) == 9
    again = events.Events(tmp_path / "tensorboard", 60, notes.append)
    again.write(make_row(70, final_loss=9.0))
    again.close()
    again.write(make_row(80))  # a closed writer does nothing
    after = shown(tmp_path / "tensorboard")
    assert list(after["loss/final"]) == [10, 20, 30, 40, 50, 60, 70] and after["loss/final"][70] == 9.0
    assert list(after["acceptance/final_true"]) == [50]
    assert notes == []


def test_events_that_cannot_be_written_are_a_note(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    notes: list[str] = []
    (tmp_path / "file").write_text("")
    broken = events.Events(tmp_path / "file" / "tensorboard", 0, notes.append)
    broken.write(make_row(1))
    assert len(notes) == 1 and notes[0].startswith("no more TensorBoard events: ")
    full = events.Events(tmp_path / "full", 0, notes.append)
    monkeypatch.setattr(full._writer, "flush", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for step in (1, 2):
        full.write(make_row(step))
    full.close()
    assert len(notes) == 2 and "No space left" in notes[1]
    real = builtins.__import__

    def missing(name, *args):
        if name.startswith("tensorboardX"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    absent = events.Events(tmp_path / "absent", 0, notes.append)
    absent.write(make_row(1))
    absent.close()
    assert len(notes) == 3 and "domino-jax[train]" in notes[2] and not (tmp_path / "absent").exists()


def test_progress_is_lines_where_there_is_no_terminal(monkeypatch):
    out, now = io.StringIO(), [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with Progress(console=Console(file=out, width=60, soft_wrap=True)) as shown:
        shown.start(100, 10)
        shown.note("48 sequences [of 50]; from step 10")
        assert shown.seconds_left is None
        now[0] += 60  # compiling
        shown.advance(11)
        for step in range(12, 21):
            now[0] += 2
            shown.advance(step)
        shown.update(make_row(20, validation_tau=2.5, validation_tau_base=1.5))
        assert shown.seconds_left == pytest.approx(160)
    lines = out.getvalue().splitlines()
    assert lines[0] == "48 sequences [of 50]; from step 10"
    assert lines[1].startswith(
        "step 20/100  loss 3.800  final 3.700  base 3.900  acceptance 1.40 (base 1.25)  true τ 2.50"
    )
    assert lines[1].endswith("λ 0.80  lr 1.0e-03  20,000 tokens/s  0:02:40 left") and len(lines) == 2


def test_progress_is_a_bar_at_a_terminal():
    out = io.StringIO()
    with Progress("row", Console(file=out, force_terminal=True, width=150)) as shown:
        shown.start(20)
        shown.update(make_row(10))
        shown.note("a note")
        shown.update(make_row(20))
    text = out.getvalue()
    assert "row" in text and "20/20" in text and "loss 3.800" in text and "acceptance 1.40" in text
    assert text.index("a note") < text.rindex("20/20")
    assert "λ" not in text, "there is no room for everything"
