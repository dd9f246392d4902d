"""What `python -m infer.bench` can sweep and state: shapes, simulated acceptance, floors, traces, plots."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factory import BYTE_DRAFT, BYTE_TARGET, REPEATING, make_target

from convert import shapes
from convert.loading import LoadedModel
from convert.options import TreeSettings
from convert.shapes import SHAPES, Shape
from domino_jax import decode, prepare, weights
from domino_jax.decode import DecodeConfig
from domino_jax.drafters.block import BlockDrafter
from domino_jax.errors import DominoError
from domino_jax.sampling import SamplingParams, settings
from domino_jax.weights import Params, flatten
from infer.bench import main as bench
from infer.bench import plots, roofline, sweep
from infer.bench.markdown import markdown_table
from infer.bench.modes import SimulatedAcceptance, drafting, head_off, simulated_counts
from infer.bench.options import Bench
from infer.bench.report import PHASES
from infer.bench.shapes import load_random
from infer.bench.sweep import differences
from infer.engine import Decoding, Engine

pytestmark = pytest.mark.usefixtures("quick_compilation")

FEW = ["--num-prompts", "2", "--rounds", "1", "--no-transformers"]
# Heads for a mesh of 4; 261 ids are no multiple of 4.
WIDE = dataclasses.replace(BYTE_TARGET, num_attention_heads=8, vocab_size=261)
WIDE_DRAFT = dataclasses.replace(BYTE_DRAFT, **WIDE.geometry(num_hidden_layers=1))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A shape of the table that runs in no time, and a device that is measured in as little."""
    monkeypatch.setitem(SHAPES, "tiny", Shape(BYTE_TARGET, BYTE_DRAFT))
    monkeypatch.setitem(SHAPES, "wide", Shape(WIDE, WIDE_DRAFT))
    monkeypatch.setattr(roofline, "probe_sizes", lambda: (1 << 20, 64))


@pytest.fixture
def unphased(monkeypatch):
    """Without timing the phases, whose programs are most of what is compiled: each takes 1 ms."""

    def phases(view: LoadedModel, *_: Any) -> dict[str, float]:
        return {f"{name}_ms": 1.0 for name in (PHASES if view.configs.draft else ("target",))}

    monkeypatch.setattr(sweep, "time_phases", phases)


def run(words: list[str], out) -> list[dict[str, Any]]:
    assert bench([*words, *FEW, "--json", str(out)]) == 0
    return json.loads(out.read_text())


def test_the_shapes_of_the_table_have_the_parameters_of_their_names():
    for name, (target, draft) in SHAPES.items():
        if name.startswith("qwen3"):
            held = jax.tree.leaves(weights.weight_shapes(target))
            size = float(name.split("-")[1].removesuffix("b")) * 1e9
            assert sum(x.size for x in held) == pytest.approx(size, rel=0.06), name
            assert (draft.num_proposals, draft.num_hidden_layers, len(draft.target_layer_ids)) == (16, 5, 5)
    assert SHAPES["qwen3-8b"].draft.target_layer_ids == (1, 9, 17, 25, 33)


def test_random_weights_are_made_in_their_dtype_and_are_sane():
    loaded = load_random("tiny", dtype="bfloat16")
    assert (
        loaded.configs == DecodeConfig(BYTE_TARGET, BlockDrafter(BYTE_DRAFT))
        and loaded.stop_ids == ()
        and loaded.tokenizer is None
    )
    for module, config in ((loaded.params.target, BYTE_TARGET), (loaded.params.draft, BYTE_DRAFT)):
        expected = flatten(weights.weight_shapes(config, jnp.bfloat16))
        found = {path: leaf for path, leaf in flatten(module).items() if not path.startswith("head.")}
        for path, leaf in expected.items():  # the head is made ready for decoding
            assert path.startswith("head.") or (leaf.shape, leaf.dtype) == (found[path].shape, found[path].dtype), path
        for path, leaf in found.items():
            values = np.asarray(leaf, np.float32)
            assert (values == 1).all() if leaf.ndim == 1 else 0.015 < values.std() < 0.025, path
    first, second = (flatten(loaded.params.target)[f"layers.{i}.q"] for i in (0, 1))
    assert (first != second).any()
    assert load_random("tiny", "none").params.draft is None


def test_random_weights_lie_on_a_mesh_in_parts():
    """The shapes and layout are those of loaded weights: a mesh pads the vocabulary and repeats KV heads."""
    loaded = load_random("wide", mesh=(1, 4), matrices="float32")
    leaves = flatten(loaded.params.target)
    embed, kv = leaves["embed.values"], leaves["layers.0.kv.parts.0.values"]
    assert embed.shape == (264, 32) and embed.sharding.shard_shape(embed.shape) == (66, 32)
    assert kv.shape == (4, 8, 32) and kv.sharding.shard_shape(kv.shape) == (1, 8, 32)
    sequence, _ = Engine(loaded).sequence([1, 2, 3], 9)
    Engine(loaded).generate([sequence])
    assert len(sequence.tokens) == 9 and max(sequence.tokens) < 261


@pytest.mark.parametrize("tau", [1, 1.01, 2.5, 3.3, 4, 7.32, 16.99, 17])
def test_simulated_counts_have_the_stated_mean(tau):
    emitted = jnp.ones(3, jnp.int32)
    seen = []
    for _ in range(200):
        seen.append(np.asarray(simulated_counts(tau, emitted)))
        emitted = emitted + seen[-1] + 1
    assert np.min(seen) >= int(tau) - 1 and np.max(seen) <= np.ceil(tau) - 1
    assert np.mean(seen, axis=0) + 1 == pytest.approx([tau] * 3, abs=0.006)


@pytest.mark.e2e
@pytest.mark.slow
def test_shapes_with_a_stated_acceptance_held_against_the_machine(tmp_path, capsys, unphased):
    words = ["--shapes", "tiny", "--random-weights", "--simulate-tau", "2.5", "--roofline"]
    words += ["--profile", str(tmp_path / "traces"), "--prompt-tokens", "5", "--new-tokens", "9", "--batch-sizes", "2"]
    rows = run(words, tmp_path / "rows.json")
    assert [(row["mode"], row["drafts"]) for row in rows] == [("lean", 0), ("dflash", 4), ("domino", 4)]
    for row in rows:
        assert (row["model"], row["weights"], row["simulated_tau"]) == ("tiny", "random", 2.5)
        assert row["prompts"] == "random ids"
        assert row["tau"] is None and row["same_tokens_as_lean"] is None and row["distinct_4"] is None

        parts = ("target",) if row["mode"] == "lean" else PHASES
        assert row["bandwidth_gb_s"] > 0 and row["peak_tflop_s"] > 0
        for part in parts:
            assert row[f"{part}_gb"] > 0 and row[f"{part}_gflop"] > 0
            assert row[f"{part}_floor_share"] == pytest.approx(row[f"{part}_floor_ms"])  # of 1 ms
        assert row["cycle_floor_ms"] == pytest.approx(sum(row[f"{part}_floor_ms"] for part in parts))
        assert row["cycle_over_step_floor"] == 1 if row["mode"] == "lean" else row["cycle_over_step_floor"] > 1

        name = f"{row['mode']}-{row['drafts']}" if row["drafts"] else row["mode"]
        assert row["profile"] == str(tmp_path / "traces" / name)
        assert row["profile_scopes"] == " ".join(parts), "the trace names the phases, and no others"
        assert len(list((tmp_path / "traces" / name).rglob("*.xplane.pb"))) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "tiny shape with random weights (speed only)" in said and "domino, simulated τ 2.5" in said
    assert "Floor at" in said and "Share of the floor reached" in said
    assert f"trace of domino 4: {tmp_path / 'traces' / 'domino-4'}" in said


@pytest.mark.e2e
@pytest.mark.slow
def test_a_simulated_cycle_commits_the_stated_number_and_does_the_same_work():
    """20 tokens in 8 cycles of 2.5; and no matrix product of the real cycle is missing from the program."""
    loaded = load_random("tiny")
    told = SimulatedAcceptance(2.5, loaded.configs.proposals)
    for temperature in (0.0, 1.0):
        running = Engine(loaded, accept=told)
        sequence, _ = running.sequence([1, 2, 3], 21)
        running.generate([sequence], Decoding(SamplingParams(temperature)))
        assert len(sequence.tokens) == 21 and sequence.accepted == [2, 1] * 4

    counts, configs = [], loaded.configs
    for accept in (decode.accept, told):
        rows = decode.new_rows(jax.random.split(jax.random.key(0), 1), [9], (), settings(1))
        state = decode.prefill_batch(loaded.params, configs, [[1, 2]], rows, loaded.dtype)
        program = decode.speculate.lower(loaded.params, configs, state, 8, True, None, accept).compile()
        cost: Any = program.cost_analysis()
        counts.append(cost["flops"])
    assert counts[1] == pytest.approx(counts[0], rel=0.01) and counts[1] >= counts[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("draft", "other"),
        ("draft_revision", "v2"),
        ("head_candidates", 64),
        ("draft_weights", "int8"),
        ("prompt_lookup_max", 3),
        ("prompt_lookup_min", 3),
        ("tree", 5),
        ("confidence_threshold", 0.5),
    ],
)
def test_rows_say_what_drafted(name, value):
    none: Any = None
    loaded = LoadedModel(DecodeConfig(BYTE_TARGET), none, None, (), jnp.dtype("float32"), (), 0.0)
    usual = sweep.circumstances(Bench(), loaded)
    given: dict[str, Any] = {name: value}
    model = dataclasses.replace(Bench().model, drafting=dataclasses.replace(Bench().model.drafting, **given))
    row = sweep.circumstances(Bench(model), loaded)
    changed = {key for key in row if row[key] != usual.get(key)}
    assert changed and all(key.startswith(name) for key in changed)


@pytest.mark.e2e
@pytest.mark.slow
def test_a_sweep_has_a_row_for_each_context_and_draws_its_curves(tmp_path, capsys, unphased):
    make_target(tmp_path / "target", std=REPEATING, tokenizer=False)
    (tmp_path / "prompts.jsonl").write_text('{"input_ids": [5, 70, 9, 7]}\n' * 2)
    words = ["--model", str(tmp_path / "target"), "--new-tokens", "5", "--batch-sizes", "1", "2"]
    words += ["--prompts", str(tmp_path / "prompts.jsonl"), "--contexts", "4", "150"]
    rows = run([*words, "--plot", str(tmp_path / "plots")], tmp_path / "rows.json")
    assert [(r["context"], r["batch"]) for r in rows] == [(4, 1), (4, 2), (150, 1), (150, 2)]
    for row in rows:
        assert row["weights"] == "loaded" and row["simulated_tau"] is None
        assert row["prompt_tokens"] == row["context"]
        assert row["prompts"] == ("prompts.jsonl" if row["context"] == 4 else "random ids")
        assert row["cycle_over_step"] == 1
    # Drafts have one value only: there is nothing to draw over them.
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["batch.png", "context.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "plots").iterdir())
    assert "plots/context.png" in capsys.readouterr().out


def test_each_curve_is_named_by_what_differs_from_the_others():
    """And a lean step, which has no drafts, is not drawn over them."""
    modes = [("lean", 0), ("domino", 4), ("domino", 8)]
    rows = [
        {"mode": mode, "drafts": drafts, "batch": batch, "context": 48, "simulated_tau": 5}
        for batch in (8, 1)
        for mode, drafts in modes
    ]
    found = plots.curves(rows, "batch")
    names = ["lean", "domino, simulated τ 5, drafts 4", "domino, simulated τ 5, drafts 8"]
    assert sorted(found) == sorted(names)
    assert [row["batch"] for row in found["lean"]] == [1, 8]
    drafting = [row for row in rows if row["mode"] != "lean"]
    assert sorted(plots.curves(drafting, "drafts")) == [f"domino, simulated τ 5, batch {b}" for b in (1, 8)]


def test_floors_at_8b_are_those_of_the_spec():
    """docs/algorithm.md, section 8, from shapes alone: GB a cycle reads, and 1.30 plain steps for a cycle."""
    target, draft = SHAPES["qwen3-8b"]
    params = Params(weights.weight_shapes(target, jnp.bfloat16), weights.weight_shapes(draft, jnp.bfloat16))
    lean = roofline.work(DecodeConfig(target), Params(params.target), batch=1, context=0)["target"]
    cycle = roofline.work(DecodeConfig(target, BlockDrafter(draft)), params, batch=1, context=0)
    gb = {name: work.bytes / 1e9 for name, work in cycle.items()}
    assert gb["target"] == pytest.approx(15.1, abs=0.05)
    assert gb["draft"] == pytest.approx(1.93 + 1.24, abs=0.01)
    assert gb["head"] == pytest.approx(15 * 0.0778 + 0.034, abs=0.015)
    assert gb["context"] == pytest.approx(0.168 + 0.084, abs=0.002)  # fc, and k and v of each draft layer once more
    # 1.30 without what the phases hand over (logits) and read twice (k and v).
    assert sum(gb.values()) / (lean.bytes / 1e9) == pytest.approx(1.30, abs=0.01)
    assert lean.flops == pytest.approx(2 * (lean.bytes / 2), rel=0.001)  # bfloat16: two operations a parameter
    assert cycle["target"].flops == pytest.approx(17 * lean.flops, rel=0.01)


@pytest.mark.parametrize(
    ("candidates", "kind", "floor"), [(64, None, 1.23), (None, "int8", 1.156), (64, "int8", 1.117)]
)
def test_floors_at_8b_of_what_makes_a_cycle_cheaper(candidates, kind, floor):
    """docs/algorithm.md, section 8: 1.22 and 1.11, without the logits that phases hand over and k and v read twice."""
    target, draft = SHAPES["qwen3-8b"]
    params = Params(weights.weight_shapes(target, jnp.bfloat16), weights.weight_shapes(draft, jnp.bfloat16))
    lean = roofline.work(DecodeConfig(target), Params(params.target), batch=1, context=0)["target"]
    if kind:
        params = jax.eval_shape(lambda p: prepare.quantize_drafter(p, draft, kind), params)
    cycle = roofline.work(DecodeConfig(target, BlockDrafter(draft, candidates)), params, batch=1, context=0)
    assert sum(work.bytes for work in cycle.values()) / lean.bytes == pytest.approx(floor, abs=0.003)


def test_floors_of_8_bit_targets_are_those_of_the_page():
    """Each form of target, drafter and head, in steps of the same target."""
    page = (Path(__file__).parents[3] / "docs" / "quantization.md").read_text(encoding="utf-8")
    shapes = "qwen3-4b", "qwen3-8b", "qwen3-32b"
    forms = [(kind, draft, few) for kind in ("exact", "int8") for draft in ("exact", "int8") for few in (None, 64)]
    floors = {form: [floor_of(shape, *form) for shape in shapes] for form in forms}
    rows = [[*form[:2], str(form[2] or "all"), *(f"{x:.2f}" for x in floors[form])] for form in forms]
    table = markdown_table(("target", "drafter", "head scores", "4B", "8B", "32B"), rows)
    assert table in page, f"docs/quantization.md should hold\n\n{table}"
    assert floors["int8", "int8", None][1] == pytest.approx(1.32, abs=0.02), "about what is computed by hand"


def floor_of(shape: str, kind: str, draft_kind: str, candidates: int | None) -> float:
    """Bytes of a cycle over those of a plain step of the same target."""
    target, draft = SHAPES[shape]
    params = in_forms(shape, kind, draft_kind)
    lean = roofline.work(DecodeConfig(target), params.without_drafter, batch=1, context=0)["target"]
    cycle = roofline.work(DecodeConfig(target, BlockDrafter(draft, candidates)), params, batch=1, context=0)
    return sum(work.bytes for work in cycle.values()) / lean.bytes


@cache
def in_forms(shape: str, kind: str, draft_kind: str) -> Params:
    """Described weights of a pair in bfloat16 and in 8 bits."""
    target, draft = SHAPES[shape]
    if draft_kind != "exact":
        params = in_forms(shape, kind, "exact")
        return jax.eval_shape(lambda p: prepare.quantize_drafter(p, draft, draft_kind), params)
    whole = weights.weight_shapes(target, jnp.bfloat16)
    if kind != "exact":
        whole = jax.eval_shape(lambda w: prepare.quantize_target(w, target, kind), whole)
    return Params(whole, weights.weight_shapes(draft, jnp.bfloat16))


def test_floors_of_experts_are_those_that_tokens_choose():
    """30B-A3B: 3.3 billion parameters active in a token, of which the embedding's rows are not read."""
    target, draft = SHAPES["qwen3-30b-a3b"]
    params = Params(weights.weight_shapes(target, jnp.bfloat16), weights.weight_shapes(draft, jnp.bfloat16))
    lean = roofline.work(DecodeConfig(target), Params(params.target), batch=1, context=0)["target"]
    assert lean.bytes / 2 == pytest.approx(3.3e9 - 151936 * 2048, rel=0.03)
    assert lean.flops == pytest.approx(2 * (lean.bytes / 2), rel=0.001)
    cycle = roofline.work(DecodeConfig(target, BlockDrafter(draft)), params, batch=1, context=0)["target"]
    assert cycle.flops == pytest.approx(17 * lean.flops, rel=0.01)
    expert = 3 * 2048 * 768 * 2 * 48  # bytes of one expert of every layer
    read = (cycle.bytes - lean.bytes) / expert + 8
    assert read == pytest.approx(128 * (1 - (15 / 16) ** 17), rel=0.01)  # 85 of 128 in a block of 17 tokens
    most = roofline.work(DecodeConfig(target), Params(params.target), batch=4096, context=0)["target"]
    assert most.bytes == pytest.approx(lean.bytes + 120 * expert, rel=0.01)


def test_floors_grow_with_context_and_batch_and_shrink_with_the_mesh():
    target, draft = SHAPES["qwen3-8b"]
    configs = DecodeConfig(target, BlockDrafter(draft))
    params = Params(weights.weight_shapes(target, jnp.bfloat16), weights.weight_shapes(draft, jnp.bfloat16))
    one, longer, more = (roofline.work(configs, params, *size) for size in ((1, 0), (1, 1000), (4, 1000)))
    cached = 2 * 36 * 8 * 128 * 1000 * 2  # k and v of 1000 positions
    assert longer["target"].bytes - one["target"].bytes == cached
    assert more["target"].bytes - longer["target"].bytes == pytest.approx(3 * cached, rel=0.02)
    assert more["head"].flops == 4 * one["head"].flops

    parts, whole = (
        load_random("wide", mesh=(2, 2)),
        Params(weights.weight_shapes(WIDE), weights.weight_shapes(WIDE_DRAFT)),
    )
    alone = roofline.work(DecodeConfig(WIDE, BlockDrafter(WIDE_DRAFT)), whole, 4, 100)["target"]
    spread = roofline.work(parts.configs, parts.params, 4, 100, (2, 2))["target"]
    assert alone.bytes / 2 * 0.5 < spread.bytes < alone.bytes / 2 * 1.01
    assert spread.flops == pytest.approx(alone.flops / 4, rel=0.01)


SHAPED = ["--shapes", "tiny", "--random-weights"]


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--shapes", "tiny"], 2, "add --random-weights"),
        (["--random-weights"], 2, "needs a shape"),
        (["--shapes", "qwen3-7b", "--random-weights"], 1, "the shapes are qwen3-0.6b"),
        ([*SHAPED, "--model", "qwen3-8b"], 2, "two models"),
        ([*SHAPED, "--draft", "qwen3-8b"], 1, "leave --draft out"),
        ([*SHAPED, "--simulate-tau", "5.5"], 1, "4 drafts a cycle allow 1 to 5"),
        ([*SHAPED, "--simulate-tau", "0.5"], 2, "--simulate-tau must be 1 or more"),
        ([*SHAPED, "--simulate-tau", "nan"], 2, "--simulate-tau must be 1 or more"),
        ([*SHAPED, "--simulate-tau", "4", "--drafts", "4", "2"], 1, "2 drafts a cycle allow 1 to 3"),
        ([*SHAPED, "--simulate-tau", "2", "--draft", "none"], 1, "--simulate-tau needs a drafter"),
        ([*SHAPED, "--simulate-tau", "0", "--draft", "none"], 2, "--simulate-tau must be 1 or more"),
        ([*SHAPED, "--simulate-tau", "2", "--drafts", "auto"], 2, "--drafts auto goes by what is accepted"),
        ([*SHAPED, "--contexts", "4", "--prompt-tokens", "5"], 2, "leave one of them out"),
        ([*SHAPED, "--seed", str(1 << 40)], 2, "--seed must be from 0 to 2^32 - 1"),
        ([*SHAPED, "--roofline", "--no-phases"], 2, "leave out --no-phases"),
        ([*SHAPED, "--contexts", "0"], 2, "at least 1"),
        ([*SHAPED, "--batch-sizes"], 2, "at least one size"),
        ([*SHAPED, "--contexts", "300"], 1, "has 256 positions"),
        ([*SHAPED, "--profile", "FILE/x"], 1, "can't be written"),
        ([*SHAPED, "--plot", "FILE/x"], 1, "can't be written"),
    ],
)
def test_refusals_are_one_sentence(tmp_path, capsys, words, status, says):
    (tmp_path / "FILE").touch()
    words = [str(tmp_path / word) if word.startswith("FILE") else word for word in words]
    assert bench([*words, *FEW]) == status
    said = capsys.readouterr().err
    assert says in said and said.count("error:") == 1 and "Traceback" not in said


def test_a_simulated_acceptance_is_checked_without_the_command_too():
    with pytest.raises(DominoError, match=r"5\.5 can't be simulated"):
        SimulatedAcceptance(5.5, BYTE_DRAFT.num_proposals)


def test_random_weights_are_compiled_once_a_shape():
    shapes._maker.cache_clear()
    load_random("tiny")
    made = shapes._maker.cache_info()
    assert made.hits > made.misses


def test_differences_are_counted_up_to_the_first_of_an_answer():
    assert differences([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]) == (0, 0)
    assert differences([[1, 2, 3], [4, 9, 9]], [[1, 2, 3], [4, 5, 6]]) == (1, 1 / 5)


@pytest.mark.e2e
def test_what_a_sweep_measured_is_kept_when_it_is_cancelled(tmp_path, capsys, monkeypatch, unphased):
    first = sweep.alternate

    def once(*arguments: Any) -> Any:
        monkeypatch.setattr(sweep, "alternate", cancelled)
        return first(*arguments)

    def cancelled(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "alternate", once)
    out = tmp_path / "bench.json"
    assert (
        bench([*SHAPED, "--draft", "none", "--new-tokens", "4", "--contexts", "3", "5", *FEW, "--json", str(out)])
        == 130
    )
    assert [row["context"] for row in json.loads(out.read_text())] == [3]
    said = capsys.readouterr()
    assert "lean" in said.out and "interrupted" in said.err


def test_a_tree_is_a_mode_after_the_chains_of_its_drafter():
    loaded = load_random("tiny", tree=TreeSettings(6, 2))
    modes = drafting(loaded, (2, "auto"))
    assert list(modes) == [
        ("dflash", 2),
        ("domino", 2),
        ("domino", "auto"),
        ("domino-tree", 6),
        ("domino-tree", "auto"),
    ]
    assert modes["domino-tree", 6] is loaded and modes["domino", 2].configs.drafter == BlockDrafter(BYTE_DRAFT)
    assert list(drafting(loaded, headless=False)) == [("domino", BYTE_DRAFT.num_proposals), ("domino-tree", 6)]
    headless = drafting(head_off(loaded), headless=False)
    assert list(headless) == [("dflash", BYTE_DRAFT.num_proposals), ("dflash-tree", 6)]


def test_the_floor_of_a_tree_counts_its_nodes_and_lanes():
    chain, tree = (load_random("tiny", tree=asked) for asked in (None, TreeSettings(9)))
    ours, theirs = (roofline.work(one.configs, one.params, batch=1, context=0) for one in (tree, chain))
    assert ours["target"].bytes == pytest.approx(theirs["target"].bytes, rel=0.05)
    assert ours["target"].flops / theirs["target"].flops == pytest.approx(10 / (1 + BYTE_DRAFT.num_proposals), rel=0.1)
    assert ours["draft"] == theirs["draft"] and ours["context"] == theirs["context"]
    assert ours["head"].flops > 4 * theirs["head"].flops


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_a_trees_phases_are_timed(tmp_path, capsys, temperature):
    words = ["--shapes", "tiny", "--random-weights", "--tree", "5", "--no-head-off", "--temperature", temperature]
    words += ["--prompt-tokens", "5", "--new-tokens", "9", "--batch-sizes", "2", "--roofline"]
    rows = run(words, tmp_path / "rows.json")
    assert [(row["mode"], row["drafts"]) for row in rows] == [("lean", 0), ("domino", 4), ("domino-tree", 5)]
    tree = rows[2]
    assert all(tree[f"{part}_ms"] > 0 for part in PHASES) and tree["tree_nodes"] == 5
    assert tree["same_tokens_as_lean"] is (True if temperature == "0" else None)


def test_what_a_tree_can_not_be_measured_with_is_refused(capsys):
    words = ["--shapes", "tiny", "--random-weights", "--tree", "5"]
    assert bench([*words, "--simulate-tau", "2"]) == 2
    assert "--simulate-tau makes up how far a chain of drafts stands: leave --tree out" in capsys.readouterr().err
