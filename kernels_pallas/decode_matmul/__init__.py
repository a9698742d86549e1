"""A decoded token's products with a layer's matrices, a launch each.

A product of one row is bound by the matrix's bytes, which are read once. Of a
small model they take less time than what stands around them: XLA's GPU compiler
makes ten launches of a layer, of a large one 13, each with a gap of about 1 us
after it. `gpu.py` puts a norm, a product and what follows it into one; a
layer's matrices are four. It has no twin here: elsewhere, and for more rows,
the transformer's own lines say the same (lcx/models/transformer.py), against
which it is tested.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.decode_matmul.gpu import (
  MatmulSizes,
  Scaled,
  gated_matmul,
  matmul,
  rotated_matmul,
)

__all__ = [
  'MatmulSizes',
  'Scaled',
  'gated_matmul',
  'matmul',
  'rotated_matmul',
  'serves',
]

MAX_INPUTS = 32768  # a program holds a row of the matrix, and all of x


def serves(rows: int, *matrices: Any) -> bool:
  """Whether `gpu.py` can do these products on the default device.

  Args:
    rows: tokens of a call.
    *matrices: outputs first, [*M D]; one that is neither a plain array of a
      16-bit float nor `Scaled` is not served.
  """
  if not dispatch.prefers('gpu') or rows != 1:
    return False

  def fits(w: Any) -> bool:
    codes, dtypes = w, (jnp.bfloat16, jnp.float16)
    if isinstance(w, Scaled):
      codes, dtypes = w.codes, (jnp.int8,)
    return (
      isinstance(codes, jax.Array)
      and codes.dtype in dtypes
      and codes.shape[-1] <= MAX_INPUTS
      and codes.shape[0] % 2 == 0
    )

  return all(map(fits, matrices))
