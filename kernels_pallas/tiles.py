"""Which key blocks a tile of query rows visits: the geometry all paths share.

Both prompt families are one rule over rows: the row with bounds (first, stop)
of head n sees key s iff

  first - sliding_window <= s < stop  and
  (s < sink[n]  or  s >= first - window[n]  or  s // block_k is listed)

block_sparse: first = position + 1, stop = min(position + 1, length).
passing_block: first = start, stop = stop, sink = window = 0, nothing listed.
A row with stop 0 sees nothing.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

BIG = 2**30


def ceil_div(a, b: int):
  """The quotient a / b, rounded up."""
  return (a + b - 1) // b


class Plan(NamedTuple):
  """The visited blocks of each tile, all int32 [B N Tb], in ascending order.

  Visit j is block `skip + j` for j < sinks; then `middle` listed blocks
  ids[cursor:]; then blocks from `lead` on; `total` visits in all. Listed
  blocks among the sink and window blocks are visited there.

  `whole`: blocks below this index need no causal mask (every row with
  stop > 0 has stop >= whole * block_k).
  """

  skip: Int32[Array, 'B N Tb']
  sinks: Int32[Array, 'B N Tb']
  cursor: Int32[Array, 'B N Tb']
  middle: Int32[Array, 'B N Tb']
  lead: Int32[Array, 'B N Tb']
  total: Int32[Array, 'B N Tb']
  whole: Int32[Array, 'B N Tb']


def by_tile(rows: Int32[Array, 'B T'], tile: int, fill: int) -> Array:
  """[B T] -> [B Tb tile], padded with `fill`."""
  b, t = rows.shape
  padded = jnp.pad(rows, ((0, 0), (0, -t % tile)), constant_values=fill)
  return padded.reshape(b, -1, tile)


def plan(
  first: Int32[Array, 'B T'],
  stop: Int32[Array, 'B T'],
  ids: Int32[Array, 'B N Tb W'],
  count: Int32[Array, 'B N Tb'],
  sink: Int32[Array, 'N'],
  window: Int32[Array, 'N'],
  *,
  block_q: int,
  block_k: int,
  sliding_window: int | None,
) -> Plan:
  """The visits of every tile; O(B N Tb (block_q + W)) integer work."""
  first = by_tile(first, block_q, 0)[:, None]  # [B 1 Tb block_q]
  stop = by_tile(stop, block_q, 0)[:, None]
  alive = stop > 0
  end = ceil_div(jnp.max(stop, axis=-1), block_k)
  whole = jnp.min(jnp.where(alive, stop, BIG), axis=-1) // block_k
  low = first - window[None, :, None, None]
  floor = jnp.zeros_like(end)
  if sliding_window is not None:
    bound = first - sliding_window
    low = jnp.maximum(low, bound)
    floor = jnp.min(jnp.where(alive, bound, BIG), axis=-1)
    floor = jnp.minimum(jnp.maximum(floor, 0) // block_k, end)
  seen = low < stop
  lead = jnp.min(jnp.where(seen, jnp.maximum(low, 0), BIG), axis=-1) // block_k
  lead = jnp.minimum(lead, end)
  shape = jnp.broadcast_shapes(lead.shape, end.shape)
  lead, end, floor, whole = (
    jnp.broadcast_to(x, shape) for x in (lead, end, floor, whole)
  )
  sink_end = jnp.minimum(ceil_div(sink, block_k)[None, :, None], lead)
  sink_end = jnp.maximum(sink_end, floor)
  used = jnp.arange(ids.shape[-1]) < count[..., None]

  def below(limit):
    return jnp.sum(used & (ids < limit[..., None]), axis=-1, dtype=jnp.int32)

  cursor = below(sink_end)
  middle = jnp.maximum(below(lead) - cursor, 0)
  sinks = sink_end - floor
  total = sinks + middle + end - lead
  return Plan(floor, sinks, cursor, middle, lead, total, whole)


def rows_of(
  t: int, q_start: Int32[Array, 'B'], lengths: Int32[Array, 'B']
) -> tuple[Int32[Array, 'B T'], Int32[Array, 'B T']]:
  """(first, stop) of block_sparse's rows; rows past a length get stop 0."""
  first = q_start[:, None] + jnp.arange(1, t + 1, dtype=jnp.int32)
  return first, jnp.where(first <= lengths[:, None], first, 0)
