"""The base-anchored curriculum's loss (docs/algorithm.md, section 7).

It is reduced in chunks, so that no full set of logits exists.

Everything is a sum over blocks divided by a number that the weights do not change, so that the parts of a batch (of
accumulation, of devices) add up to exactly the loss of the whole.

Position weights:

    uniform      1; the loss is a mean.
    exponential  exp(-(j - 1) / γ), the same for both branches; the loss is a mean by weight.
    d-pace       Wu et al. 2026 (arXiv 2605.18810): with q_i the probability of label i and q~_i = (1 - α)·q_i + α
                 (eq. 7), w_j = Σ_{m ≥ j} Π_{i ≤ m} q~_i (eq. 8), without a gradient (eq. 9). A weight is what a
                 proposal contributes to the expected accepted length, so the sum is divided by the number of blocks
                 and not by the weights' own sum, which would cancel that. As the paper's expectation is one drafter's,
                 each branch has the weights of its own probabilities. Rows without supervision are passed over.

Losses of a proposal with distribution q where the target's is p and the label is x:

    ce           -log q(x)
    kl           KL(p ‖ q)
    tv           ½ Σ |q - p|, the probability that rejection sampling refuses it.
    dspark       0.1·ce + 0.9·Σ |q - p| (arXiv 2607.05147), and no label counts after one without supervision.
    acceptance   -Σ_j Π_{i ≤ j} (1 - tv_i) over the block: minus the number of drafts that are accepted until one
                 fails. It is divided by the number of blocks. Rows without supervision are passed over.

Where a head chooses among the k highest base logits (DFlash 2's selector), the final branch's distribution is over
those alone. The label is put in the place of the last of them where it is not there, and then counts as missed.

A confidence head learns 1 - tv of the final branch, without a gradient to it, by binary cross-entropy, weighted as the
rest is. That is added to the loss as it is.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from domino_jax import attention, target
from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.drafters import block, training_attention
from domino_jax.drafters.dual_view import DualView, DualViewConfig, training_view_blocks
from domino_jax.drafters.heads import head_of
from domino_jax.drafters.heads.base import Correction
from domino_jax.drafters.heads.choosing import largest
from domino_jax.layers import unembed
from domino_jax.matrix import AnyMatrix
from domino_jax.sharding import constrain, gathered, model_devices, row_shards
from domino_jax.weights import Draft, Target, axes, lm_head
from train.config import OF_TV, LossKind, Objective, TrainedConfig

DSPARK_CE, DSPARK_L1 = 0.1, 0.9
TEACHER_BYTES = 2**31  # of the target's logits of all positions on one device, up to which they are made once


class Inputs(NamedTuple):
    """What one step consumes, on the device or devices."""

    ids: Array  # [B, S] int32
    mask: Array  # [B, S] bool, on at tokens to learn
    starts: Array | None = None  # [B, S] int32, the first position of each token's conversation; None: all are 0
    features: Array | None = None  # [B, S, LD] captured; None: the target runs in the same program
    hidden: Array | None = None  # [B, S, D], the target's states after its final norm, captured, for its distribution


class Sums(NamedTuple):
    """Sums over supervised proposals; those of parts of a batch add up."""

    final_loss: Array  # [] weighted, of the objective
    base_loss: Array
    final_ce: Array  # [] weighted cross-entropy, nats
    base_ce: Array
    final_hits: Array  # [J] labels that are the argmax
    base_hits: Array
    final_prefix: Array  # [J] of these, those in an unbroken prefix of them
    base_prefix: Array
    supervised: Array  # [J] supervised proposals
    blocks: Array  # [] blocks with any
    confidence_loss: Array | None = None  # [] weighted, of a confidence head


class Branch(NamedTuple):
    """What one branch (the final logits, or the backbone's base logits) achieved."""

    loss: Array  # [] weighted, of the objective, nats
    ce: Array  # [] weighted cross-entropy, nats: the same where that is the objective
    accuracy: Array  # [] share of supervised labels that are the argmax
    acceptance: Array  # [] estimated acceptance length, 1 + correct prefix
    position_accuracy: Array  # [J] accuracy of each proposal
    accepted: Array  # [J] share of blocks whose correct prefix counts proposal j


class StepMetrics(NamedTuple):
    """One step's measurements; both branches are always computed."""

    loss: Array
    final: Branch
    base: Branch
    blocks: Array  # [] supervised blocks
    proposals: Array  # [] supervised proposals
    confidence_loss: Array | None = None  # [] weighted, of a confidence head, nats


def gather_positions(values: Array, places: Array) -> Array:
    """values [B, S, ...] at places [B, A, X] (beyond the end: the last): [B, A, X, ...]."""
    flat = jnp.minimum(places, values.shape[1] - 1).reshape(places.shape[0], -1)
    flat = flat.reshape(*flat.shape, *(1 for _ in values.shape[2:]))
    return jnp.take_along_axis(values, flat, axis=1).reshape(*places.shape, *values.shape[2:])


def supervision(config: TrainedConfig, loss: LossKind | None, inputs: Inputs, anchors: Array, valid: Array) -> Array:
    """Which proposals have a label [B, A, J]: inside the sequence and the anchor's conversation, and on the mask."""
    places = anchors[..., None] + jnp.arange(1, config.num_proposals + 1, dtype=jnp.int32)
    supervised = gather_positions(inputs.mask, places) & (places < inputs.ids.shape[1]) & valid[..., None]
    if inputs.starts is not None:
        supervised &= gather_positions(inputs.starts, places) == gather_positions(inputs.starts, anchors[..., None])
    return jnp.cumprod(supervised, axis=-1) == 1 if loss == "dspark" else supervised


def loss_denominator(objective: Objective, supervised: Array) -> Array:
    """What the weighted sums over a batch are divided by; 1 where nothing is supervised."""
    if objective.position_weights == "d-pace" or objective.loss == "acceptance":
        total = supervised.any(axis=-1).sum(dtype=jnp.float32)
    else:
        total = jnp.where(supervised, _decay(objective, supervised.shape[-1]), 0.0).sum()
    return jnp.where(total > 0, total, 1.0)


def _decay(objective: Objective, proposals: int) -> Array:
    if objective.position_weights == "uniform":
        return jnp.ones(proposals, jnp.float32)
    return jnp.exp(-jnp.arange(proposals, dtype=jnp.float32) / objective.gamma)


def partial_loss(
    drafter: Any,
    frozen: Target,
    configs: tuple[TargetConfig, TrainedConfig],
    objective: Objective,
    inputs: Inputs,
    anchors: Array,
    valid: Array,
    lam: Array,
    total: Array,
) -> tuple[Array, Sums]:
    """A part of a batch: its share of the loss, and its sums.

    Args:
        drafter: what is trained.
        frozen: the target; its weights get no gradient.
        anchors, valid: [B, A] anchors and which of them count.
        lam: λ.
        total: of the whole batch, by `loss_denominator`.
    """
    config = configs[1]
    proposals = config.num_proposals
    # Row b, anchor a, proposal j: the head eats t_a ... t_{a+j-1}, the label is t_{a+j}.
    places = anchors[..., None] + jnp.arange(proposals + 1, dtype=jnp.int32)  # [B, A, J + 1]
    tokens = gather_positions(inputs.ids, places)
    labels = tokens[..., 1:]
    supervised = supervision(config, objective.loss, inputs, anchors, valid)
    first = None if inputs.starts is None else gather_positions(inputs.starts, anchors[..., None])[..., 0]

    letters = axes(config)
    embed = gathered(frozen.embed, "V D")
    x = constrain(block.block_inputs(embed, config, tokens[..., 0]), "B A M D")
    states = view_states if isinstance(config, DualViewConfig) else block_states
    z, hidden = states(drafter, frozen, configs, objective, inputs, x, anchors, first)
    head = gathered(drafter.head, letters.head)
    correction = head_of(config).teacher_forced(head, z, tokens[..., :-1], embed)
    output = gathered(lm_head(frozen), "V D")
    seen = None if hidden is None else teacher(hidden, places[..., :-1], output)  # where p of each label stands
    final, base = chunked_scores(correction, output, z, labels, seen, objective.chunk, objective.loss)

    final_loss, final_ce = _weighted(objective, final, supervised)
    base_loss, base_ce = _weighted(objective, base, supervised)
    final_hits, final_prefix = _correct(final.hit, supervised)
    base_hits, base_prefix = _correct(base.hit, supervised)
    loss, sure = (1 - lam) * final_loss + lam * base_loss, None
    if correction is not None and correction.confidence is not None:
        sure = _confidence_loss(objective, final, correction.confidence, supervised)
        loss += sure
    sums = Sums(
        final_loss,
        base_loss,
        final_ce,
        base_ce,
        final_hits,
        base_hits,
        final_prefix,
        base_prefix,
        supervised=_count(supervised),
        blocks=supervised.any(axis=-1).sum(dtype=jnp.float32),
        confidence_loss=sure,
    )
    return loss / total, sums


class Teacher(NamedTuple):
    """The target's logits at every position of a batch, and which of them each proposal is held to."""

    logits: Array  # [B, S, V] float32
    places: Array  # [B, A, J] int32


def teacher(hidden: Array, places: Array, output: AnyMatrix) -> Array | Teacher:
    """What proposals are held to: the states where the target predicts their labels [B, A, J, D], or its logits.

    Blocks overlap: with more proposals than positions each position's logits are made once, if they fit.

    Args:
        hidden: [B, S, D], the target's states after its final norm.
        places: [B, A, J] positions.
        output: the LM head [V, D].
    """
    held = hidden.shape[0] * hidden.shape[1] * output.shape[0] * 4 // model_devices() // row_shards()
    if places.shape[1] * places.shape[2] <= hidden.shape[1] or held > TEACHER_BYTES:
        return gather_positions(hidden, places)
    logits = jax.lax.stop_gradient(constrain(unembed(hidden, output), "B T V"))
    return Teacher(logits, jnp.minimum(places, hidden.shape[1] - 1))


def block_states(
    drafter: Draft,
    frozen: Target,
    configs: Any,
    objective: Objective,
    inputs: Inputs,
    x: Array,
    anchors: Array,
    first: Array | None,
) -> tuple[Array, Array | None]:
    """A block drafter's z of the rows that propose [B, A, J, D]; the target's states [B, S, D] where the loss asks.

    Args:
        configs: the target's and the drafter's.
        x: the blocks' inputs [B, A, M, D].
        first: [B, A], the first position that each block sees; 0 when None.
    """
    target_config, config = configs
    features, hidden = target_states(frozen, target_config, config, inputs, objective)
    form = training_attention.resolve_block_backend(objective.block_attention, config, anchors.shape[1])
    z = block.training_blocks(drafter, config, x, anchors, features, first, form, objective.remat)
    return block.proposing(config, z), hidden


def view_states(
    drafter: DualView,
    frozen: Target,
    configs: Any,
    objective: Objective,
    inputs: Inputs,
    x: Array,
    anchors: Array,
    first: Array | None,
) -> tuple[Array, Array | None]:
    """The same of a second view; see `block_states`."""
    config = configs[1]
    form = training_attention.resolve_block_backend(objective.block_attention, config, anchors.shape[1])
    z, hidden = training_view_blocks(
        drafter,
        configs,
        frozen,
        x,
        inputs.ids,
        anchors,
        first,
        inputs.starts,
        form,
        objective.target_attention,
        objective.remat,
    )
    hidden = jax.lax.stop_gradient(hidden) if objective.reads_target else None
    return z[..., : config.num_proposals, :], hidden


def check_attention(
    objective: Objective,
    target: TargetConfig,
    draft: TrainedConfig,
    dtype: Any,
    device: Any,
    captured: bool = False,
) -> None:
    """Refuse backends of attention that can't run, before a step is traced.

    Args:
        dtype: that the step computes in.
        device: one of those that the step is compiled for.
        captured: the target does not run.

    Raises:
        DominoError: one can't.
    """
    training_attention.check_block_backend(objective.block_attention, draft, dtype, device)
    if not captured:
        attention.available_backends(objective.target_attention, (target.head_dim,), dtype, device)


def target_states(
    frozen: Target, config: TargetConfig, drafter: DraftConfig, inputs: Inputs, objective: Objective
) -> tuple[Array, Array | None]:
    """The features [B, S, LD] and, for the target's distribution, the states after its final norm [B, S, D]."""
    features, hidden = inputs.features, inputs.hidden
    if features is None or (objective.reads_target and hidden is None):
        hidden, features, _ = target.forward(
            frozen,
            config,
            inputs.ids,
            target_layer_ids=drafter.target_layer_ids,
            attention=objective.target_attention,
            starts=inputs.starts,
        )
    dtype = frozen.norm.dtype  # of the computation, whatever form the matrices have
    features = jax.lax.stop_gradient(features.astype(dtype))
    if not objective.reads_target or hidden is None:
        return features, None
    return features, jax.lax.stop_gradient(hidden.astype(dtype))


def step_metrics(sums: Sums, lam: Array, total: Array) -> StepMetrics:
    """What the sums over a batch come to; the arguments are those of `partial_loss`."""

    def branch(loss: Array, ce: Array, hits: Array, prefix: Array) -> Branch:
        some, places = jnp.maximum(sums.blocks, 1.0), jnp.maximum(sums.supervised, 1.0)
        return Branch(
            loss=loss / total,
            ce=ce / total,
            accuracy=hits.sum() / jnp.maximum(sums.supervised.sum(), 1.0),
            acceptance=(sums.blocks + prefix.sum()) / some,
            position_accuracy=hits / places,
            accepted=prefix / some,
        )

    final = branch(sums.final_loss, sums.final_ce, sums.final_hits, sums.final_prefix)
    base = branch(sums.base_loss, sums.base_ce, sums.base_hits, sums.base_prefix)
    loss = (1 - lam) * final.loss + lam * base.loss
    sure = None if sums.confidence_loss is None else sums.confidence_loss / total
    return StepMetrics(loss if sure is None else loss + sure, final, base, sums.blocks, sums.supervised.sum(), sure)


def _count(which: Array) -> Array:
    """[B, A, J] -> [J]."""
    return which.sum(axis=(0, 1), dtype=jnp.float32)


def _correct(hit: Array, supervised: Array) -> tuple[Array, Array]:
    """Correct proposals [J], and those of them in an unbroken prefix [J]."""
    # Unsupervised rows let the prefix pass, but do not count towards it.
    unbroken = jnp.cumprod((hit | ~supervised).astype(jnp.int32), axis=-1) == 1
    return _count(hit & supervised), _count(unbroken & supervised)


class Scores(NamedTuple):
    """What one branch says of each proposal, each of the labels' shape."""

    ce: Array  # cross-entropy, float32
    hit: Array  # bool, whether the label is the argmax
    divergence: Array | None  # from the target's distribution, KL or total variation, float32


def _weighted(objective: Objective, branch: Scores, supervised: Array) -> tuple[Array, Array]:
    """Weighted sums of the objective and of the cross-entropy."""
    weights = _weights(objective, branch, supervised)
    ce = (weights * branch.ce).sum()
    if branch.divergence is None:
        return ce, ce
    if objective.loss == "acceptance":
        return -accepted_length(branch.divergence, supervised).sum(), ce
    loss = (weights * branch.divergence).sum()
    return (DSPARK_CE * ce + DSPARK_L1 * 2 * loss if objective.loss == "dspark" else loss), ce


def _weights(objective: Objective, branch: Scores, supervised: Array) -> Array:
    if objective.position_weights == "d-pace":
        return d_pace(branch.ce, supervised, objective.d_pace_alpha)
    return jnp.where(supervised, _decay(objective, supervised.shape[-1]), 0.0)


def _confidence_loss(objective: Objective, final: Scores, logits: Array, supervised: Array) -> Array:
    """The weighted sum of a confidence head's binary cross-entropies; logits are [B, A, J]."""
    assert final.divergence is not None
    kept = jax.lax.stop_gradient(1 - final.divergence)
    return (_weights(objective, final, supervised) * optax.sigmoid_binary_cross_entropy(logits, kept)).sum()


def accepted_length(variation: Array, supervised: Array) -> Array:
    """How many drafts are accepted until one fails, by expectation: total variations [..., J] -> [...]."""
    reached = jnp.cumprod(jnp.where(supervised, 1 - variation, 1.0), axis=-1)
    return jnp.where(supervised, reached, 0.0).sum(axis=-1)


def d_pace(ce: Array, supervised: Array, alpha: float) -> Array:
    """The weights w_j (see the module) from cross-entropies: both [..., J] -> [..., J], without a gradient."""
    confidence = (1 - alpha) * jnp.exp(-jax.lax.stop_gradient(ce)) + alpha
    reached = jnp.where(supervised, jnp.cumprod(jnp.where(supervised, confidence, 1.0), axis=-1), 0.0)
    onwards = jnp.flip(jnp.cumsum(jnp.flip(reached, axis=-1), axis=-1), axis=-1)
    return jnp.where(supervised, onwards, 0.0)


def chunked_scores(
    correction: Correction | None,
    output: AnyMatrix,
    z: Array,
    labels: Array,
    seen: Array | Teacher | None,
    chunk: int,
    loss: LossKind | None = None,
) -> tuple[Scores, Scores]:
    """What the final and the base logits say of every proposal.

    The vocabulary-wide logits of one chunk of proposals exist at a time, in the backward pass as well, which computes
    them again. Over a mesh each device has a chunk of its own rows and its own part of the vocabulary, and no logits
    cross between them: sums and maxima do.

    Args:
        correction: the head's of z, its rank [B, ..., J, R]; None where nothing is corrected. Its confidence is not
            read.
        output: LM head [V, D]; z: [B, ..., J, D]; labels: [B, ..., J].
        seen: [B, ..., J, D], the target's states where it predicts the labels, or its logits; None where not asked for.
        loss: which divergence from the target's distribution is asked for.

    Returns:
        (final, base).
    """
    shape, shards = labels.shape, row_shards()
    rows = labels.size // shards
    chunk = min(chunk, rows)
    pieces = -(-rows // chunk)

    def cut(x: Array, tail: tuple[int, ...]) -> Array:
        """[pieces, shards, chunk, ...]"""
        x = jnp.pad(x.reshape(shards, rows, *tail), ((0, 0), (0, pieces * chunk - rows), *((0, 0) for _ in tail)))
        x = jnp.moveaxis(x.reshape(shards, pieces, chunk, *tail), 1, 0)
        return constrain(x, " ".join(["-", "B", "-", *("-" for _ in tail)]))

    rank, low = (None, None) if correction is None else (correction.rank, correction.output)
    if low is not None:
        # One for each part of the batch, so that the parts' gradients are summed once, after the loop.
        low = constrain(jnp.broadcast_to(low, (shards, *low.shape)), "B V R")

    known = None
    if isinstance(seen, Teacher):
        batch, positions, vocab = seen.logits.shape
        known = constrain(seen.logits.reshape(shards, -1, vocab), "B - V")
        first = jnp.arange(batch, dtype=jnp.int32) % (batch // shards) * positions  # in its device's rows
        seen = seen.places + first.reshape(-1, *(1 for _ in seen.places.shape[1:]))

    @jax.checkpoint
    def one(piece: tuple[Array, Array, Array | None, Array | None]) -> tuple[Scores, Scores]:
        z, labels, rank, seen = piece

        def vocabulary(x: Array) -> Array:
            return constrain(unembed(x, output), "B - V")

        base = final = vocabulary(z)
        if rank is not None and low is not None:
            # Cast in here: the chunks' gradients are then summed in the dtype that was given, float32.
            added = jnp.einsum("XTR,XVR->XTV", rank, low.astype(rank.dtype), preferred_element_type=jnp.float32)
            final = constrain(base + added, "B - V")
        names = jnp.arange(output.shape[0], dtype=labels.dtype)
        proposed = None
        if correction is not None and correction.among is not None:
            # The label takes the place of the last one where it is not among them.
            last = largest(base, correction.among, divided=True)[0][..., -1:]
            found = jnp.where(names == labels[..., None], base, 0).sum(axis=-1, keepdims=True) >= last
            proposed = found[..., 0]
            kept = (base > last) | (found & (base == last)) | (names == labels[..., None])
            final = jnp.where(kept, final, -jnp.inf)
        likely = None
        if seen is not None:
            if known is None:
                theirs = vocabulary(seen)
            else:
                theirs = constrain(jnp.take_along_axis(known, seen[..., None], axis=1), "B - V")
            likely = jax.nn.softmax(theirs, axis=-1)
            # Minus the entropy, of the KL.
            surprise = jnp.where(likely > 0, likely * (theirs - jax.nn.logsumexp(theirs, -1, keepdims=True)), 0).sum(-1)

        def score(logits: Array) -> Scores:
            # Picked by comparing, which leaves a vocabulary where it lies; a gather would not.
            ours = jnp.where(names == labels[..., None], logits, 0).sum(axis=-1)
            total = jax.nn.logsumexp(logits, axis=-1)
            if likely is None:
                divergence = None
            elif loss in OF_TV:
                divergence = 0.5 * jnp.abs(jnp.exp(logits - total[..., None]) - likely).sum(axis=-1)
            else:
                divergence = surprise - (likely * logits).sum(axis=-1) + total
            return Scores(total - ours, jnp.argmax(logits, axis=-1) == labels, divergence)

        ends = score(final)
        if proposed is not None:
            ends = ends._replace(hit=ends.hit & proposed)
        return ends, score(base)

    def cut_vectors(x: Array | None) -> Array | None:
        return None if x is None else cut(x, x.shape[labels.ndim :])

    found = jax.lax.map(one, (cut(z, z.shape[-1:]), cut(labels, ()), cut_vectors(rank), cut_vectors(seen)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(shards, -1)[:, :rows].reshape(shape), found)
