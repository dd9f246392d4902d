"""`python -m infer.bench shares`: what is verified of a row is what each way says, and needs calibrated confidences."""

import json

import factory
import pytest

from infer.bench import shares
from infer.bench.shares import main

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture
def words(tmp_path) -> list[str]:
    factory.make_target(tmp_path / "target")
    factory.make_draft(tmp_path / "draft")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input_ids": [5 + i] * 12}) + "\n" for i in range(5)))
    words = ["--model", str(tmp_path / "target"), "--draft", str(tmp_path / "draft"), "--prompts", str(prompts)]
    return [*words, "--num-prompts", "5", "--batch-size", "2", "--prompt-tokens", "8", "--new-tokens", "12"]


def test_each_way_verifies_as_much_as_the_budget_says(words, tmp_path, capsys):
    config, out = tmp_path / "draft" / "config.json", tmp_path / "s.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps(raw | {"confidence_temperatures": [1.0] * 4}))
    assert main([*words, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [row["target_tokens"] for row in rows] == [2] * 3 + [3] * 3 + [4] * 3 + [5]
    for row in rows:
        budget = row["target_tokens"] - 1
        assert 1 <= row["tau"] <= row["drafts_verified"] + 1
        assert row["drafts_verified"] == budget, "each way spends the whole budget"
    assert "| T = 0, by confidence |" in capsys.readouterr().out


def test_a_drafter_that_is_not_calibrated_is_refused(words, capsys):
    assert main(words) == 1
    assert "python -m train calibrate" in capsys.readouterr().err


def test_what_was_measured_is_kept_by_ctrl_c(tmp_path, capsys, monkeypatch):
    row = {"way": "by confidence", "temperature": 0.0, "target_tokens": 4, "tau": 2.5}

    def measured(options):
        yield row
        raise KeyboardInterrupt

    monkeypatch.setattr(shares, "measure_shares", measured)
    assert main(["--json", str(tmp_path / "s.json")]) == 130
    assert json.loads((tmp_path / "s.json").read_text()) == [row]
    out, err = capsys.readouterr()
    assert "| T = 0, by confidence | 2.50 |" in out and "interrupted" in err
