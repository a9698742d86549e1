"""A vector times a matrix, with all that stands around it: Pallas Triton.

A program reads its rows of the matrix whole, all of them at once, so that
nothing but the chip's bandwidth bounds how fast they come; the vector, and its
norm, which every program makes anew, come from the cache meanwhile. Of a matrix
of 8 bits every program makes the vector's codes anew, too.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int8

# Fewer inputs than this are few bytes a row: several rows a program then.
_FEW = 1024
# What int8's largest code stands for: half a step more than it (qwix).
_BOUND = 127.5
# Of codes: 16 are one load, and each thread of 4 warps has 4 of a row.
CODES_STEP, LEAST_CODES = 16, 512
# A float32 of this size has no bits behind the point.
_WHOLE, _WHOLE_BITS = 1.5 * 2**23, 0x4B400000


class Codes(NamedTuple):
  """A matrix of 8 bits, whose products quantise the token, too (w8a8).

  Attributes:
    codes: int8.
    scale: float32, what a code of a row stands for.
  """

  codes: Int8[Array, '*M D']
  scale: Float[Array, '*M 1']

  @property
  def shape(self) -> tuple[int, ...]:
    return self.codes.shape

  @property
  def dtype(self) -> jnp.dtype:
    return self.codes.dtype


@dataclasses.dataclass(frozen=True)
class MatmulSizes:
  """Static choices of the kernel.

  Attributes:
    rows: outputs of a program, of what has two parts pairs; 0: as was best.
    warps: of a program; 0: as was best.
    piece: inputs that a program holds as one tile, a power of two; 0: 2048.
  """

  rows: int = 0
  warps: int = 0
  piece: int = 0

  def filled(
    self, outputs: int, inputs: int, rows: int, warps: int, itemsize: int = 2
  ) -> 'MatmulSizes':
    """With these in the places of zeros, rows so that they divide outputs.

    Args:
      outputs: of all programs.
      inputs: of a row.
      rows: of 16-bit numbers, as was best; as many bytes of smaller ones.
      warps: as was best.
      itemsize: bytes of a number of the matrix.
    """
    rows = self.rows or max(1, 2 * rows // itemsize)
    while outputs % rows:
      rows //= 2
    piece = min(self.piece or 2048, pl.next_power_of_2(inputs))
    return MatmulSizes(rows, self.warps or warps, piece)


def matmul(
  x: Float[Array, 'D'],
  w: Float[Array, 'M D'] | Codes,
  *,
  norm: Float[Array, 'D'] | None = None,
  eps: float = 0.0,
  add: Float[Array, 'M'] | None = None,
  sizes: MatmulSizes | None = None,
  interpret: bool = False,
) -> Float[Array, 'M']:
  """W @ RMSNorm(x) + add, in one launch; forward only.

  Args:
    x: one token's numbers.
    w: the matrix, outputs first; of `Codes` the product is that of x's own
      codes, of 8 bits and one scale, which every program makes anew.
    norm: scale of the RMSNorm of x (arXiv:1910.07467); None: x as it is.
    eps: of the norm.
    add: a bias or a residual; None: nothing.
    sizes: static choices; None: the defaults.
    interpret: runs without a GPU.

  Returns:
    In x's dtype. Sums are float32; norm, product and sum are rounded each, as
    they are where they are launches of their own.
  """
  outputs, inputs = w.shape
  warps = 4 if isinstance(w, Codes) else 2  # which hold x, too, not w alone
  best = (2, 1 if inputs <= 4 * _FEW else warps)
  if norm is not None:  # which all warps of a program share
    best = (4 if inputs <= _FEW else 2, 4)
  sizes = (sizes or MatmulSizes()).filled(
    outputs, inputs, *best, w.dtype.itemsize
  )

  def kernel(x, w, norm, add, out):
    row = _rows(pl.program_id(0) * sizes.rows, sizes)
    added = None if add is None else _wide(plgpu.load(add.at[row]))
    (y,) = _products(x, w, norm, eps, [(row,)], sizes, interpret)
    plgpu.store(out.at[row], _plus(y, added).astype(out.dtype))

  given = (x, w, norm, add)
  grid = (outputs // sizes.rows,)
  return _call(kernel, (outputs,), given, grid, sizes, interpret)


def gated_matmul(
  x: Float[Array, 'D'],
  w: Float[Array, 'F 2 D'] | Codes,
  *,
  norm: Float[Array, 'D'] | None = None,
  eps: float = 0.0,
  sizes: MatmulSizes | None = None,
  interpret: bool = False,
) -> Float[Array, 'F']:
  """silu(w[:, 0] @ y) * (w[:, 1] @ y) of y = RMSNorm(x), in one launch.

  SwiGLU (arXiv:2002.05202, equation 6). Arguments as of `matmul`.
  """
  outputs, _, inputs = w.shape
  best = (2, 1) if inputs <= _FEW else (1, 1 if norm is None else 4)
  sizes = (sizes or MatmulSizes()).filled(
    outputs, inputs, *best, w.dtype.itemsize
  )

  def kernel(x, w, norm, out):
    row = _rows(pl.program_id(0) * sizes.rows, sizes)
    at = [(row, jnp.full_like(row, part)) for part in range(2)]
    gate, up = _products(x, w, norm, eps, at, sizes, interpret)
    found = gate * jax.nn.sigmoid(gate) * up
    plgpu.store(out.at[row], found.astype(out.dtype))

  grid = (outputs // sizes.rows,)
  return _call(kernel, (outputs,), (x, w, norm), grid, sizes, interpret)


def rotated_matmul(
  x: Float[Array, 'D'],
  w: Float[Array, 'K G+2 H D'] | Codes,
  turn: Float[Array, '2 H/2'],
  *,
  norm: Float[Array, 'D'],
  eps: float = 0.0,
  add: Float[Array, 'K G+2 H'] | None = None,
  sizes: MatmulSizes | None = None,
  interpret: bool = False,
) -> Float[Array, 'N+2K H']:
  """Queries and keys, rotated, and values of RMSNorm(x), in one launch.

  Args:
    x: one token's numbers.
    w: kv head by kv head its queries, its key, its value.
    turn: float32 cosines and sines of the token's position
      (arXiv:2104.09864); channel i turns with channel i + H/2.
    norm: as of `matmul`.
    eps: of the norm.
    add: a bias, before the rotation; None: nothing.
    sizes: as of `matmul`; a program has `rows` pairs of channels.
    interpret: runs without a GPU.

  Returns:
    All queries, then all keys, then all values.
  """
  kv_heads, width, head_dim, inputs = w.shape
  group, half = width - 2, head_dim // 2
  best = (2 if inputs <= _FEW else 1, 4)
  sizes = (sizes or MatmulSizes()).filled(half, inputs, *best, w.dtype.itemsize)
  blocks = half // sizes.rows

  def kernel(x, w, norm, add, turn, out):
    head = pl.program_id(0) // blocks
    kv, place = head // width, head % width
    row = _rows(pl.program_id(0) % blocks * sizes.rows, sizes)

    def like_row(n):
      return jnp.full_like(row, n)

    at = [(like_row(kv), like_row(place), row + j * half) for j in range(2)]
    added = [None if add is None else _wide(plgpu.load(add.at[i])) for i in at]
    cos, sin = (plgpu.load(turn.at[like_row(j), row]) for j in range(2))
    a, b = map(_plus, _products(x, w, norm, eps, at, sizes, interpret), added)
    a, b = (_wide(y.astype(out.dtype)) for y in (a, b))
    turns = place <= group
    found = (
      jnp.where(turns, a * cos - b * sin, a),
      jnp.where(turns, b * cos + a * sin, b),
    )
    after = kv_heads * place + kv  # keys behind N = K G queries, then values
    target = jnp.where(place < group, kv * group + place, after)
    for j, y in enumerate(found):
      at_out = out.at[like_row(target), row + j * half]
      plgpu.store(at_out, y.astype(out.dtype))

  return _call(
    kernel,
    (kv_heads * width, head_dim),
    (x, w, norm, add, turn),
    (kv_heads * width * blocks,),
    sizes,
    interpret,
  )


def _call(kernel, shape, given, grid, sizes, interpret):
  """A call of kernel(*given, out), in which None stays None."""
  arrays, tree = jax.tree.flatten(given)

  def run(*refs):
    kernel(*tree.unflatten(refs[:-1]), refs[-1])

  return pl.pallas_call(
    run,
    out_shape=jax.ShapeDtypeStruct(shape, given[0].dtype),
    grid=grid,
    compiler_params=plgpu.CompilerParams(num_warps=sizes.warps, num_stages=1),
    interpret=interpret,
    name='decode_matmul',
  )(*arrays)


def _products(x, w, norm, eps, rows, sizes, interpret):
  """Products of RMSNorm(x) with rows of w, float32 of x's precision.

  Args:
    x: ref.
    w: ref, or `Codes` of refs.
    norm: ref or None.
    eps: of the norm.
    rows: indices into all but w's last axis, a tuple for each part.
    sizes: static choices.
    interpret: takes nothing that has no meaning without a GPU.
  """
  (inputs,) = x.shape
  pieces = range(0, inputs, sizes.piece)

  def load(ref, shape, piece, *at):
    # Index arrays: a slice may not reach behind the end, a masked index may.
    column = piece + _iota(shape, len(shape) - 1)
    if piece + sizes.piece <= inputs:
      return plgpu.load(ref.at[*at, column])
    return plgpu.load(ref.at[*at, column], mask=column < inputs, other=0)

  codes, steps = w if isinstance(w, Codes) else (w, None)
  tile = (sizes.rows, sizes.piece)
  spread = [[jnp.broadcast_to(i[:, None], tile) for i in at] for at in rows]
  matrix = [
    [load(codes, tile, piece, *at) for at in spread] for piece in pieces
  ]
  steps = None if steps is None else _steps(steps, rows)

  def vector(ref):
    return [_wide(load(ref, (sizes.piece,), piece)) for piece in pieces]

  y = vector(x)
  if norm is not None:
    scale = vector(norm)
    squares = sum(part * part for part in y)
    inverse = lax.rsqrt(jnp.sum(squares) / inputs + eps)
    y = [
      _wide((part * inverse * by).astype(x.dtype)) for part, by in zip(y, scale)
    ]
  multiply, unit = _wide_products, None
  if steps is not None:
    if not interpret and (inputs < LEAST_CODES or inputs % CODES_STEP):
      raise ValueError(
        f'{inputs=} of codes must be at least {LEAST_CODES} and a multiple of '
        f'{CODES_STEP}'
      )
    y, unit = _quantised(y, x.dtype)
    multiply = _code_products if interpret else _sums_of_four
  found = [
    jnp.sum(
      sum(multiply(tiles[j], part[None]) for tiles, part in zip(matrix, y)),
      axis=1,
    )
    for j in range(len(rows))
  ]
  if steps is not None:
    found = [_wide(part) * unit * by for part, by in zip(found, steps)]
  return [_wide(part.astype(x.dtype)) for part in found]


def _steps(ref, rows):
  return [plgpu.load(ref.at[*at, jnp.zeros_like(at[0])]) for at in rows]


def _quantised(y, dtype):
  """Pieces of a token as int8, and what a code stands for.

  As `qwix.quantize` makes them of an array of this dtype, whose scale is of it,
  but that there a quotient is rounded to the dtype before it is to a whole
  number: some codes of bfloat16 differ by one, ours being nearer. All programs
  do this: instructions count. Integers compare in one, floats in two, for NaN;
  positive floats stand in their bits' order.
  """
  top = functools.reduce(jnp.maximum, (_bits(jnp.abs(part)) for part in y))
  top = lax.bitcast_convert_type(jnp.max(top), jnp.float32)
  unit = _wide((top / _BOUND).astype(dtype))
  unit = jnp.where(unit < float(jnp.finfo(dtype).tiny) ** 0.5, 1.0, unit)
  inverse = 1 / unit

  def code(part):
    # The last bits are the next whole number's, of halves the even one's. The
    # lowest code, -128, has no counterpart.
    bits = _bits(part * inverse + _WHOLE)
    return jnp.minimum(bits, _WHOLE_BITS + 127).astype(jnp.int8)

  return [code(part) for part in y], unit


def _wide_products(tile, y):
  return _wide(tile) * y


def _code_products(tile, y):
  return tile.astype(jnp.int32) * y.astype(jnp.int32)


def _sums_of_four(tile, y):
  """Of four products their sum, and three zeros, in one instruction.

  The four are a thread's registers, neighbours in a row where a thread loads
  four of a row at once: `serves` sees to that.
  """
  asm = 'dp4a.s32.s32 $0, $4, $5, 0; ' + ' '.join(
    f'mov.b32 ${i}, 0;' for i in (1, 2, 3)
  )
  (found,) = plgpu.elementwise_inline_asm(
    asm,
    args=[tile, jnp.broadcast_to(y, tile.shape)],
    # Early: the zeros are written before the operands are read.
    constraints='=&r,=&r,=&r,=&r,r,r',
    pack=4,
    result_shape_dtypes=[jax.ShapeDtypeStruct(tile.shape, jnp.int32)],
  )
  return found


def _rows(first, sizes):
  return first + _iota((sizes.rows,), 0)


def _plus(y, added):
  return y if added is None else y + added


def _iota(shape, axis):
  return lax.broadcasted_iota(jnp.int32, shape, axis)


def _wide(x):
  return x.astype(jnp.float32)


def _bits(x):
  return lax.bitcast_convert_type(x, jnp.int32)
