"""A residual sum and its RMSNorm, of the few rows of a decode step.

XLA takes two or three launches: what follows a sum over a row is a kernel of
its own, and the residual is added in each or before them. `gpu.py` takes one.
It has no twin here: elsewhere, and where it is differentiated,
`lcx.models.transformer.add_norm` says the same in array operations.
"""

from kernels_pallas import dispatch
from kernels_pallas.add_norm import gpu

__all__ = ['gpu', 'serves']

MAX_WIDTH = 16384  # of a row, which one program holds in registers


def serves(width: int) -> bool:
  """Whether `gpu.py` takes rows of `width` numbers on the default device."""
  return dispatch.prefers('gpu') and width <= MAX_WIDTH
