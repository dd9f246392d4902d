"""The parts of one cycle, each timed alone."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.loading import LoadedModel
from convert.options import SamplingOptions
from domino_jax import decode
from domino_jax import tree as trees
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.heads import head_of
from domino_jax.drafters.tree import TreeDrafter
from domino_jax.runtime.slots import Request, rows_of
from domino_jax.tree import Tree
from domino_jax.weights import Params

REPEATS = 20  # runs of a phase inside one program, so that dispatching is not what is measured
DISPATCHES = 20  # timed, of which the shortest counts
TRIES, ENOUGH_SECONDS = 5, 3.0  # timed runs of such a program: fewer where they take long


def time_dispatch(loaded: LoadedModel, prompts: list[list[int]], choose: SamplingOptions) -> dict[str, float]:
    """Arguments of a dispatch, and milliseconds that the host spends on one whose loop ends before its first cycle."""
    configs, params = loaded.configs, loaded.params
    rows = rows_of([Request(prompt, replace(choose.params(), max_tokens=2)) for prompt in prompts])
    state = decode.prefill_batch(params, configs, prompts, rows, loaded.dtype)
    loop = decode.speculate if configs.drafter else decode.autoregress
    times = []
    for _ in range(1 + DISPATCHES):  # the first compiles
        jax.block_until_ready(state)
        began = time.perf_counter()
        state, emitted = loop(params, configs, state, 8, choose.greedy, np.int32(0))
        jax.device_get(emitted)
        times.append(time.perf_counter() - began)
    return {"arguments": len(jax.tree.leaves((params, state))) + 1, "dispatch_ms": min(times[1:]) * 1e3}


def time_phases(loaded: LoadedModel, prompts: list[list[int]], choose: SamplingOptions) -> dict[str, float]:
    """Milliseconds of each part of one cycle, each alone in a program that repeats it.

    The parts: draft (backbone and base logits), head, target (the verification pass with its LM head),
    verify (accept and commit), context (the drafter's keys and values of what was verified). Their sum is
    close to a cycle but not equal to it, since one program overlaps them.
    """
    configs, params = loaded.configs, loaded.params
    drafter = configs.drafter
    batch = len(prompts)
    rows = rows_of([Request(prompt, replace(choose.params(), max_tokens=1 << 20)) for prompt in prompts])
    state = decode.prefill_batch(params, configs, prompts, rows, loaded.dtype)
    greedy = choose.greedy
    none = jnp.zeros((batch, 0), jnp.int32)

    def timed(run: Callable[[Params, decode.DecodeState], tuple[decode.DecodeState, Any]]) -> float:
        def body(_: int, carry: tuple[Params, decode.DecodeState, jax.Array]) -> Any:
            params, state, used = carry
            # Behind a barrier, every result is used and the next repetition depends on it: nothing is dropped,
            # hoisted, or computed only in the part that is looked at.
            state, out = jax.lax.optimization_barrier(run(params, state))
            for leaf in filter(lambda x: x.size, jax.tree.leaves(out)):
                used += leaf[(0,) * leaf.ndim].astype(jnp.float32)
            return params, state._replace(token=state.token + (used < -1e30).astype(jnp.int32)), used

        # The state is donated, as in decoding: otherwise the caches are copied before they are written.
        program = jax.jit(
            lambda state, params: jax.lax.fori_loop(0, REPEATS, body, (params, state, jnp.float32(0)))[1:],
            donate_argnums=0,
        )
        mine, _ = program(jax.tree.map(jnp.copy, state), params)
        times = []
        while len(times) < TRIES and sum(times) * REPEATS < ENOUGH_SECONDS:
            jax.block_until_ready(mine)
            began = time.perf_counter()
            mine, _ = jax.block_until_ready(program(mine, params))
            times.append((time.perf_counter() - began) / REPEATS)
        return statistics.median(times) * 1e3

    def verified_by(drafts: jax.Array, tree: Tree | None = None) -> Callable[[Params, decode.DecodeState], Any]:
        def run(p: Params, s: decode.DecodeState) -> Any:
            logits, features, cache = decode.run_target(p, configs, s, drafts, tree)
            return s._replace(cache=cache), (logits, features)

        return run

    if drafter is None:
        return {"target_ms": timed(verified_by(none))}

    def keys_of(s: decode.DecodeState) -> tuple[jax.Array | None, jax.Array | None]:
        """To draw drafts with, and to verify them."""
        keys = None if greedy else decode.position_keys(s, configs.depth)
        return (None, None) if keys is None else (keys[:, :-1, 0], keys)

    draft, _ = decode.propose(params, configs, state, keys_of(state)[0])
    tree = None if draft.parents is None else trees.tree_of(draft.parents, configs.depth)
    drafts = jnp.maximum(draft.tokens, 0)
    logits, features, _ = decode.run_target(params, configs, state, drafts, tree)

    def anew(x: jax.Array, s: decode.DecodeState) -> jax.Array:
        """`x`, in a form that the compiler must take for another one in each repetition."""
        return x + 0 * s.token.astype(x.dtype)[:, None, None]

    def verified(p: Params, s: decode.DecodeState) -> Any:
        if tree is not None:
            choices = decode.choices_at_nodes(keys_of(s)[1], tree, anew(logits, s), s.rows.sampling)
            path = trees.walk(tree, jnp.concatenate([s.token[:, None], draft.tokens], axis=1), choices, configs.depth)
            return s, decode.commit(s, trees.along(choices, path.nodes), path.accepted + 1)[1]
        count, bonus = decode.accept(keys_of(s)[1], draft, anew(logits, s), s)
        return s, decode.commit(s, jnp.concatenate([draft.tokens, bonus[:, None]], axis=1), count + 1)[1]

    def observed(p: Params, s: decode.DecodeState) -> Any:
        tokens = jnp.concatenate([s.token[:, None], drafts], axis=1)[:, : configs.depth + 1]
        seen = drafter.observe(p.draft, s.drafter, tokens, anew(features, s)[:, : configs.depth + 1], s.length)
        return s._replace(drafter=seen), ()

    def proposed(p: Params, s: decode.DecodeState) -> Any:
        made, s = decode.propose(p, configs, s, keys_of(s)[0])
        return s, made

    parts: dict[str, Callable[[Params, decode.DecodeState], Any]] = {"draft": proposed}
    if isinstance(drafter, BlockDrafter):  # whose two parts are told apart
        block, proposals = drafter, configs.depth
        z, base, _ = block.draft_block(params.draft, state.drafter, decode.view(params, configs, state), proposals)

        def drafted(p: Params, s: decode.DecodeState) -> Any:
            z, base, context = block.draft_block(p.draft, s.drafter, decode.view(p, configs, s), proposals)
            return s._replace(drafter=context), (z, base)

        def corrected(p: Params, s: decode.DecodeState) -> Any:
            view = block.named(p.draft, decode.view(p, configs, s))
            given = anew(z, s), anew(base, s), view, keys_of(s)[0]
            if isinstance(block, TreeDrafter) and configs.branching:
                return s, block.grow(p.draft, *given[:3], configs.proposals, given[3])
            return s, head_of(block.config).propose(p.draft.head, *given, block.candidates)

        parts = {"draft": drafted, "head": corrected}
    parts |= {"target": verified_by(drafts, tree), "verify": verified, "context": observed}
    return {f"{name}_ms": timed(run) for name, run in parts.items()}
