"""How much each block of keys weighs for a row: log-sum-exp of its scores.

  lse[b, k, g, r, J] = log2 of the sum over the cells c of block J with
                       c <= last[b, r] of 2^(factor[b, r] rows[b, k, g, r]
                       . cells[b, k, c])

XAttention's rows and cells (arXiv:2503.16428, Algorithm 1) are s tokens each,
so one launch costs 2 M C F FLOPs and returns C / per_block numbers a row: the
scores themselves are never stored.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from kernels_pallas import dispatch

__all__ = ['block_lse', 'granule']


def block_lse(
  rows: Float[Array, 'B K G R F'],
  cells: Float[Array, 'B K C F'],
  last: Int32[Array, 'B R'],
  factor: Float[Array, 'B R'],
  *,
  per_block: int,
  implementation: str | None = None,
) -> Float[Array, 'B K G R C/per_block']:
  """log2-sum-exp2 of each row's scores in each block; -inf where it sees none.

  Args:
    rows: of the query heads of each kv head.
    cells: of each kv head.
    last: the last cell that a row sees; below 0: none.
    factor: above 0; scores are multiplied by it and are powers of 2 then.
    per_block: cells of a block; divides C.
    implementation: 'reference', 'xla', 'gpu', or None.

  Raises:
    ValueError: an argument does not fit; the message names it.
  """
  if rows.ndim != 5 or cells.ndim != 4 or rows.shape[-1] != cells.shape[-1]:
    raise ValueError(
      f'rows {rows.shape} and cells {cells.shape} must be [B K G R F] and '
      '[B K C F]'
    )
  if rows.shape[:2] != cells.shape[:2] or rows.dtype != cells.dtype:
    raise ValueError(
      f'rows {rows.dtype}{list(rows.shape)} and cells '
      f'{cells.dtype}{list(cells.shape)} differ in B, K or dtype'
    )
  want = rows.shape[0], rows.shape[3]
  if last.shape != want or factor.shape != want:
    raise ValueError(f'{last.shape=} and {factor.shape=} must be {want}')
  if per_block < 1 or cells.shape[2] % per_block:
    raise ValueError(f'{per_block=} must divide {cells.shape[2]} cells')
  # A selection: nothing is learnt through it.
  rows, cells = lax.stop_gradient((rows, cells))
  args = rows, cells, last, factor.astype(jnp.float32)
  run = dispatch.choose(
    implementation, 'block_scores', 'block_lse', *args, per_block=per_block
  )
  return run(*args, per_block=per_block)


def granule(
  rows: jax.ShapeDtypeStruct,
  cells: jax.ShapeDtypeStruct,
  *,
  per_block: int,
  implementation: str | None = None,
) -> int:
  """Blocks by whose multiples `block_lse` reads cells without copying them.

  A caller with other keys and many calls pads them once.

  Args:
    rows: shape [B K G R F] and dtype, as `block_lse` will get them.
    cells: [B K C F].
    per_block: cells of a block.
    implementation: as `block_lse` takes it.
  """
  run = dispatch.choose(
    implementation, 'block_scores', 'granule', rows, cells, per_block=per_block
  )
  return run()
