"""The base-anchored curriculum's loss, reduced in chunks so that no full set of logits exists (SPEC section 7)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax import draft, head, target
from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.weights import Draft, Target, lm_head


class Branch(NamedTuple):
    """What one branch (the final logits, or the backbone's base logits) achieved."""

    loss: Array  # [] weighted cross-entropy, nats
    accuracy: Array  # [] share of supervised labels that are the argmax
    acceptance: Array  # [] estimated acceptance length, 1 + correct prefix


class Report(NamedTuple):
    """One step's measurements; both branches are always computed."""

    loss: Array
    final: Branch
    base: Branch


def curriculum(
    drafter: Draft,
    frozen: Target,
    configs: tuple[TargetConfig, DraftConfig],
    ids: Array,
    mask: Array,
    anchors: Array,
    valid: Array,
    *,
    lam: Array,
    gamma: float,
    chunk: int,
) -> tuple[Array, Report]:
    """loss = (1 - λ)·CE(final) + λ·CE(base), with the frozen target's features computed on the fly.

    Args:
        drafter: what is trained.
        frozen: the target; its weights get no gradient.
        ids, mask: [B, S] tokens and loss mask.
        anchors, valid: [B, A] anchors and which of them count.
        lam: λ.
        gamma: decay γ of the weights exp(-(j - 1) / γ) over a block's proposals.
        chunk: proposals whose logits exist at a time.
    """
    target_config, config = configs
    _, features, _ = target.forward(frozen, target_config, ids, taps=config.target_layer_ids)
    features = jax.lax.stop_gradient(features)
    proposals = config.num_proposals
    length = ids.shape[1]
    # Row b, anchor a, proposal j: the head eats t_a ... t_{a+j-1}, the label is t_{a+j}.
    places = anchors[..., None] + jnp.arange(proposals + 1, dtype=jnp.int32)  # [B, A, J + 1]
    inside = places < length

    def at(values: Array) -> Array:
        flat = jnp.minimum(places, length - 1).reshape(values.shape[0], -1)
        return jnp.take_along_axis(values, flat, axis=1).reshape(places.shape)

    tokens = at(ids)
    supervised = (at(mask) & inside & valid[..., None])[..., 1:]
    labels = tokens[..., 1:]
    decay = jnp.exp(-jnp.arange(proposals, dtype=jnp.float32) / gamma)
    weights = jnp.where(supervised, decay, 0.0)  # [B, A, J]

    embed = frozen.embed
    x = draft.block_inputs(embed, config, tokens[..., 0])
    z = draft.proposing(config, draft.training_blocks(drafter, config, x, anchors, features))
    rank = None
    if drafter.head is not None and config.head is not None:
        rank = head.teacher_forced(drafter.head, z, embed[tokens[..., :-1]])
        corrected = jnp.arange(proposals) >= config.head.pure_draft_prefix_len
        rank = jnp.where(corrected[:, None], rank, 0)  # a zero rank vector leaves the base logits as they are
    (final_ce, final_hit), (base_ce, base_hit) = _cross_entropies(drafter, lm_head(frozen), z, rank, labels, chunk)
    total = weights.sum()

    def branch(ce: Array, hit: Array) -> Branch:
        def count(x: Array) -> Array:
            return x.sum(dtype=jnp.float32)

        # Unsupervised rows let the prefix pass, but do not count towards it.
        unbroken = jnp.cumprod((hit | ~supervised).astype(jnp.int32), axis=-1) == 1
        blocks = count(supervised.any(axis=-1))
        return Branch(
            loss=(weights * ce).sum() / jnp.where(total > 0, total, 1.0),
            accuracy=count(hit & supervised) / jnp.maximum(count(supervised), 1.0),
            acceptance=(blocks + count(unbroken & supervised)) / jnp.maximum(blocks, 1.0),
        )

    final, base = branch(final_ce, final_hit), branch(base_ce, base_hit)
    loss = (1 - lam) * final.loss + lam * base.loss
    return loss, Report(loss, final, base)


def _cross_entropies(
    drafter: Draft, output: Array, z: Array, rank: Array | None, labels: Array, chunk: int
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Cross-entropy and correctness of every proposal for the final and the base logits.

    The vocabulary-wide logits of one chunk of proposals exist at a time, in the backward pass as
    well, which computes them again.

    Args:
        output: LM head [V, D]; z: [..., J, D]; rank: [..., J, R] or None; labels: [..., J].

    Returns:
        (final, base), each (cross-entropy float32, correct bool) of the labels' shape.
    """
    shape, rows = labels.shape, labels.size
    chunk = min(chunk, rows)
    pieces = -(-rows // chunk)

    def cut(x: Array, tail: tuple[int, ...]) -> Array:
        x = x.reshape(rows, *tail)
        return jnp.pad(x, ((0, pieces * chunk - rows), *((0, 0) for _ in tail))).reshape(pieces, chunk, *tail)

    @jax.checkpoint
    def one(piece: tuple[Array, Array, Array | None]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        z, labels, rank = piece
        base = jnp.einsum("TD,VD->TV", z, output, preferred_element_type=jnp.float32)
        final = base
        if rank is not None and drafter.head is not None:
            # Cast in here: the chunks' gradients are then summed in the dtype that was given, float32.
            proj_out = drafter.head.proj_out.astype(rank.dtype)
            final = base + jnp.einsum("TR,VR->TV", rank, proj_out, preferred_element_type=jnp.float32)

        def score(logits: Array) -> tuple[Array, Array]:
            ours = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
            return jax.nn.logsumexp(logits, axis=1) - ours, jnp.argmax(logits, axis=1) == labels

        return score(final), score(base)

    pieces_in = (cut(z, z.shape[-1:]), cut(labels, ()), None if rank is None else cut(rank, rank.shape[-1:]))
    scores = jax.lax.map(one, pieces_in)
    return jax.tree.map(lambda x: x.reshape(-1)[:rows].reshape(shape), scores)
