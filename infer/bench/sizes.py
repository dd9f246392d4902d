"""Bytes of a model on one device, by its configs alone: weights, states, and an estimate of what programs need."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax

from convert.drafters import make_drafter
from domino_jax.config import DecoderConfig, DraftConfig, TargetConfig
from domino_jax.decode import LARGEST_CHUNK, DecodeConfig
from domino_jax.errors import DominoError
from domino_jax.prepare import quantize_drafter, quantize_target
from domino_jax.runtime.weight_forms import WeightForm
from domino_jax.sharding import MODEL, RULES, fit_to_mesh
from domino_jax.weights import Params, build_module

# Of a layer's activations, those that may exist at a time, beside its scores. Compiled for v5e, a prompt's chunk takes
# 0.27 GB where the estimate is 0.30: a quarter of Qwen3-8B, 8,192 positions.
LIVE = 4
VOCABULARIES = 3  # of float32 logits a position in a cycle: the logits, the target's distribution and the drafter's


class Pair(NamedTuple):
    """What is to run."""

    target: TargetConfig
    draft: DecoderConfig | None
    ngram: bool  # n-gram drafting, alone or beside


def device_configs(pair: Pair, model: int) -> DecodeConfig:
    """What one of `model` devices runs: its part of the heads.

    Raises:
        DominoError: the model can't be divided so.
    """

    def part(config: Any) -> Any:
        fitted = fit_to_mesh(config, model)
        return dataclasses.replace(
            fitted,
            num_attention_heads=fitted.num_attention_heads // model,
            num_key_value_heads=fitted.num_key_value_heads // model,
        )

    draft = part(pair.draft) if pair.draft else None
    return DecodeConfig(part(pair.target), make_drafter(draft, ngram=pair.ngram))


def weight_bytes(
    pair: Pair, model: int, dtype: Any, weights: WeightForm = "exact", draft_weights: WeightForm = "exact"
) -> tuple[int, int]:
    """Bytes of one device's part of the target's and the drafter's weights, as `shard_stored` divides them.

    Args:
        model: devices that share them.
        weights, draft_weights: the form of the target's and the drafter's matrices.

    Raises:
        DominoError: the model can't be divided so.
    """

    def part(config: Any) -> Any:
        fitted = fit_to_mesh(config, model)
        sizes = {a: -(-n // model) if RULES.get(a) == MODEL else n for a, n in fitted.sizes.items()}
        return build_module(
            fitted, lambda letters: jax.ShapeDtypeStruct(tuple(sizes[a] for a in letters.split()), dtype)
        )

    params = Params(part(pair.target), part(pair.draft) if pair.draft else None)
    if weights != "exact":
        run = partial(quantize_target, config=pair.target, kind=weights)
        params = params._replace(target=jax.eval_shape(run, params.target))
    if draft_weights != "exact":
        if not isinstance(pair.draft, DraftConfig):
            raise DominoError("--draft-weights is for a drafter of the target's blocks: give one with --draft DIR.")
        params = jax.eval_shape(
            partial(quantize_drafter, config=fit_to_mesh(pair.draft, model), kind=draft_weights), params
        )
    return _bytes(params.target), _bytes((params.draft, params.output))


def state_bytes(configs: DecodeConfig, capacity: int, dtype: Any) -> int:
    """Bytes of the drafter's state of one row of so many positions; 0 without a drafter."""
    drafter = configs.drafter
    return 0 if drafter is None else _bytes(jax.eval_shape(lambda: drafter.init(1, capacity, dtype)))


def temporary_bytes(configs: DecodeConfig, model: int, rows: int, capacity: int, dtype: Any, paged: bool) -> float:
    """An estimate of what a device's programs need beside weights and caches: of a prompt's chunk, or of a cycle.

    The attention backend is xla, which forms all scores.

    Args:
        configs: of `device_configs`.
        model: devices that share the model.
        rows, capacity: of the caches on this device.
        paged: prompts are run one by one, and a layer's pages are gathered for its attention.
    """
    target, itemsize = configs.target, dtype.itemsize

    def layer(config: Any, tokens: int, rows: int) -> float:
        moe = getattr(config, "moe", None)
        mlp = 3 / model * (moe.num_experts_per_tok * moe.moe_intermediate_size if moe else config.intermediate_size)
        heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
        scores = config.num_attention_heads * capacity * (4 + itemsize)
        return rows * tokens * (LIVE * (2 * config.hidden_size + heads + mlp) * itemsize + scores)

    layers = configs.drafter.target_layer_ids if configs.drafter else ()
    features = len(layers) * target.hidden_size * itemsize
    tokens, together = configs.proposals + 1, 1 if paged else rows
    prompt = layer(target, LARGEST_CHUNK, together) + together * LARGEST_CHUNK * features
    logits = rows * tokens * VOCABULARIES * target.vocab_size / model * 4
    drafted = layer(configs.draft, tokens, rows) if configs.draft else 0
    cycle = max(layer(target, tokens, rows), drafted) + rows * tokens * features + logits
    gathered = 2 * 2 * target.num_key_value_heads * target.head_dim * capacity * itemsize  # as they lie, and in order
    return max(prompt + paged * gathered, cycle + paged * rows * gathered)


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
