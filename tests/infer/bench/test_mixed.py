"""`python -m infer.bench.mixed`: closed batches, slots and pages give the same tokens, and pages need less memory."""

import json

import factory
import pytest

from infer.bench.mixed import main

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_compilation")]


@pytest.mark.slow
def test_all_ways_give_the_same_tokens_and_pages_need_less(tmp_path, capsys):
    target, draft = tmp_path / "target", tmp_path / "draft"
    factory.make_target(target)
    factory.make_draft(draft)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input_ids": [5 + i] * 12}) + "\n" for i in range(6)))
    words = [
        "--model",
        str(target),
        "--draft",
        str(draft),
        "--prompts",
        str(prompts),
        "--json",
        str(tmp_path / "m.json"),
    ]
    words += ["--num-requests", "6", "--batch-size", "2", "--new-tokens", "2", "40", "--prompt-tokens", "2", "12"]
    assert main([*words, "--rounds", "1", "--plot", str(tmp_path / "plots")]) == 0
    rows = json.loads((tmp_path / "m.json").read_text())
    assert [row["mode"] for row in rows] == ["plain", "drafts", "auto"]
    for row in rows:
        assert row["same_tokens"] and row["same_tokens_as_plain"]
        assert 0 < row["pages_kv_mib"] < row["slots_kv_mib"], "128 positions a slot, against what the texts have"
        rates = [row[f"{way}_tokens_per_second"] for way in ("closed", "slots", "pages")]
        assert row["slots_over_closed"] == pytest.approx(rates[1] / rates[0])
        assert row["pages_over_slots"] == pytest.approx(rates[2] / rates[1])
    assert "pages" in capsys.readouterr().out
    for way in ("slots", "pages"):
        assert max(kept for _, kept, _ in rows[0][f"{way}_memory"]) == pytest.approx(rows[0][f"{way}_kv_mib"])
        assert all(0 <= needed <= kept for _, kept, needed in rows[0][f"{way}_memory"])
    assert (tmp_path / "plots" / "memory.png").read_bytes().startswith(b"\x89PNG")
