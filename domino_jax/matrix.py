"""A matrix, whatever form it has in memory: the one file that knows the forms.

Every weight that is multiplied is [out..., in], Hugging Face's own order. A plain array is a matrix. The other forms
are small pytree classes with the same operations:

    Scaled      8-bit values and a scale for each output
    CpuFloat32  float32 on a CPU, multiplied as the left factor
    CpuBfloat16 bfloat16 in a float32 run on a CPU, multiplied exactly in three pieces
    CpuInt8     `Scaled` in int8 in a float32 run on a CPU, multiplied as integers
    ForTpu      any of those that a TPU has, whose product with one row is one with several
    Separate    a stack of matrices of one input, held one by one
    Beside      the outputs of several matrices of one input
    Tabulated   products with every row of a vocabulary's matrix, made in advance

The rest of the project calls `dot`, `dot_each`, `take`, `dot_rows`, `dot_grouped`, `select` and `beside`, and does not
ask which form it has.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

TPU_ROWS = 2  # enough for the matrix unit; partial sums cross between devices with all of them
FEW_PIECES = 192  # rows of pieces, three for each of x: up to here they are the right factor of a product
PIECE_STEPS = 254  # of an 8-bit piece in one of the piece before


class Matrix:
    """A matrix that is no plain array. A subclass defines the operations that it supports."""

    values: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """[out..., in]."""
        return self.values.shape

    def dot(self, x: Array, out_dtype: Any = None) -> Array:
        """x [..., in] -> [..., out...]."""
        raise NotImplementedError

    def take(self, ids: Array) -> Array:
        """Rows ids [...] of a matrix [V, in]: [..., in]."""
        raise NotImplementedError

    def dot_grouped(self, x: Array, sizes: Array) -> Array:
        """See the function."""
        raise NotImplementedError(f"{type(self).__name__} has no grouped product")

    def select(self, index: Array | int) -> Any:
        """The matrix at `index` of a stack of them [E, out..., in]."""
        return jax.tree.map(lambda part: part[index], self)


AnyMatrix = Array | Matrix


def dot(x: Array, matrix: AnyMatrix, out_dtype: Any = None) -> Array:
    """x [..., in] times a matrix [out..., in]: [..., out...].

    Args:
        out_dtype: of the sums and the result; x's when None.
    """
    if isinstance(matrix, Matrix):
        return matrix.dot(x, out_dtype)
    return _contract(x, matrix, out_dtype)


def dot_each(x: Array, matrix: AnyMatrix) -> tuple[Array, ...]:
    """x [..., in] times each matrix of a stack [n, out..., in]: n arrays [..., out...]."""
    if isinstance(matrix, Separate):
        return tuple(dot(x, part) for part in matrix.parts)
    return tuple(jnp.moveaxis(dot(x, matrix), x.ndim - 1, 0))


def take(matrix: AnyMatrix, ids: Array) -> Array:
    """Rows of a vocabulary's matrix [V, in] at ids [...]: [..., in], in the dtype that is computed in."""
    return matrix.take(ids) if isinstance(matrix, Matrix) else matrix[ids]


def dot_rows(vocabulary: AnyMatrix, ids: Array, matrix: AnyMatrix) -> Array:
    """The product of a vocabulary's rows at ids [...] with a matrix [out, in]: [..., out]."""
    return matrix.table[ids] if isinstance(matrix, Tabulated) else dot(take(vocabulary, ids), matrix)


def dot_grouped(x: Array, matrix: AnyMatrix, sizes: Array) -> Array:
    """Rows in groups, each times a matrix of its own.

    Args:
        x: [T, in], the rows of the first group first.
        matrix: [E, out..., in].
        sizes: [E] int32, rows of each group. Rows behind the last group get zeros or anything.

    Returns:
        [T, out...].
    """
    if isinstance(matrix, Matrix):
        return matrix.dot_grouped(x, sizes)
    # The values may be of 8 bits: a TPU's kernel takes them as they are. Converted before, they would all be written.
    flat = matrix.reshape(matrix.shape[0], -1, matrix.shape[-1])
    numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
    out = jax.lax.ragged_dot_general(x, flat, sizes, numbers, preferred_element_type=x.dtype)
    return out.reshape(x.shape[0], *matrix.shape[1:-1])


def select(matrix: AnyMatrix, index: Array | int) -> AnyMatrix:
    """The matrix [out..., in] at `index` of a stack [E, out..., in]."""
    return matrix.select(index) if isinstance(matrix, Matrix) else matrix[index]


def beside(*matrices: AnyMatrix) -> AnyMatrix:
    """Matrices [out, in] of one input as one of all their outputs; arrays are copied into one."""
    arrays = [matrix for matrix in matrices if isinstance(matrix, Array)]
    return jnp.concatenate(arrays) if len(arrays) == len(matrices) else Beside(matrices)


def dequantize(matrix: AnyMatrix) -> Array:
    """A plain array or `Scaled` [out..., in] as a plain array; of `Scaled` in float32, codes times scales."""
    if not isinstance(matrix, Scaled):
        assert not isinstance(matrix, Matrix)
        return matrix
    return matrix.values.astype(jnp.float32) * matrix.scale.astype(jnp.float32)[..., None]


def letters_of_parts(matrix: AnyMatrix, letters: str) -> Any:
    """The axis letters of each array of a plain array or of `Scaled`, by those of the matrix: in the same tree."""
    return Scaled(letters, letters.rsplit(" ", 1)[0]) if isinstance(matrix, Scaled) else letters  # type: ignore[arg-type]


def operands(matrix: AnyMatrix) -> list[Array]:
    """The arrays that a product reads whole: of a table none."""
    return [] if isinstance(matrix, Tabulated) else jax.tree.leaves(matrix)


def _contract(x: Array, values: Array, out_dtype: Any = None) -> Array:
    """The last axis of x with the last of `values`."""
    numbers = (((x.ndim - 1,), (values.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(x, values, numbers, preferred_element_type=out_dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(Matrix):
    """8-bit values times a scale for each output, applied after the product."""

    values: Array  # [out..., in], int8 or float8
    scale: Array  # [out...]

    def dot(self, x: Array, out_dtype: Any = None) -> Array:
        out = _contract(x, self.values.astype(x.dtype), out_dtype)
        return out * self.scale.astype(out.dtype)

    def take(self, ids: Array) -> Array:
        return self.values[ids].astype(self.scale.dtype) * self.scale[ids][..., None]

    def dot_grouped(self, x: Array, sizes: Array) -> Array:
        out = dot_grouped(x, self.values, sizes)
        group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
        return out * self.scale[jnp.minimum(group, sizes.shape[0] - 1)].astype(out.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Separate(Matrix):
    """A stack of matrices of one input, held one by one; only `dot_each` can use it.

    On a CPU one row's product with K and V (or gate and up) in one took a tenth of a whole step longer: the barriers
    of `CpuFloat32` let nothing after the product take its parts from where they are. On a TPU there is room in the
    vector memory to read the half of a large stack ahead, where there is none for all of it.
    """

    parts: tuple[AnyMatrix, ...]  # each [out..., in]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beside(Matrix):
    """Matrices of one input, held one by one; made in a program, by `beside`."""

    parts: tuple[AnyMatrix, ...]  # each [out, in]

    def dot(self, x: Array, out_dtype: Any = None) -> Array:
        return jnp.concatenate([dot(x, part, out_dtype) for part in self.parts], axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForTpu(Matrix):
    """A matrix on a TPU: its product with one row is computed as one with TPU_ROWS, of which the others are zeros.

    With one row libtpu's compiler leaves the matrix unit for the vector unit, and estimates several times as many
    cycles (docs/performance.md).
    """

    values: AnyMatrix  # type: ignore[assignment]  # [out..., in], a plain array or Scaled
    groups: int = dataclasses.field(default=1, metadata={"static": True})
    """of devices that have rows of their own"""

    def dot(self, x: Array, out_dtype: Any = None) -> Array:
        if x.size > x.shape[-1] * self.groups:
            return dot(x, self.values, out_dtype)
        rows = jnp.pad(x[..., None, :], [(0, 0)] * (x.ndim - 1) + [(0, TPU_ROWS - 1), (0, 0)])
        out = dot(rows, self.values, out_dtype)
        return jax.lax.index_in_dim(out, 0, x.ndim - 1, keepdims=False)

    def take(self, ids: Array) -> Array:
        return take(self.values, ids)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tabulated(Matrix):
    """A matrix [out, in] as its products with every row of a vocabulary's matrix; only `dot_rows` can use it."""

    table: Array  # [V, out]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CpuFloat32(Matrix):
    """Float32 on a CPU, computed as values · xᵀ.

    A CPU's kernels first put the right factor of a product in an order of their own. Here that is the few rows of x,
    and not the matrix; the barriers keep XLA from turning it round.
    """

    values: Array  # [out..., in] float32

    def dot(self, x: Array, out_dtype: Any = None) -> Array:
        matrix, columns = self.values.reshape(-1, self.values.shape[-1]), x.reshape(-1, x.shape[-1]).T
        out = jax.lax.optimization_barrier(matrix @ jax.lax.optimization_barrier(columns))
        return out.T.reshape(*x.shape[:-1], *self.values.shape[:-1])

    def take(self, ids: Array) -> Array:
        return self.values[ids]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CpuBfloat16(Matrix):
    """Bfloat16 values in a float32 run on a CPU: half the memory, and products as a float32 product of both would be.

    A float32 is the sum of three bfloat16 numbers (3 · 8 bits of mantissa), and a product of two bfloat16 numbers is a
    float32: so three products on a processor's bfloat16 units, summed in float32, lose nothing but what any float32
    sum rounds. (Henry, Tang & Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For
    Higher-Precision Computations"; of their nine products six are zero, since the values have one piece.)

    Few rows are the right factor, as in `CpuFloat32`: with the matrix there, XLA would hold a transposed copy of it
    through every loop of decoding, made anew for each. The kernels for many rows want it there.
    """

    values: Array  # [out..., in] bfloat16

    def dot(self, x: Array, out_dtype: Any = None) -> Array:
        matrix, parts = self.values.reshape(-1, self.values.shape[-1]), pieces(x)
        parts = parts.reshape(-1, parts.shape[-1])
        if parts.shape[0] <= FEW_PIECES:
            columns = jax.lax.optimization_barrier(parts)
            sums = jnp.einsum("FD,RD->FR", matrix, columns, preferred_element_type=jnp.float32)
            sums = jax.lax.optimization_barrier(sums).T
        else:
            sums = jnp.einsum("RD,FD->RF", parts, matrix, preferred_element_type=jnp.float32)
        sums = sums.reshape(*x.shape[:-1], 3, -1)
        return (sums[..., 2, :] + sums[..., 1, :] + sums[..., 0, :]).reshape(*x.shape[:-1], *self.values.shape[:-1])

    def take(self, ids: Array) -> Array:
        # By its bits: a CPU's gather of bfloat16 would first convert the whole matrix.
        return _widened(jax.lax.bitcast_convert_type(self.values, jnp.uint16)[ids])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CpuInt8(Scaled):
    """Int8 in a float32 run on a CPU, multiplied as integers: nothing is widened but x, in three 8-bit pieces.

    A CPU's program would write the whole matrix as float32 at every call, which takes ten times as long as to multiply
    it. Sums of products of integers are exact in int32 (up to 133,000 of them): what is rounded is x, to 2^-24 of the
    largest of its row, and the result has the same bits at any number of rows. Few rows are the right factor, as in
    `CpuBfloat16`.
    """

    def dot(self, x: Array, out_dtype: Any = None) -> Array:
        parts, step = fixed_point(x.astype(jnp.float32))
        rows = parts.reshape(-1, parts.shape[-1])
        if rows.shape[0] <= FEW_PIECES:
            sums = jnp.moveaxis(jax.lax.optimization_barrier(_contract(self.values, rows, jnp.int32)), -1, 0)
        else:
            sums = _contract(rows, self.values, jnp.int32)
        sums = sums.astype(jnp.float32).reshape(*parts.shape[:-1], *self.values.shape[:-1])
        first, second, third = (jax.lax.index_in_dim(sums, n, x.ndim - 1, keepdims=False) for n in range(3))
        whole = first + (second + third / PIECE_STEPS) / PIECE_STEPS
        step = step.reshape(*x.shape[:-1], *(1 for _ in self.scale.shape))
        return (whole * step * self.scale).astype(out_dtype or x.dtype)


def fixed_point(x: Array) -> tuple[Array, Array]:
    """x [..., D] float32 as three 8-bit integers for each number [..., 3, D], and the step of the first [..., 1].

    x is step · (first + (second + third / 254) / 254), to 2^-24 of the largest of its row.
    """
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    step = jnp.where(largest == 0, 1.0, largest / jnp.iinfo(jnp.int8).max)  # what is not a number stays so
    rest, parts = x / step, []
    for _ in range(3):
        parts.append(jnp.round(rest)[..., None, :])
        rest = (rest - jnp.round(rest)) * PIECE_STEPS
    # By a choice for each element, see `pieces`.
    number = jax.lax.broadcasted_iota(jnp.uint32, (*x.shape[:-1], 3, x.shape[-1]), x.ndim - 1)
    chosen = jnp.where(number == 0, parts[0], jnp.where(number == 1, parts[1], parts[2]))
    return jax.lax.optimization_barrier(chosen.astype(jnp.int8)), step


def pieces(x: Array) -> Array:
    """x [..., D] float32 as three bfloat16 numbers whose sum it is, bit for bit (below 1e-33 nearly): [..., 3, D].

    An infinity is its first piece, and the others are zero: infinity less infinity would make the sum NaN.

    By its bits, since compilers take away a conversion to bfloat16 and back; and by a choice for each element, which a
    CPU's kernels have sooner than a concatenation.
    """
    rest = jnp.where(jnp.isinf(x), 0.0, x - _widened(_upper(x)))
    last = rest - _widened(_upper(rest))
    whole, rest, last = (part[..., None, :] for part in (x, rest, last))
    number = jax.lax.broadcasted_iota(jnp.uint32, (*x.shape[:-1], 3, x.shape[-1]), x.ndim - 1)
    chosen = jnp.where(number == 0, whole, jnp.where(number == 1, rest, last))
    return jax.lax.bitcast_convert_type(_upper(chosen), jnp.bfloat16)


def _upper(x: Array) -> Array:
    """The upper half of each float32: the bits of a bfloat16, as uint16."""
    return (jax.lax.bitcast_convert_type(x, jnp.uint32) >> 16).astype(jnp.uint16)


def _widened(upper: Array) -> Array:
    """The float32 whose upper half this is."""
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint32) << 16, jnp.float32)


QUANTIZED = {"int8": jnp.int8, "float8": jnp.float8_e4m3fn}


def quantize(matrix: AnyMatrix, kind: str) -> Scaled:
    """The matrix in 8 bits: the largest value of each output lies at the end of the range.

    Args:
        matrix: [out..., in], a plain array or a CPU's form.
        kind: one of QUANTIZED.
    """
    dtype = QUANTIZED[kind]
    whole = jnp.issubdtype(dtype, jnp.integer)
    most = float(jnp.iinfo(dtype).max if whole else jnp.finfo(dtype).max)
    if isinstance(matrix, Matrix):
        weight, out_dtype = matrix.values, jnp.float32  # the CPU's forms belong to float32 runs
    else:
        weight, out_dtype = matrix, matrix.dtype
    w = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(w), axis=-1, keepdims=True)
    # Any scale is right for an all-zero output. NaN goes into the scale, for integers have none. A subnormal scale
    # would be flushed to zero, and divided by.
    scale = jnp.where(largest == 0, 1.0, jnp.maximum(largest / most, jnp.finfo(jnp.float32).tiny)).astype(out_dtype)
    # Divided by the scale as it is kept; where that was rounded down, the largest value would lie beyond the end.
    values = jnp.clip(w / scale.astype(jnp.float32), -most, most)
    values = (jnp.round(values) if whole else values).astype(dtype)
    return Scaled(values, jnp.squeeze(scale, -1))


def for_cpu(weight: Array | Scaled) -> Matrix:
    """How a float32 run on a CPU holds a matrix [out..., in]: bfloat16 and 8 bits stay, all else becomes float32."""
    if isinstance(weight, Scaled):
        return CpuInt8(weight.values, weight.scale) if weight.values.dtype == jnp.int8 else weight
    return CpuBfloat16(weight) if weight.dtype == jnp.bfloat16 else CpuFloat32(weight.astype(jnp.float32))


def tabulate(vocabulary: AnyMatrix, matrix: Array) -> Tabulated:
    """A matrix [out, in] as a table of its products with the rows of a vocabulary's matrix [V, in]."""
    return Tabulated(dot(take(vocabulary, jnp.arange(vocabulary.shape[0])), matrix))
