"""The verification scan: how many drafts stand, and the target's own next token (docs/algorithm.md, section 6)."""

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax.sampling import pick, sample


def prefix_length(accepted: Array) -> Array:
    """Length of the leading run of True: [B, J] -> [B] int32."""
    return jnp.sum(jnp.cumprod(accepted.astype(jnp.int32), axis=1), axis=1)


def likeliest_prefixes(confidence: Array, most: Array, budget: int) -> Array:
    """How many drafts of each row are verified, where the likeliest of all rows are: [B] int32.

    A draft is as likely to stand as it and all before it are together, so that what is taken of a row is a prefix.
    Whether a draft is among them depends on those before it in its row, and on other rows, never on itself.

    Args:
        confidence: [B, J], logits of how likely each is to be accepted if those before it are, known before it was
            drawn. What is no number is not likely at all.
        most: [B] int32, drafts that a row may have.
        budget: drafts of all rows together, at most.
    """
    chances = jnp.nan_to_num(jax.nn.sigmoid(confidence), nan=0.0)
    asked = jnp.arange(confidence.shape[1]) < most[:, None]
    # Products in whatever order may be rounded up by a factor of one; they never rise.
    survival = jax.lax.cummin(jnp.cumprod(chances, axis=1), axis=1)
    scores = jnp.where(asked, survival, -1.0)
    # Of equals the earlier places come first: none is taken without those before it.
    order = jnp.argsort(-scores.T.reshape(-1), stable=True)
    taken = jnp.zeros_like(order).at[order[: max(budget, 0)]].set(1)
    return jnp.sum(jnp.where(asked, taken.reshape(scores.T.shape).T, 0), axis=1).astype(jnp.int32)


def _stand(stands: Array, lengths: Array | None) -> Array:
    """Which drafts stand [B, J], of those that are verified."""
    return stands if lengths is None else stands & (jnp.arange(stands.shape[1]) < lengths[:, None])


def _accept_equal(drafts: Array, choices: Array, lengths: Array | None) -> tuple[Array, Array]:
    """Accept drafts [B, J] while they equal choices [B, J + 1] of the target; the choice after them is the next."""
    count = prefix_length(_stand(drafts == choices[:, :-1], lengths))
    return count, jnp.take_along_axis(choices, count[:, None], axis=1)[:, 0]


def accept_greedy(drafts: Array, logits: Array, lengths: Array | None = None) -> tuple[Array, Array]:
    """Accept drafts while they equal the target's argmax; the bonus is the argmax after the last.

    Args:
        drafts: [B, J] int32.
        logits: [B, J + 1, V] of the target over [anchor, drafts]. Ties go to the lowest id.
        lengths: [B], how many of each row's drafts are verified; all when None. They must not depend on the drafts.

    Returns:
        accepted count m [B] and bonus [B], int32.
    """
    return _accept_equal(drafts, jnp.argmax(logits, axis=-1).astype(jnp.int32), lengths)


def accept_sampled(keys: Array, drafts: Array, q: Array, p: Array, lengths: Array | None = None) -> tuple[Array, Array]:
    """Speculative sampling (Leviathan et al. 2023, algorithm 1): the output is distributed exactly as p.

    Accept d_j with probability min(1, p_j(d_j) / q_j(d_j)); after the first rejection draw from
    norm(max(p_j - q_j, 0)), after none from p_{J+1}.

    Args:
        keys: [B, J + 1], of each position; others than drew the drafts.
        drafts: [B, J], drawn from q.
        q: [B, J, V] the drafter's distributions; p: [B, J + 1, V] the target's, both after filters.
        lengths: see `accept_greedy`.

    Returns:
        accepted count m [B] and next token [B], int32.
    """
    keys = jax.vmap(jax.vmap(jax.random.split))(keys)  # [B, J + 1, 2]
    proposals = drafts.shape[1]
    p_draft, q_draft = (pick(x[:, :proposals], drafts) for x in (p, q))
    uniform = jax.vmap(jax.vmap(jax.random.uniform))(keys[:, :proposals, 0])
    count = prefix_length(_stand(uniform * q_draft < p_draft, lengths))
    # Nothing was proposed after the last draft: with q = 0 there, the residual is p itself.
    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
    if lengths is not None:
        q = jnp.where((jnp.arange(proposals + 1) < lengths[:, None])[..., None], q, 0.0)
    p, q = (jnp.take_along_axis(x, count[:, None, None], axis=1)[:, 0] for x in (p, q))
    key = jnp.take_along_axis(keys[..., 1], count[:, None], axis=1)[:, 0]
    residual = jnp.maximum(p - q, 0.0)
    # Empty by rounding alone, or not a number where a drafter's distribution was none; its drafts were not accepted.
    empty = ~(jnp.sum(residual, axis=-1, keepdims=True) > 0)
    return count, sample(key, jnp.where(empty, p, residual))


def accept_coupled(keys: Array, drafts: Array, p: Array, lengths: Array | None = None) -> tuple[Array, Array]:
    """Accept drafts while they are what the target draws with the keys that drew them (Daliri et al. 2024).

    The drafts never change the output, so a row's sample depends on its keys alone.

    Args:
        keys: [B, J + 1], of each position.
        drafts: [B, J].
        p: [B, J + 1, V] the target's distributions, after filters.
        lengths: see `accept_greedy`.

    Returns:
        accepted count m [B] and next token [B], int32.
    """
    return _accept_equal(drafts, sample(keys, p), lengths)
