"""Who selects anew, and among which tokens: one program a row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

_WARPS = 8
_STARTS = 4096  # at a time


class Turn(NamedTuple):
  """What a step begins with.

  Attributes:
    query: the queries that selected; the new ones of rows that do so now.
    due: rows that select.
    low: their first candidate token; anything for other rows.
    high: one past the last.
  """

  query: Float[Array, 'B N H']
  due: Bool[Array, 'B']
  low: Int32[Array, 'B']
  high: Int32[Array, 'B']


def turn(
  query: Float[Array, 'B N H'],
  kept: Float[Array, 'B N H'],
  until: Int32[Array, 'B'],
  age: Int32[Array, 'B'],
  positions: Int32[Array, 'B T'],
  valid: Bool[Array, 'B T'],
  lengths: Int32[Array, 'B'],
  starts: Int32[Array, 'B W'],
  used: Int32[Array, 'B'],
  *,
  threshold: float,
  reuse: int,
  sink: int,
  window: int,
  page: int,
  interpret: bool = False,
) -> Turn:
  """Algorithm 1, line 3, with limits; and the candidates.

  Args:
    query: pooled and unrotated.
    kept: the same of the last selection; its memory is the result's.
    until: position that followed the newest token then.
    age: tokens that came since.
    positions: of this step's tokens.
    valid: which of them there are, a prefix of each row.
    lengths: of the rows, these tokens included.
    starts: position of each page's first token.
    used: tokens that the cache holds.
    threshold: cosine below which a row selects.
    reuse: tokens that a list serves at most.
    sink: first tokens, which are no candidates.
    window: last tokens, which are none.
    page: tokens of a page.
    interpret: runs on any device.
  """
  batch, heads, dim = query.shape
  tokens, width = positions.shape[1], starts.shape[1]
  numbers = heads * dim
  shape = (pl.next_power_of_2(numbers),)
  some = min(_STARTS, pl.next_power_of_2(width))

  def kernel(*refs):
    query, kept, until, age, positions, valid, lengths, starts, used = refs[:9]
    new_query, due_ref, low_ref, high_ref = refs[9:]
    row = pl.program_id(0)
    place = lax.broadcasted_iota(jnp.int32, shape, 0)
    window_of = (row, pl.ds(0, shape[0]))
    real = place < numbers

    def read(ref):
      found = plgpu.load(ref.at[window_of], mask=real, other=0.0)
      return found.astype(jnp.float32)

    new = plgpu.load(query.at[window_of], mask=real, other=0.0)
    x, y = read(query), read(kept)
    both = jnp.sum(x * x) * jnp.sum(y * y)
    near = jnp.sum(x * y) * lax.rsqrt(jnp.maximum(both, 1e-30))

    count = jnp.int32(0)
    for t in range(tokens):
      count += valid[row, t].astype(jnp.int32)
    hit = (near >= threshold) & (count == 1)
    hit &= positions[row, 0] == until[row] + age[row]
    hit &= age[row] + 1 < reuse
    due = (count > 0) & ~hit
    due_ref[row] = due

    @pl.when(due)
    def _():
      plgpu.store(new_query.at[window_of], new, mask=real)
      after = lengths[row] - window

      def step(i, below):
        slot = i * some + lax.broadcasted_iota(jnp.int32, (some,), 0)
        start = plgpu.load(
          starts.at[row, pl.ds(i * some, some)], mask=slot < width, other=2**30
        )
        return tuple(
          n + jnp.sum(jnp.clip(end - start, 0, page))
          for n, end in zip(below, (sink, after))
        )

      none = jnp.int32(0), jnp.int32(0)
      below = lax.fori_loop(0, pl.cdiv(width, some), step, none)
      low, high = (jnp.minimum(n, used[row]) for n in below)
      low_ref[row] = jnp.minimum(low, high)
      high_ref[row] = high

  one = jax.ShapeDtypeStruct((batch,), jnp.int32)
  new, *rest = pl.pallas_call(
    kernel,
    out_shape=(
      jax.ShapeDtypeStruct((batch, numbers), kept.dtype),
      jax.ShapeDtypeStruct((batch,), jnp.bool_),
      one,
      one,
    ),
    grid=(batch,),
    input_output_aliases={1: 0},
    compiler_params=plgpu.CompilerParams(num_warps=_WARPS),
    interpret=interpret,
    name='selection_turn',
  )(
    query.astype(kept.dtype).reshape(batch, numbers),
    kept.reshape(batch, numbers),
    until,
    age,
    positions,
    valid,
    lengths,
    starts,
    used,
  )
  return Turn(new.reshape(kept.shape), *rest)
