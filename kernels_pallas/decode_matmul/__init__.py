"""A decoded token's products with a layer's matrices, a launch each.

A product of one to four rows is bound by the matrix's bytes, 2 D M, which are
read once. Of a small model they take less time than launches do, about 1 us
each, and XLA's GPU compiler makes twelve a layer: where the inputs stand first,
as here ([D M]), a product is up to two (products, sums), a norm two, a residual
one. `gpu.py` puts a norm, a product and what follows it into one; a layer has
four. It has no twin here: elsewhere, and for more rows, the transformer's own
lines say the same (lcx/models/transformer.py), against which it is tested.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.decode_matmul.gpu import blocks, gated_matmul, matmul

__all__ = ['MAX_ROWS', 'blocks', 'gated_matmul', 'matmul', 'serves']

# A weight costs 1 + 2 R instructions of the general cores. An H200 reads 2.4e12
# weights a second (4.8 TB/s) and issues 3.0e13 (132 x 128 lanes, 1.75 GHz).
MAX_ROWS = 4
# The least power of two in a number of inputs, and of outputs (`gpu.blocks`).
_INPUTS, _OUTPUTS = 32, 8


def serves(rows: int, *matrices: tuple[Any, int]) -> bool:
  """Whether `gpu.py` can do these products on the default device.

  Args:
    rows: tokens of a call.
    *matrices: (matrix, how many of its first axes are inputs); one that is
      no plain array of a 16-bit float is not served.
  """
  if not dispatch.prefers('gpu') or not 1 <= rows <= MAX_ROWS:
    return False
  return all(_fits(w, inputs) for w, inputs in matrices)


def _fits(w: Any, inputs: int) -> bool:
  if not isinstance(w, jax.Array) or w.dtype not in (jnp.bfloat16, jnp.float16):
    return False
  contracted = 1
  for n in w.shape[:inputs]:
    contracted *= n
  return contracted % _INPUTS == 0 and w.shape[-1] % _OUTPUTS == 0
