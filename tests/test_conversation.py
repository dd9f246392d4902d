"""Conversations that keep their caches: the tokens and accepted drafts of fresh runs, from fewer tokens run."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import factory
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TARGET, make_tokenizer

from convert.names import entries
from domino_jax import cache as kv
from domino_jax import decode, prepare, sharding
from domino_jax.decode import Params
from infer import engine
from infer.auto import Chooser
from infer.conversation import Conversation, shared
from infer.engine import Engine, Sequence, Settings
from infer.models import Loaded

pytestmark = pytest.mark.usefixtures("quick_compilation")
LIMIT = 40


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """A drafter that is often right, and a tokenizer of bytes."""
    target = replace(TARGET, tie_word_embeddings=False, max_position_embeddings=4096)
    pair = factory.good_pair(target, 3, num_hidden_layers=1)
    return Loaded(pair.configs, pair.params, make_tokenizer(), (), jnp.dtype(jnp.float32), (), 0.0)


@pytest.fixture(scope="module")
def fresh(loaded) -> Engine:
    return Engine(loaded)


def turn(
    running: Engine,
    prompt: list[int],
    conversation: Conversation | None = None,
    speculative: bool = True,
    limit: int = LIMIT,
    stop: str = "",
    **how: Any,
) -> Sequence:
    sequence, _ = running.sequence(prompt, limit, 0, (stop,) if stop else ())
    running.generate([sequence], speculative=speculative, conversation=conversation, **how)
    return sequence


def result(s: Sequence) -> tuple[list[int], list[int], int, str | None]:
    return s.tokens, s.accepted, s.steps, s.finish_reason


def some(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(4, TARGET.vocab_size, count).tolist()


def talk(say: Callable[[list[int]], Sequence]) -> list[tuple[list[int], int]]:
    """Turns of every kind, each made from the answers before: what was said, and how much of it is held."""
    turns = []

    def next_turn(prompt: list[int], held: int) -> Sequence:
        turns.append((prompt, held))
        return say(prompt)

    first = next_turn(some(30, 1), 0)
    second = next_turn([*first.ids, *some(20, 2)], len(first.ids) - 1)  # an extension; the last token was never run
    # As Qwen3's template: the end of the last prompt is rendered in another way, and so the answer moves.
    third = next_turn([*second.prompt[:-4], *second.tokens, *some(10, 3)], len(second.prompt) - 4)
    fourth = next_turn([*third.ids, *some(300, 4)], len(third.ids) - 1)  # long
    next_turn(fourth.prompt, len(fourth.prompt) - 1)  # again: the last token is run for its hidden state
    next_turn([*first.prompt, 7], len(first.prompt))  # much is gone, and the bucket is smaller
    next_turn(some(35, 5), 0)  # another conversation
    return turns


def assert_alike(ours: Conversation, theirs: Conversation) -> None:
    """The same ids, and caches that hold the same of each, the target's and the drafter's."""
    assert (ours.ids, ours.drafted) == (theirs.ids, theirs.drafted)
    assert (ours.context is None) == (theirs.context is None)
    for a, b, valid in ((ours.cache, theirs.cache, len(ours.ids)), (ours.context, theirs.context, ours.drafted)):
        for x, y in zip(jax.device_get(jax.tree.leaves(a)), jax.device_get(jax.tree.leaves(b)), strict=True):
            np.testing.assert_allclose(x[:1, :, :valid], y[:1, :, :valid], atol=1e-4, rtol=0)


def check_talk(ours: Engine, theirs: Engine, speculative: bool = True, choose: Settings | None = None) -> None:
    """Every turn of a talk on `ours` gives what a fresh run on `theirs` gives, and leaves the same behind."""
    conversation, seen = Conversation(), []

    def say(prompt: list[int]) -> Sequence:
        answer = turn(ours, prompt, conversation, speculative, choose=choose)
        alone = Conversation()
        expected = turn(theirs, prompt, alone, speculative, choose=choose)
        assert result(answer) == result(expected)
        assert_alike(conversation, alone)
        seen.append((answer.reused, expected.reused, answer.accepted))
        return answer

    turns = talk(say)
    for (reused, alone, _), (prompt, held) in zip(seen, turns, strict=True):
        room = kv.bucket(len(prompt) + (ours.loaded.configs if speculative else ours.loaded.configs.lean).reach)
        assert alone == 0
        if held + decode.CONTINUED_CHUNK <= room:
            assert reused == held
        else:  # the padding of the chunk would not fit, so that it begins sooner
            assert held - decode.CONTINUED_CHUNK < reused < held and (room - reused) % decode.CONTINUED_CHUNK == 0
    if speculative:
        assert {m for *_, accepted in seen for m in accepted} >= {0, 1, 2, 3}


@pytest.mark.parametrize("speculative", [True, False], ids=["drafts", "plain"])
def test_every_turn_gives_what_a_fresh_run_of_its_ids_gives(loaded, fresh, speculative):
    """Tokens, and accepted drafts cycle by cycle."""
    check_talk(fresh, fresh, speculative)
