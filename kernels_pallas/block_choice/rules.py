"""What the implementations of block_choice share."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int32

# Scores are ordered by 30 bits of their float32 pattern; any finite one is
# below these two.
TOP = 2**30 - 1
ALWAYS = TOP - 1


class Listed(NamedTuple):
  """Lists of rows.

  Attributes:
    ids: ascending; unused entries are 0.
    count: used entries.
    captured: share of the row's mass that the listed blocks hold; 0 of nothing.
    cut: share that was asked for and that the width cut off.
  """

  ids: Int32[Array, '*R W']
  count: Int32[Array, '*R']
  captured: Float[Array, '*R']
  cut: Float[Array, '*R']
