"""`python -m infer.bench` on a tiny pair: what it reports, and that modes and figures fit together."""

import json

import pytest
from factory import BYTE_TARGET, REPEATING, make_draft, make_target

from domino_jax.runtime.provenance import distinct_ngrams
from infer.bench import main

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("bench")
    make_target(root / "target", std=REPEATING)
    make_draft(root / "draft", std=REPEATING)
    rows = [{"input_ids": [5, 3 if i % 2 else 70, 0][: 2 + i % 2]} for i in range(4)] + [{"input_ids": [1]}]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = ["--model", str(root / "target"), "--draft", str(root / "draft")]
    return [*folders, "--prompts", str(root / "prompts.jsonl"), "--prompt-tokens", "2", "--rounds", "1"]


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("drafts", [[2], [2, 4]], ids=str)
def test_every_mode_is_a_row_of_flat_json(words, tmp_path, capsys, drafts):
    pytest.importorskip("torch")
    out = tmp_path / "bench.json"
    more = ["--num-prompts", "4", "--new-tokens", "9", "--batch-sizes", "2", "--drafts", *map(str, drafts)]
    assert main([*words, *more, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    modes = [("lean", 0), *((mode, n) for n in drafts for mode in ("dflash", "domino")), ("transformers", 0)]
    assert [(r["batch"], r["mode"], r["drafts"]) for r in rows] == [(2, *mode) for mode in modes]
    assert not [v for row in rows for v in row.values() if isinstance(v, dict | list)]
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["ms_per_cycle"] > 0
        # Prompts end in id 70, proposed once a block, or in the mask token, proposed always (see factory.py): with J
        # drafts 8 tokens take 4 cycles of 2, and 8 / (J + 1) rounded up.
        if row["mode"] == "domino":
            assert row["same_tokens_as_lean"] is True
            short = {2: 3, 4: 2}[row["drafts"]]
            expected = (4 * 1 + short * row["drafts"]) / (4 + short) + 1
            assert row["tau"] == pytest.approx(expected)
        if row["mode"] in ("lean", "dflash", "domino"):
            parts = ("draft_ms", "head_ms", "target_ms", "verify_ms", "context_ms")
            assert all(row[part] > 0 for part in parts[2:3] if row["mode"] == "lean")
            assert all(row[part] > 0 for part in parts if row["mode"] != "lean")
    assert "domino" in capsys.readouterr().out
    lean, fewer = (next(r for r in rows if (r["mode"], r["drafts"]) == key) for key in (("lean", 0), ("domino", 2)))
    assert lean["speed_over_lean"] == 1 and lean["caches_mb"] < fewer["caches_mb"]


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (["--num-prompts", "9"], 1, "only 4 prompts"),
        (["--num-prompts", "2", "--batch-sizes", "4"], 2, "--num-prompts 2 is less"),
        (["--num-prompts", "4", "--min-distinct", "0.9", "--new-tokens", "9"], 1, "4 loop"),
        (["--num-prompts", "4", "--new-tokens", str(BYTE_TARGET.max_position_embeddings)], 1, "at most 255 new tokens"),
        (["--num-prompts", "4", "--drafts", "7"], 1, "7 drafts a cycle can't be had"),
        (["--rounds", "0"], 2, "at least 1"),
    ],
)
def test_refusals(words, capsys, more, status, says):
    assert main([*words, *more, "--no-transformers"]) == status
    assert says in capsys.readouterr().err


def test_distinct_4_grams():
    assert distinct_ngrams(list(range(20))) == 1
    assert distinct_ngrams([1, 2] * 10) == pytest.approx(2 / 17)
    assert distinct_ngrams([1, 2, 3]) == 1
