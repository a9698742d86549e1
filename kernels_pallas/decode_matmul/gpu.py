"""A vector times a matrix, with all that stands around it: Pallas Triton.

A program reads its rows of the matrix whole, all of them at once, so that
nothing but the chip's bandwidth bounds how fast they come; the vector, and its
norm, which every program makes anew, come from the cache meanwhile.

A matrix may be int8 codes with a scale an output (`Scaled`): half the bytes.
The vector is not quantised, which would save none.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int8

# Fewer inputs than this are few bytes a row: several rows a program then.
_FEW = 1024


class Scaled(NamedTuple):
  """A matrix of codes: row i is scale[i] * codes[i].

  Attributes:
    codes: int8 [*M D].
    scale: float32 [*M].
  """

  codes: Int8[Array, '*M D']
  scale: Float[Array, '*M']

  @property
  def shape(self) -> tuple[int, ...]:
    return self.codes.shape


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
    self, outputs: int, inputs: int, rows: int, warps: int, w: Any = None
  ) -> 'MatmulSizes':
    """With these in the places of zeros, rows so that they divide outputs.

    Twice the rows of codes, so that as many bytes are on their way.
    """
    rows = self.rows or rows * (2 if isinstance(w, Scaled) else 1)
    while outputs % rows:
      rows //= 2
    piece = min(self.piece or 2048, pl.next_power_of_2(inputs))
    return MatmulSizes(rows, self.warps or warps, piece)


def matmul(
  x: Float[Array, 'D'],
  w: Float[Array, 'M D'] | Scaled,
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
    w: the matrix, outputs first.
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
  best = (2, 1 if inputs <= 4 * _FEW else 2)
  if norm is not None:  # which all warps of a program share
    best = (4 if inputs <= _FEW else 2, 4)
  sizes = (sizes or MatmulSizes()).filled(outputs, inputs, *best, w)

  def kernel(x, w, norm, add, out):
    row = _rows(pl.program_id(0) * sizes.rows, sizes)
    added = None if add is None else _wide(plgpu.load(add.at[row]))
    (y,) = _products(x, w, norm, eps, [(row,)], sizes)
    plgpu.store(out.at[row], _plus(y, added).astype(out.dtype))

  given = (x, w, norm, add)
  grid = (outputs // sizes.rows,)
  return _call(kernel, (outputs,), given, grid, sizes, interpret)


def gated_matmul(
  x: Float[Array, 'D'],
  w: Float[Array, 'F 2 D'] | Scaled,
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
  sizes = (sizes or MatmulSizes()).filled(outputs, inputs, *best, w)

  def kernel(x, w, norm, out):
    row = _rows(pl.program_id(0) * sizes.rows, sizes)
    at = [(row, jnp.full_like(row, part)) for part in range(2)]
    gate, up = _products(x, w, norm, eps, at, sizes)
    found = gate * jax.nn.sigmoid(gate) * up
    plgpu.store(out.at[row], found.astype(out.dtype))

  grid = (outputs // sizes.rows,)
  return _call(kernel, (outputs,), (x, w, norm), grid, sizes, interpret)


def rotated_matmul(
  x: Float[Array, 'D'],
  w: Float[Array, 'K G+2 H D'] | Scaled,
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
  sizes = (sizes or MatmulSizes()).filled(half, inputs, *best, w)
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
    a, b = map(_plus, _products(x, w, norm, eps, at, sizes), added)
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


def _products(x, w, norm, eps, rows, sizes):
  """Products of RMSNorm(x) with rows of w, float32 of x's precision.

  Args:
    x: ref.
    w: ref, or refs of codes and scales.
    norm: ref or None.
    eps: of the norm.
    rows: indices into all but w's last axis, a tuple for each part.
    sizes: static choices.
  """
  (inputs,) = x.shape
  pieces = range(0, inputs, sizes.piece)

  def load(ref, shape, piece, *at):
    # Index arrays: a slice may not reach behind the end, a masked index may.
    column = piece + _iota(shape, len(shape) - 1)
    if piece + sizes.piece <= inputs:
      return plgpu.load(ref.at[*at, column])
    return plgpu.load(ref.at[*at, column], mask=column < inputs, other=0)

  tile = (sizes.rows, sizes.piece)
  spread = [[jnp.broadcast_to(i[:, None], tile) for i in at] for at in rows]
  codes, scales = w, None
  if isinstance(w, Scaled):
    codes, scale = jax.tree.leaves(w)
    scales = [plgpu.load(scale.at[*at]) for at in rows]
  matrix = [
    [load(codes, tile, piece, *at) for at in spread] for piece in pieces
  ]

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
  found = [
    jnp.sum(
      sum(_wide(tiles[j]) * part[None] for tiles, part in zip(matrix, y)),
      axis=1,
    )
    for j in range(len(rows))
  ]
  if scales is not None:
    found = [part * scale for part, scale in zip(found, scales)]
  return [_wide(part.astype(x.dtype)) for part in found]


def _rows(first, sizes):
  return first + _iota((sizes.rows,), 0)


def _plus(y, added):
  return y if added is None else y + added


def _iota(shape, axis):
  return lax.broadcasted_iota(jnp.int32, shape, axis)


def _wide(x):
  return x.astype(jnp.float32)
