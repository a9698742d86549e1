"""The n largest numbers of each row, by index: ascending, ready to be gathered.

Selection wants a set in the order of positions, not of scores: no number is
moved, and nothing is sorted. Of equal numbers the first are larger.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kernels_pallas import dispatch

__all__ = ['best_in_order']


def best_in_order(
  x: Float[Array, 'R C'], n: int, *, implementation: str | None = None
) -> tuple[Int32[Array, 'R n'], Int32[Array, 'R']]:
  """Indices of the n largest numbers of each row, ascending.

  Args:
    x: float32; -inf is never chosen.
    n: at most C.
    implementation: 'reference', 'xla', 'gpu', or None.

  Returns:
    (indices, NEVER behind the last; how many there are).

  Raises:
    ValueError: an argument does not fit; the message names it.
  """
  if x.ndim != 2 or x.dtype != jnp.float32:
    raise ValueError(f'x is {x.dtype}{list(x.shape)}; it must be float32 [R C]')
  if not 0 < n <= x.shape[1]:
    raise ValueError(f'{n=} must be within 1 and {x.shape[1]}')
  run = dispatch.choose(implementation, 'best_in_order', 'best_in_order', x, n)
  return run(x, n)
