"""passing_block in plain XLA: the interval walk that dense attention takes."""

from kernels_pallas import xla_tiles
from kernels_pallas.partial import Partial


def passing_block(q, k, v, start, stop, *, scale, block_sizes) -> Partial:
  """See `kernels_pallas.passing_block.passing_block`."""
  return xla_tiles.attend_intervals(
    q, k, v, start, stop, scale=scale, **(block_sizes or {})
  )
