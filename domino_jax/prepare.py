"""Weights made ready for decoding: in the form that a CPU or TPU multiplies fastest, and the drafter in 8 bits.

None of it changes the output: the products are the same sums, up to float32's rounding, and an 8-bit drafter only
proposes other tokens (docs/algorithm.md, section 8).
"""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import Array

from domino_jax import matrix
from domino_jax.config import DecoderConfig, DraftConfig
from domino_jax.drafters.heads import head_of
from domino_jax.drafters.heads.base import under
from domino_jax.matrix import ForTpu, Scaled, Tabulated
from domino_jax.sharding import constrain
from domino_jax.weights import Params, axes, flatten, is_matrix, lm_head

LARGEST_TABLE = 32 << 20  # bytes


def prepare_for_cpu(module: Any, config: DecoderConfig) -> None:
    """Make a Target or Draft ready for a float32 run on a CPU: its matrices take the form of `matrix.for_cpu`.

    Matrices in bfloat16 stay so, all else becomes float32. Products are float32's either way. Processors that multiply
    bfloat16 matrices (Intel's AMX) have them sooner, from half the memory; elsewhere they are slow. Experts, their
    router and the head become plain float32 arrays: experts are selected one by one, and the head's products are
    too small to gain.

    One weight at most is held twice.
    """
    for path, letters in flatten(axes(config)).items():
        *parents, name = path.split(".")
        owner = module
        for parent in parents:
            owner = owner[int(parent)] if parent.isdigit() else getattr(owner, parent)
        weight = getattr(owner, name)
        plain = not is_matrix(path, letters) or "E" in letters.split() or name == "router" or "head" in parents
        if plain:
            prepared = weight.astype("float32")
        elif letters.startswith("2 "):
            prepared = matrix.Separate(tuple(map(matrix.for_cpu, _unstacked(weight, letters.removeprefix("2 ")))))
        else:
            prepared = matrix.for_cpu(weight)
        setattr(owner, name, nnx.data(jax.block_until_ready(prepared)))


def prepare_for_tpu(params: Params, target: DecoderConfig, draft: DecoderConfig | None, groups: int = 1) -> Params:
    """The params with matrices that a TPU multiplies fastest with one row: `matrix.ForTpu`. Nothing is computed.

    Experts and their router stay plain arrays, and so does what is a table.

    Args:
        groups: of devices that have rows of their own: the mesh's `data`.
    """

    def wrapped(module: Any, config: DecoderConfig) -> Any:
        letters = flatten(axes(config))
        plain = {path for path, names in letters.items() if not is_matrix(path, names) or "E" in names.split()}
        plain |= {path for path in letters if path.rpartition(".")[2] == "router"}

        def one(path: Any, leaf: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return leaf if name in plain or isinstance(leaf, Tabulated) else ForTpu(leaf, groups)

        return jax.tree_util.tree_map_with_path(one, module, is_leaf=lambda leaf: isinstance(leaf, matrix.Matrix))

    output = None if params.output is None else ForTpu(params.output, groups)
    drafter = params.draft if draft is None else wrapped(params.draft, draft)
    return Params(wrapped(params.target, target), drafter, output)


@partial(jax.jit, static_argnums=1)
def _unstacked(weight: Array, letters: str) -> tuple[Array, ...]:
    """The arrays of a stack, each laid out by its axis letters."""
    return tuple(constrain(part, letters) for part in weight)


def tabulate_head(params: Params, config: DecoderConfig | None, largest: int = LARGEST_TABLE) -> None:
    """Let the drafter's head look up what a token gives it, where the vocabulary is small; see `Head.tabulate`.

    Args:
        config: the drafter's.
        largest: bytes that the table may take. At a vocabulary of 151,936 it would be a gigabyte.
    """
    if isinstance(config, DraftConfig):
        head_of(config).tabulate(params.draft.head, params.target.embed, largest)


def quantize_drafter(params: Params, config: DraftConfig, kind: str) -> Params:
    """The params with the drafter's matrices in 8 bits, and an 8-bit copy of the LM head for drafting.

    Args:
        kind: one of `matrix.QUANTIZED`.
    """
    assert params.draft is not None, "there is no drafter to quantize"
    letters = flatten(axes(config))
    leaves, form = jax.tree.flatten(params.draft)
    named = zip(flatten(params.draft), leaves, strict=True)
    whole = under("head", head_of(config).unquantized)

    def stays(path: str) -> bool:
        return path in whole or not is_matrix(path, letters[path])

    done = [leaf if stays(path) else _quantized(leaf, letters[path], kind) for path, leaf in named]
    return Params(params.target, jax.tree.unflatten(form, done), _quantized(lm_head(params.target), "V D", kind))


@partial(jax.jit, static_argnums=(1, 2))
def _quantized(weight: matrix.AnyMatrix, letters: str, kind: str) -> Scaled:
    """`matrix.quantize`, laid out by the weight's axis letters."""
    small = matrix.quantize(weight, kind)
    return Scaled(constrain(small.values, letters), constrain(small.scale, letters.rsplit(" ", 1)[0]))
