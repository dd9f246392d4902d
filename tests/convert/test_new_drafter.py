"""A drafter with weights of its own, and a head, are a file and a line of a registry: here, this file and a line."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
from factory import BYTE_DRAFT, BYTE_TARGET, make_target
from flax import nnx

from convert import check, drafters, folders, hf
from convert.drafters import custom, form_of, make_drafter
from convert.loading import load_model
from domino_jax import decode, layers, target
from domino_jax.config import CustomDraftConfig
from domino_jax.drafters import heads
from domino_jax.drafters.base import DraftTokens, Product
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.heads.base import Correction
from domino_jax.drafters.heads.choosing import choose_token, stacked
from domino_jax.drafters.heads.none import NoHead
from domino_jax.errors import DominoError
from domino_jax.fields import integer
from domino_jax.layers import unembed
from domino_jax.matrix import dot, take
from domino_jax.weights import init_weights
from infer.bench import roofline
from infer.bench.modes import mode_of
from infer.engine import Decoding, Engine

# --- A drafter: what docs/adding-a-drafter.md asks for -------------------------------------------------------------


@dataclass(frozen=True)
class ChainConfig(CustomDraftConfig):
    """A state that eats one token after another."""

    architecture = "ChainModel"
    tensors = (
        ("norm", "D", ("norm.weight",)),
        ("down", "R D", ("chain.down.weight",)),
        ("up", "D R", ("chain.up.weight",)),
    )

    rank: int
    steps: int

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | {"R": self.rank}

    @classmethod
    def read(cls, fields, decoder, warnings):
        if not fields.given("chain_steps"):
            warnings.append(f"{fields.where} has no chain_steps: taken as 3.")
        return cls(**decoder, rank=fields.get("rank", integer(1)), steps=fields.get("chain_steps", integer(1), 3))

    def weights(self, leaf):
        return ChainWeights(leaf)


class ChainWeights(nnx.Module):
    def __init__(self, leaf):
        self.norm, self.down, self.up = leaf("D"), leaf("R D"), leaf("D R")


@dataclass(frozen=True)
class ChainDrafter:
    config: ChainConfig
    target_layer_ids = ()

    @property
    def name(self) -> str:
        return "a chain"

    @property
    def most(self) -> int:
        return self.config.steps

    def scratch(self, proposals):
        return 0

    def init(self, batch, capacity, dtype):
        return jnp.zeros((batch, 0), dtype)

    def propose(self, weights, state, view, proposals, keys):
        token, made = view.token, []
        h = jnp.zeros((token.shape[0], self.config.hidden_size), weights.norm.dtype)
        for j in range(proposals):
            h = layers.embed(view.target.embed, token) + dot(jnp.tanh(dot(h, weights.down)), weights.up)
            z = layers.rms_norm(h, weights.norm, self.config.rms_norm_eps)
            logits = target.logits(view.target, view.config, z[:, None], view.output)[:, 0]
            made.append(choose_token(logits, keys, j, view.sampling, self.config.vocab_size))
            token = made[-1][0]
        return stacked(made), state, view.cache

    def observe(self, weights, state, tokens, features, start, proposed=False):
        return state

    def products(self, weights, proposals):
        return [Product((weights.down, weights.up), 1, turns=proposals)]


# --- The line ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    monkeypatch.setattr(drafters, "FORMS", (custom(ChainConfig, ChainDrafter), *drafters.FORMS))


CONFIG = ChainConfig(**BYTE_TARGET.geometry(num_hidden_layers=1), rank=3, steps=4)
RAW = {
    "architectures": ["ChainModel"],
    **{name: value for name, value in CONFIG.geometry().items() if name != "rope_scaling"},
    "rank": 3,
    "chain_steps": 4,
}
PROMPTS = [[5, 70, 9, 30] * 4, [8], [61, 62]]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A target that repeats itself, a drafter that does so too, and one that soon does not."""
    folder = tmp_path_factory.mktemp("chain")
    make_target(folder / "target", std=factory.REPEATING)
    for name, std in (("good", factory.REPEATING), ("poor", 1.0)):
        hf.save_hf(folder / name, init_weights(CONFIG, jax.random.key(1), std=std), CONFIG, RAW)
    return folder


def generated(loaded: Any, **how: Any) -> tuple[list[list[int]], set[int]]:
    """Tokens after each prompt, and the numbers of drafts accepted."""
    engine = Engine(loaded)
    sequences = [engine.sequence(prompt, 20)[0] for prompt in PROMPTS]
    engine.generate(sequences, Decoding(**how))
    return [s.tokens for s in sequences], {count for s in sequences for count in s.accepted}


def test_it_loads_and_changes_no_token(made, tmp_path):
    plain, _ = generated(load_model(made / "target", None, "float32"))
    ways: dict[str, tuple[str, dict[str, Any], set[int]]] = {
        "all that it proposes": ("good", {}, {4, 3}),  # 3 where the limit of tokens comes first
        "two": ("good", {"drafts": 2}, {2}),
        "one that knows little": ("poor", {}, {1}),
        "over a mesh": ("good", {"mesh": (1, 2)}, {4, 3}),
        "beside n-grams": ("poor", {"ngram": True}, {1, 3, 4}),
    }
    for name, (draft, how, expected) in ways.items():
        loaded = load_model(made / "target", made / draft, "float32", **how)
        tokens, accepted = generated(loaded)
        assert tokens == plain and accepted <= expected, (name, accepted)
        assert not loaded.warnings and isinstance(loaded.configs.draft, ChainConfig)
    folders.convert_folder(made / "good", tmp_path / "orbax")
    assert generated(load_model(made / "target", tmp_path / "orbax", "float32"))[0] == plain


def test_it_is_checked_and_measured_as_any_other(made):
    report = check.check_folder(made / "good", made / "target")
    assert not report.problems and dict(report.lines)["target"] == "fits"
    assert dict(report.lines)["what"].startswith("ChainModel: width")
    loaded = load_model(made / "target", made / "good", "float32")
    assert loaded.configs.drafter is not None and mode_of(loaded.configs.drafter) == "ChainDrafter"
    work = roofline.work(loaded.configs, loaded.params, batch=2, context=10)
    assert work["draft"] == (4 * 2 * 3 * CONFIG.hidden_size * 4, 4 * 2 * 2 * 3 * CONFIG.hidden_size * 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": None}, "has no rank; expected an integer of at least 1"),
        ({"rank": "3"}, 'has rank "3"; expected an integer of at least 1'),
        ({"rope_theta": None}, "has no rope_theta"),
        ({"hidden_size": 48}, "its target's hidden_size is 48, this target's is"),
        ({"vocab_size": 261}, "its target's vocab_size is 261, this target's is 260"),
        ({"rank": 4}, "chain.down.weight has shape"),
        ({"final_logit_softcapping": 30}, "is not supported"),
    ],
)
def test_what_is_wrong_with_its_folder_is_said(made, tmp_path, change, said):
    folder = tmp_path / "draft"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(made / "good" / "model.safetensors")
    raw = {name: value for name, value in (RAW | change).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(DominoError) as error:
        load_model(made / "target", folder, "float32")
    assert said in str(error.value)


def test_its_guesses_and_the_fields_that_nobody_read_are_warnings():
    raw = {name: value for name, value in RAW.items() if name != "chain_steps"} | {"chain_kind": "long"}
    config, warnings = form_of(raw).read(raw, None, None)
    assert config == dataclasses.replace(CONFIG, steps=3)
    assert [("chain_steps" in w, "chain_kind" in w) for w in warnings] == [(True, False), (False, True)]
    assert isinstance(make_drafter(config), ChainDrafter)


# --- A head: DSpark's vanilla one, on the same interface -----------------------------------------------------------


class MarkovWeights(nnx.Module):
    def __init__(self, leaf):
        self.w1, self.w2 = leaf("V R"), leaf("V R")


@dataclass(frozen=True)
class MarkovHead(NoHead):
    """A table of what follows each token: logits_j = base_j + W2 · W1[x_{j-1}]."""

    name: ClassVar[str] = "Markov"
    projector_type: ClassVar[str] = "markov"
    tensors: ClassVar[Any] = (
        ("w1", "V R", ("markov_head.markov_w1.weight",)),
        ("w2", "V R", ("markov_head.markov_w2.weight",)),
    )
    looped: ClassVar[Any] = ("w2",)
    zero_at_first: ClassVar[Any] = ("w2",)

    rank: int = 2

    @property
    def sizes(self) -> dict[str, int]:
        return {"R": self.rank}

    @classmethod
    def read(cls, fields, warnings):
        return cls(fields.get("head_rank", integer(1)))

    def to_hf(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"projector_type": "markov", "head_rank": self.rank}, {}

    def weights(self, leaf) -> Any:
        return MarkovWeights(leaf)

    def propose(self, weights, z, base, view, keys, candidates=None) -> DraftTokens:
        made, token = [], view.token
        for j in range(base.shape[1]):
            logits = base[:, j] + unembed(take(weights.w1, token), weights.w2)
            made.append(choose_token(logits, keys, j, view.sampling, base.shape[-1]))
            token = made[-1][0]
        return stacked(made)

    def teacher_forced(self, weights, z, tokens, embed) -> Correction:
        return Correction(weights.w1[tokens], weights.w2)


@pytest.fixture
def markov(monkeypatch) -> Iterator[None]:
    monkeypatch.setitem(heads.HEADS, "markov", MarkovHead)
    yield


def test_a_head_is_a_class_and_a_line(markov, made, tmp_path):
    config = dataclasses.replace(BYTE_DRAFT, head=MarkovHead(3))
    weights = init_weights(config, jax.random.key(4), std=0.3)
    hf.save_hf(tmp_path / "draft", weights, config, config.to_hf())
    make_target(tmp_path / "target")
    plain, _ = generated(load_model(tmp_path / "target", None, "float32"))
    ways: tuple[dict[str, Any], ...] = {}, {"draft_weights": "int8"}, {"mesh": (1, 2)}
    for how in ways:
        loaded = load_model(tmp_path / "target", tmp_path / "draft", "float32", **how)
        drafter = loaded.configs.drafter
        assert isinstance(drafter, BlockDrafter) and drafter.config.head == MarkovHead(3)
        assert mode_of(drafter) == "markov"
        assert generated(loaded)[0] == plain, how
    assert check.check_folder(tmp_path / "draft").lines[0][1].startswith("Markov drafter")


def test_a_heads_two_forms_agree():
    """What it proposes is the argmax of what training computes of the same tokens."""
    head = MarkovHead(3)
    config = dataclasses.replace(factory.draft_config(), head=head)
    pair = factory.Pair.make(config)
    state = loops.begin(pair.params, pair.configs, [[1, 2, 3], [7]], 8)

    @jax.jit
    def both(params, state):
        drafter = pair.configs.drafter
        assert isinstance(drafter, BlockDrafter)
        view = decode.view(params, pair.configs, state)
        z, base, _ = drafter.draft_block(params.draft, state.drafter, view, drafter.most)
        drafts = head.propose(params.draft.head, z, base, view, None).tokens
        before = jnp.concatenate([state.token[:, None], drafts[:, :-1]], axis=1)
        forced = head.teacher_forced(params.draft.head, z[:, None], before[:, None], params.target.embed)
        return drafts, base, base + (forced.rank @ forced.output.T)[:, 0]

    drafts, base, forced = jax.device_get(both(pair.params, state))
    np.testing.assert_array_equal(drafts, forced.argmax(axis=-1))
    assert (drafts != base.argmax(axis=-1)).any(), "a head that changes nothing tests nothing"
