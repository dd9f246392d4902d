"""`python -m infer.bench samplers`: every exact way gives the sample of plain steps, and rows say what was accepted."""

import json

import factory
import pytest

from infer.bench import samplers
from infer.bench.samplers import PLAIN, main

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_compilation")]


@pytest.mark.slow
def test_what_is_coupled_gives_the_sample_of_plain_steps(tmp_path, capsys):
    target, draft, out = tmp_path / "target", tmp_path / "draft", tmp_path / "s.json"
    factory.make_target(target)
    factory.make_draft(draft)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input_ids": [5 + i] * 12}) + "\n" for i in range(4)))
    words = ["--model", str(target), "--draft", str(draft), "--prompts", str(prompts), "--json", str(out)]
    words += ["--num-prompts", "4", "--batch-size", "2", "--prompt-tokens", "8", "--new-tokens", "12", "--seeds", "2"]
    assert main([*words, "--temperatures", "0", "1", "--trees", "3"]) == 0
    rows = json.loads(out.read_text())
    assert [row["way"] for row in rows if row["temperature"] == 0] == [PLAIN, "chain of 4", "tree of 3"]
    sampled = [row["way"] for row in rows if row["temperature"] == 1]
    chains = [f"chain of 4, {how}" for how in ("rejection", "coupled", "greedy drafts")]
    assert sampled == [PLAIN, *chains, "tree of 3, likeliest", "tree of 3, coupled"]
    for row in rows:
        assert row["same_answers_as_plain"] is (None if "rejection" in row["way"] else True), row["way"]
        assert (row["tau"] is None) == (row["way"] == PLAIN) and len(row["tau_of_seeds"]) == 2
    assert "| chain of 4, greedy drafts |  |" in capsys.readouterr().out


def test_what_was_measured_is_kept_by_ctrl_c(tmp_path, capsys, monkeypatch):
    row = {"way": PLAIN, "temperature": 0.6, "tau": None, "tokens_per_second_over_plain": 1.0}
    row |= {"same_answers_as_plain": True}

    def measured(options):
        yield [row]
        raise KeyboardInterrupt

    monkeypatch.setattr(samplers, "measure_samplers", measured)
    assert main(["--json", str(tmp_path / "s.json")]) == 130
    assert json.loads((tmp_path / "s.json").read_text()) == [row]
    out, err = capsys.readouterr()
    assert "| plain steps | 1.00× |" in out and "interrupted" in err
