"""Training of a second view: one block is decoding's, loss and gradients are those of PyTorch, and whole small runs."""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import factory
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from factory import BYTE_TARGET, make_target
from training import curriculum

from convert.folders import load_weights, read_config
from convert.loading import load_model
from convert.names import export
from domino_jax import target as targets
from domino_jax.config import DecoderConfig, MoeConfig
from domino_jax.drafters import block
from domino_jax.drafters.dual_view import DualViewConfig, training_view_blocks
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError
from domino_jax.weights import flatten, unflatten
from infer.engine import Decoding, Engine
from train import loss as losses
from train import train
from train.config import Objective, TrainConfig, check_options, settled
from train.loss import Teacher, teacher

TARGET = dataclasses.replace(factory.TARGET, num_hidden_layers=2)
VIEW = DualViewConfig(**TARGET.geometry(), block_size=4, mask_token_id=88)
IDS = np.random.default_rng(0).integers(0, 88, (2, 14)).astype(np.int32)
MASK = np.random.default_rng(1).random((2, 14)) < 0.9
ANCHORS, VALID = np.array([[0, 3, 9], [2, 12, 0]], np.int32), np.array([[True, True, True], [True, True, False]])


@pytest.fixture(scope="module")
def weights() -> tuple[Any, Any]:
    return factory.random_weights(TARGET, 3), factory.random_weights(VIEW, 4)


@partial(jax.jit, static_argnames=("backend", "remat"))
def blocks(frozen: Any, view: Any, starts: Any = None, backend: Any = "dense", remat: bool = False) -> Any:
    anchors = jnp.asarray(ANCHORS)
    tokens = jnp.take_along_axis(jnp.asarray(IDS), anchors, axis=1)
    x = block.block_inputs(frozen.embed, VIEW, tokens)
    first = None if starts is None else jnp.take_along_axis(starts, anchors, axis=1)
    configs = TARGET, VIEW
    z, hidden = training_view_blocks(view, configs, frozen, x, jnp.asarray(IDS), anchors, first, starts, backend)
    return targets.logits(frozen, TARGET, z.reshape(2, -1, 32)).reshape(2, 3, 4, -1), hidden


def test_a_block_in_training_is_the_one_in_decoding(weights):
    """Both are the reference's; tests/domino_jax/drafters/test_dual_view.py has decoding's."""
    frozen, view = weights
    names = factory.hf_weights(frozen, TARGET), TARGET.to_hf(), factory.hf_weights(view, VIEW), 88, 4
    starts = np.zeros((2, 14), np.int32)
    starts[0, 5:] = 5  # row 0 holds two conversations
    for given in (None, starts):
        logits, hidden = blocks(frozen, view, given)
        for row, place in np.ndindex(ANCHORS.shape):
            a = int(ANCHORS[row, place])
            begin = 0 if given is None else int(starts[row, a])
            if begin:  # RoPE knows differences alone, so that a conversation may begin anywhere
                expected = reference.dual_view_block(*names, IDS[row, begin:].tolist(), a - begin)
            else:
                expected = reference.dual_view_block(*names, IDS[row].tolist(), a)
            np.testing.assert_allclose(logits[row, place], expected, atol=2e-4)
        alone, _ = reference.target_forward(names[0], names[1], IDS[1].tolist(), [])
        np.testing.assert_allclose(targets.logits(frozen, TARGET, hidden)[1], alone, atol=2e-4)


def torch_loss(frozen: dict[str, Any], view: dict[str, Any], kind: str) -> torch.Tensor:
    """The mean over supervised proposals, written out row by row and block by block in float64."""
    c, config, second = TARGET, TARGET.to_hf(), {name.replace("_diff", ""): x for name, x in view.items()}
    group = c.num_attention_heads // c.num_key_value_heads

    def norm(x: Any, weight: Any) -> Any:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + c.rms_norm_eps) * weight

    def heads(of: dict[str, Any], prefix: str, name: str, y: Any, places: Any) -> Any:
        x = (y @ of[f"{prefix}self_attn.{name}_proj.weight"].T).reshape(len(y), -1, c.head_dim)
        if name == "v":
            return x
        x = norm(x, of[f"{prefix}self_attn.{name}_norm.weight"])
        half = c.head_dim // 2
        angle = places[:, None] * config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)

    def attend(q: Any, k: Any, v: Any, sees: Any) -> Any:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("tnh,snh->nts", q, k) / c.head_dim**0.5
        return torch.einsum("nts,snh->tnh", scores.masked_fill(~sees, -torch.inf).softmax(-1), v).reshape(len(q), -1)

    def rest(of: dict[str, Any], prefix: str, x: Any, attended: Any) -> Any:
        x = x + attended @ of[f"{prefix}self_attn.o_proj.weight"].T
        y = norm(x, frozen[f"{prefix}post_attention_layernorm.weight"])
        gate, up, down = (frozen[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return x + (torch.nn.functional.silu(y @ gate.T) * (y @ up.T)) @ down.T

    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, place in np.ndindex(ANCHORS.shape):
        a, ids = int(ANCHORS[row, place]), torch.tensor(IDS[row].astype(np.int64))
        text = frozen["model.embed_tokens.weight"][ids]
        x = frozen["model.embed_tokens.weight"][torch.tensor([int(ids[a]), 88, 88, 88])]
        before, own = torch.arange(len(ids), dtype=torch.float64), torch.arange(a, a + 4, dtype=torch.float64)
        for i in range(c.num_hidden_layers):
            prefix = f"model.layers.{i}."
            y, mine = (norm(s, frozen[f"{prefix}input_layernorm.weight"]) for s in (text, x))
            q, k, v = (heads(frozen, prefix, name, y, before) for name in "qkv")
            q2, k2, v2 = (heads(second, prefix, name, mine, own) for name in "qkv")
            text = rest(frozen, prefix, text, attend(q, k, v, before <= before[:, None]))
            seen = torch.cat([k[:a], k2]), torch.cat([v[:a], v2])
            x = rest(second, prefix, x, attend(q2, *seen, torch.ones(4, a + 4, dtype=torch.bool)))
        last, output = frozen["model.norm.weight"], frozen["lm_head.weight"].T
        teacher = (norm(text, last) @ output).log_softmax(-1)
        ours = (norm(x, last) @ output).log_softmax(-1)
        for j in range(3):
            if VALID[row, place] and a + j + 1 < len(ids) and MASK[row, a + j + 1]:
                p = teacher[a + j]
                total = total + ((p.exp() * (p - ours[j])).sum() if kind == "kl" else -ours[j, ids[a + j + 1]])
                count += 1
    return total / count


@pytest.mark.parametrize("kind", ["kl", pytest.param("ce", marks=pytest.mark.slow)])
def test_loss_and_gradients_are_pytorchs(weights, kind):
    frozen, view = weights

    def loss(leaves: dict[str, Any]) -> Any:
        how: dict[str, Any] = {"loss": kind, "position_weights": "uniform", "chunk": 4}
        given = jnp.asarray(IDS), jnp.asarray(MASK), jnp.asarray(ANCHORS), jnp.asarray(VALID)
        return curriculum(unflatten(VIEW, leaves), frozen, (TARGET, VIEW), *given, lam=jnp.float32(0.3), **how)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(flatten(view))
    theirs = {n: torch.tensor(np.float64(x)) for n, x in factory.hf_weights(frozen, TARGET).items()}
    ours = {n: torch.tensor(np.float64(x), requires_grad=True) for n, x in factory.hf_weights(view, VIEW).items()}
    expected = torch_loss(theirs, ours, kind)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for name, found in export(VIEW, gradient).items():
        wanted: Any = ours[name].grad
        np.testing.assert_allclose(found, wanted.numpy(), atol=2e-5 * float(wanted.abs().max()) + 1e-7, err_msg=name)


def test_logits_that_are_made_once_a_position_change_nothing(weights, monkeypatch):
    """More proposals than positions: blocks share the target's logits, unless they are too large."""
    frozen, view = weights
    anchors, valid = (np.repeat(x, 2, axis=1) for x in (ANCHORS, VALID))
    assert anchors.shape[1] * VIEW.num_proposals > IDS.shape[1]
    made: list[type] = []

    def noted(*given: Any) -> Any:
        made.append(type(seen := teacher(*given)))
        return seen

    monkeypatch.setattr(losses, "teacher", noted)

    def run() -> Any:
        def loss(leaves: dict[str, Any]) -> Any:
            how: dict[str, Any] = {"loss": "kl", "position_weights": "uniform", "chunk": 4}
            given = jnp.asarray(IDS), jnp.asarray(MASK), jnp.asarray(anchors), jnp.asarray(valid)
            return curriculum(unflatten(VIEW, leaves), frozen, (TARGET, VIEW), *given, lam=jnp.float32(0.3), **how)[0]

        return jax.jit(jax.value_and_grad(loss))(flatten(view))

    shared = run()
    monkeypatch.setattr(losses, "TEACHER_BYTES", 0)
    each = run()
    assert made[0] is Teacher and made[-1] is not Teacher
    for one, other in zip(jax.tree.leaves(shared), jax.tree.leaves(each), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * float(np.abs(other).max()))


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"backend": "chunked"}, {"remat": True}])
def test_other_forms_are_the_same(weights, monkeypatch, how):
    monkeypatch.setattr("domino_jax.drafters.training_attention.ROWS", 4)
    for one, other in zip(blocks(*weights, **how), blocks(*weights), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


# --- Whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def given(tmp_path) -> Iterator[dict[str, Any]]:
    """Settings of a tiny run, whose target and data lie in the test's folder."""
    make_target(tmp_path / "target", std=0.4)
    rows = [{"prompt": "ab" * (4 + i % 3), "completion": "ba" * (9 + i % 5)} for i in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"prompt": "ab" * n}) + "\n" for n in range(3, 6)))
    settings: dict[str, Any] = {"target": str(tmp_path / "target"), "data": (str(tmp_path / "data.jsonl"),)}
    settings |= {"drafter": "orthrus", "block_size": 5, "length": 48, "anchors": 6, "batch": 4, "lr": 3e-3}
    settings |= {"validation": tmp_path / "held.jsonl", "validation_tokens": 8, "tensorboard": False, "save_every": 4}
    with jax.numpy_dtype_promotion("standard"):  # for optax
        yield settings


FEW = {"freeze_output": True, "loss": "ce", "pack": True}
HEADED = {"drafter": "orthrus-domino", "gru_hidden_dim": 8, "emb_dim": 6}


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, FEW, {"mesh": "fsdp=2,model=2", "anchors": 13}, HEADED])
def test_a_run_trains_a_view_that_drafts(given, tmp_path, more):
    run = train(out=tmp_path / "run", steps=8, **(given | more))
    assert run.best is not None and run.metrics["validation_tau"] >= 1 and run.metrics["step"] == 8
    config: Any = read_config(run.drafter)
    head = DominoHead(8, 6, 1) if more is HEADED else None
    assert config == DualViewConfig(**BYTE_TARGET.geometry(), block_size=5, mask_token_id=factory.MASK_ID, head=head)
    view, target = (
        flatten(load_weights(folder, of, "float32"))
        for folder, of in ((run.drafter, config), (tmp_path / "target", read_config(tmp_path / "target")))
    )
    view = {path: weight for path, weight in view.items() if not path.startswith("head.")}
    moved = {path for path in view if not np.array_equal(view[path], target[path].astype("bfloat16"))}
    assert moved == {path for path in view if not (more.get("freeze_output") and path.endswith(".o"))}
    loaded = load_model(tmp_path / "target", run.drafter, "float32")
    engine = Engine(loaded)
    sequences = [engine.sequence([5, 70, 9], 12)[0]]
    engine.generate(sequences, Decoding())
    assert sequences[0].tokens


def test_a_view_of_a_target_with_experts_is_trained(given, tmp_path):
    """Gradients go through the frozen experts, on a CPU too."""
    moe = MoeConfig(4, 2, 24, norm_topk_prob=True)
    target = make_target(tmp_path / "experts", std=0.4, num_hidden_layers=1, moe=moe)
    more = {"target": str(tmp_path / "experts"), "validation": None}
    run = train(out=tmp_path / "run", steps=2, **(given | more))
    view, first = (
        load_weights(run.drafter, read_config(run.drafter), "float32"),
        load_weights(tmp_path / "experts", target, "float32"),
    )
    assert not np.array_equal(view.layers[0].q, first.layers[0].q.astype("bfloat16")) and np.isfinite(
        run.metrics["loss"]
    )


@pytest.mark.slow
def test_a_resumed_run_is_the_one_that_was_not_stopped(given, tmp_path, monkeypatch):
    whole = train(out=tmp_path / "whole", steps=8, **given)
    from train import run as runs

    step = runs.Loop.step

    def stopping(self: Any, *words: Any) -> None:
        if self.done == 5:
            self.checkpoints.finish()  # of another process nothing would still be written
            raise KeyboardInterrupt
        step(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Loop, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(out=tmp_path / "parts", steps=8, **given)
    resumed = train(out=tmp_path / "parts", resume=True)
    for name in ("model.safetensors", "config.json"):
        assert (whole.drafter / name).read_bytes() == (resumed.drafter / name).read_bytes()
    began = train(out=tmp_path / "again", steps=1, init_from=resumed.drafter, **given)
    assert began.metrics["final_loss"] < 5


@pytest.mark.parametrize(
    ("drafter", "changes", "said"),
    [
        ("orthrus", {"layers": 3}, "leave out --layers"),
        ("orthrus", {"init": "target-layers"}, "leave out --init"),
        ("orthrus", {"shift_label": True}, "leave out --shift-label"),
        ("orthrus", {"target_layer_ids": (1, 2), "intermediate_size": 7}, "--target-layer-ids, --intermediate-size"),
        ("orthrus", {"freeze_backbone": True}, "leave out --freeze-backbone"),
        ("orthrus-domino", {"freeze_backbone": True}, "leave out --freeze-backbone"),
        ("block", {"freeze_output": True}, "--freeze-output is for a second view"),
    ],
)
def test_settings_of_another_kind_are_refused(drafter, changes, said):
    options = dataclasses.replace(TrainConfig(), target="demo")
    options = dataclasses.replace(options, data=dataclasses.replace(options.data, data=("x.jsonl",)))
    group = dataclasses.replace(options.drafter, drafter=drafter, **changes)
    with pytest.raises(UsageError, match=said):
        check_options(dataclasses.replace(options, drafter=group))


def test_what_is_not_given_is_the_kinds():
    drafter = dataclasses.replace(TrainConfig().drafter, drafter="orthrus")
    view = settled(dataclasses.replace(TrainConfig(), drafter=drafter))
    assert (view.objective.loss, view.objective.position_weights) == ("kl", "uniform")
    block_drafter = settled(TrainConfig())
    assert (block_drafter.objective.loss, block_drafter.objective.position_weights) == ("ce", "exponential")
    own = settled(dataclasses.replace(view, objective=Objective(loss="ce", position_weights="d-pace")))
    assert (own.objective.loss, own.objective.position_weights) == ("ce", "d-pace")


def test_a_folder_without_a_view_begins_none(tmp_path):
    from train.init import read_first_drafter

    make_target(tmp_path / "other", tokenizer=False)
    with pytest.raises(DominoError, match="holds no second view"):
        read_first_drafter(tmp_path / "other", VIEW)
    other: DecoderConfig = dataclasses.replace(VIEW, block_size=7)
    (tmp_path / "view").mkdir()
    (tmp_path / "view" / "config.json").write_text(json.dumps(other.to_hf()))  # type: ignore[attr-defined]
    with pytest.raises(DominoError, match="has block_size 7, this one 4"):
        read_first_drafter(tmp_path / "view", VIEW)
