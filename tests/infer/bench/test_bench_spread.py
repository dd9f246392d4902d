"""Tables of several benchmark runs: lowest, median and highest, of clean runs of one command only."""

import json

import pytest

from domino_jax.errors import DominoError
from infer.bench.spread import spread_tables


def write_run(folder, number, domino, theirs=0.25, commit="1234abc", **changes):
    common = {"commit": commit, "model": "demo", "rounds": 3} | changes
    rows = [
        {"mode": "lean", "drafts": 0, "tau": None, "speed_over_lean": 1.0, "cycle_over_step": 1.0},
        {"mode": "domino", "drafts": 7, "tau": 4.467, "speed_over_lean": domino, "cycle_over_step": 2.5},
        {"mode": "transformers", "drafts": 0, "speed_over_lean": theirs, "cycle_over_step": 4.0},
    ]
    path = folder / f"run-{number}.json"
    path.write_text(json.dumps([common | {"batch": batch} | row for batch in (1, 4) for row in rows]))
    return path


def test_tables_say_lowest_median_and_highest(tmp_path):
    runs = [write_run(tmp_path, i, speed) for i, speed in enumerate((1.5, 1.25, 2.0))]
    batches = spread_tables(runs).split("Batch ")[1:]
    assert [batch[0] for batch in batches] == ["1", "4"]
    table = batches[0].splitlines()[2:]
    assert table[0] == "|  | τ | over the baseline | over transformers | cycle / step |"
    assert table[2] == "| autoregressive baseline |  | 1.00× | 4.00× | 1.00 |"
    # Ratios within each run: 1.25, 1.5 and 2 times the baseline, which is four times transformers.
    assert table[3] == "| **Domino** | 4.47 | 1.25 – 1.50 – 2.00× | 5.00 – 6.00 – 8.00× | 2.50 |"
    assert table[4] == "| transformers' `generate` |  | 0.25× | 1.00× |  |"


def test_figures_of_unclean_or_unlike_runs_are_refused(tmp_path):
    runs = [write_run(tmp_path, i, 1.5) for i in range(3)]
    with pytest.raises(DominoError, match="2 runs given, expected at least 3"):
        spread_tables(runs[:2])
    with pytest.raises(DominoError, match="another rounds"):
        spread_tables([*runs, write_run(tmp_path, 3, 1.5, rounds=1)])
    with pytest.raises(DominoError, match="another confidence_threshold"):
        spread_tables([*runs, write_run(tmp_path, 5, 1.5, confidence_threshold=0.5)])
    with pytest.raises(DominoError, match="another commit"):
        spread_tables([*runs, write_run(tmp_path, 4, 1.5, commit="fedcba9")])
    with pytest.raises(DominoError, match="without local changes"):
        spread_tables([write_run(tmp_path, i, 1.5, commit="1234abc-dirty") for i in range(3)])
    (tmp_path / "other.json").write_text('{"kind": "dflash"}')
    with pytest.raises(DominoError, match="no file of"):
        spread_tables([*runs, tmp_path / "other.json"])
