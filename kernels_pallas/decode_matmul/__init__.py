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
  CODES_STEP,
  LEAST_CODES,
  Codes,
  MatmulSizes,
  gated_matmul,
  matmul,
  rotated_matmul,
)

__all__ = [
  'Codes',
  'MatmulSizes',
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
      16-bit float nor `Codes` is not served.
  """
  if not dispatch.prefers('gpu') or rows != 1:
    return False
  return all(
    (_are_codes(w) or _is_16_bit(w))
    and w.shape[-1] <= MAX_INPUTS
    and w.shape[0] % 2 == 0
    for w in matrices
  )


def _are_codes(w):
  if not isinstance(w, Codes):
    return False
  return w.shape[-1] >= LEAST_CODES and w.shape[-1] % CODES_STEP == 0


def _is_16_bit(w):
  return isinstance(w, jax.Array) and w.dtype in (jnp.bfloat16, jnp.float16)
