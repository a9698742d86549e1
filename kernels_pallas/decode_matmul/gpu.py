"""A vector times a matrix, with all that stands around it: Pallas Triton.

A program reads `rows` rows of the matrix whole, all of them at once, so that
nothing but the chip's bandwidth bounds how fast they come; the vector, and its
norm, which every program makes anew, come from the cache meanwhile.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

_LANE_NUMBERS = 64  # 16-bit numbers of the matrix that a thread holds
_MOST_WARPS = 8


@dataclasses.dataclass(frozen=True)
class MatmulSizes:
  """Static choices of the kernel.

  Attributes:
    rows: of the matrix a program; 0: 4 of long matrices, 2 of short ones.
    warps: of a program; 0: as few as hold its rows in registers.
    piece: inputs that a program holds as one tile, a power of two; 0: 2048.
  """

  rows: int = 0
  warps: int = 0
  piece: int = 0

  def filled(self, outputs: int, parts: int, inputs: int) -> 'MatmulSizes':
    """With the defaults for a matrix [outputs parts inputs]."""
    rows = self.rows or (2 if outputs * parts <= 8192 else 4) // parts
    while outputs % rows:
      rows //= 2
    numbers = rows * parts * inputs // (32 * _LANE_NUMBERS)
    warps = self.warps or min(_MOST_WARPS, pl.next_power_of_2(max(1, numbers)))
    piece = min(self.piece or 2048, pl.next_power_of_2(inputs))
    return MatmulSizes(rows, warps, piece)


def matmul(
  x: Float[Array, 'D'],
  w: Float[Array, 'M D'],
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
  return _call(x, w[:, None], norm, eps, add, sizes, interpret)


def gated_matmul(
  x: Float[Array, 'D'],
  w: Float[Array, 'F 2 D'],
  *,
  norm: Float[Array, 'D'] | None = None,
  eps: float = 0.0,
  sizes: MatmulSizes | None = None,
  interpret: bool = False,
) -> Float[Array, 'F']:
  """silu(w[:, 0] @ y) * (w[:, 1] @ y) of y = RMSNorm(x), in one launch.

  SwiGLU (arXiv:2002.05202, equation 6). Arguments as of `matmul`.
  """
  return _call(x, w, norm, eps, None, sizes, interpret)


def _call(x, w, norm, eps, add, sizes, interpret):
  outputs, parts, inputs = w.shape
  sizes = (sizes or MatmulSizes()).filled(outputs, parts, inputs)
  if outputs % sizes.rows:
    raise ValueError(f'rows={sizes.rows} must divide {outputs} outputs')
  given = {'x': x, 'w': w, 'norm': norm, 'add': add}
  given = {k: v for k, v in given.items() if v is not None}

  def kernel(*refs):
    named = dict(zip(given, refs[:-1], strict=True))
    _kernel(refs[-1], named, eps, sizes)

  return pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((outputs,), x.dtype),
    grid=(outputs // sizes.rows,),
    compiler_params=plgpu.CompilerParams(num_warps=sizes.warps, num_stages=1),
    interpret=interpret,
    name='decode_matmul',
  )(*given.values())


def _kernel(out, refs, eps, sizes):
  x, w, norm, add = (refs.get(name) for name in ('x', 'w', 'norm', 'add'))
  (inputs,), parts = x.shape, w.shape[1]
  mine = pl.program_id(0) * sizes.rows + _iota((sizes.rows,), 0)
  # Index arrays: a slice may not reach behind the end, a masked index may.
  pieces = range(0, inputs, sizes.piece)

  def load(ref, shape, piece, *at):
    column = piece + _iota(shape, len(shape) - 1)
    if piece + sizes.piece <= inputs:
      return plgpu.load(ref.at[*at, column])
    return plgpu.load(ref.at[*at, column], mask=column < inputs, other=0)

  tile = (sizes.rows, sizes.piece)
  row = jnp.broadcast_to(mine[:, None], tile)
  matrix = [
    [load(w, tile, i, row, jnp.full(tile, j, jnp.int32)) for j in range(parts)]
    for i in pieces
  ]
  last = None if add is None else _wide(plgpu.load(add.at[mine]))

  def vector(ref):
    return [_wide(load(ref, (sizes.piece,), i)) for i in pieces]

  y = vector(x)
  if norm is not None:
    scale = vector(norm)
    squares = sum(part * part for part in y)
    inverse = lax.rsqrt(jnp.sum(squares) / inputs + eps)
    y = [
      _wide((part * inverse * by).astype(x.dtype)) for part, by in zip(y, scale)
    ]
  sums = [
    jnp.sum(
      sum(_wide(m[j]) * part[None] for m, part in zip(matrix, y)), axis=1
    ).astype(out.dtype)
    for j in range(parts)
  ]
  found = _wide(sums[0])
  if parts == 2:
    found *= jax.nn.sigmoid(found) * _wide(sums[1])
  if last is not None:
    found += last
  plgpu.store(out.at[mine], found.astype(out.dtype))


def _iota(shape, axis):
  return lax.broadcasted_iota(jnp.int32, shape, axis)


def _wide(x):
  return x.astype(jnp.float32)
