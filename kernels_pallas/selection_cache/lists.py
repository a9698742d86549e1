"""The list of a selection, and its keys and values: two launches.

Rows that do not select get their new token behind what they hold.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas import nth_best
from kernels_pallas.best_in_order.gpu import Candidates

_TOKENS = 32  # of a program that gathers


class Counts(NamedTuple):
  """What is known of a working set, a row; `lcx.select.working_set` says what.

  Attributes:
    held: int32 [B].
    chosen: int32 [B].
    until: int32 [B].
    age: int32 [B].
  """

  held: Int32[Array, 'B']
  chosen: Int32[Array, 'B']
  until: Int32[Array, 'B']
  age: Int32[Array, 'B']


def listed(
  candidates: Candidates,
  pages: Int32[Array, 'B m'] | None,
  counts: Counts,
  low: Int32[Array, 'B'],
  high: Int32[Array, 'B'],
  used: Int32[Array, 'B'],
  lengths: Int32[Array, 'B'],
  valid: Bool[Array, 'B T'],
  due: Bool[Array, 'B'],
  *,
  n: int,
  width: int,
  page: int,
  interpret: bool = False,
) -> tuple[Int32[Array, 'B width'], Counts]:
  """[0, low) ++ the n best candidates ++ [high, used), and the counts after it.

  Args:
    candidates: votes.
    pages: of whose tokens they are, in order; None: of all.
    counts: their memory is the result's.
    low: end of the first tokens.
    high: start of the last tokens.
    used: tokens that the cache holds.
    lengths: of the rows.
    valid: which of the step's tokens there are.
    due: rows that select; the others get no list.
    n: tokens to choose.
    width: of the list, in which what is longer is cut.
    page: tokens of a page.
    interpret: runs on any device.
  """
  batch = low.shape[0]

  def kernel(*refs):
    list_ref, *new = refs[-5:]
    own, refs = candidates.read(list(refs[:-5]))
    if pages is not None:
      pages_ref, *refs = refs
    old, refs = Counts(*refs[:4]), refs[4:]
    low_ref, high_ref, used_ref, lengths_ref, valid_ref, due_ref = refs
    new, row = Counts(*new), pl.program_id(0)

    @pl.when(due_ref[row])
    def _():
      low, high = low_ref[row], high_ref[row]
      found, count = nth_best.places_in_pieces(own.keys(row), n)
      for token, (chosen, place) in zip(own.slots(row), found):
        if pages is not None:
          at = jnp.where(chosen, token // page, 0)
          at = plgpu.load(pages_ref.at[row, at])
          token = at * page + token % page
        chosen &= low + place < width
        at = jnp.where(chosen, low + place, width)
        plgpu.store(list_ref.at[row, at], token, mask=chosen)
      total = jnp.minimum(low + count + used_ref[row] - high, width)
      place = lax.broadcasted_iota(jnp.int32, (pl.next_power_of_2(width),), 0)
      end = jnp.where(place < low, place, high + place - low - count)
      plgpu.store(
        list_ref.at[row, pl.ds(0, place.shape[0])],
        jnp.where(place < total, end, 0),
        mask=((place < low) | (place >= low + count)) & (place < width),
      )
      new.held[row] = total
      new.chosen[row] = total
      new.until[row] = lengths_ref[row]
      new.age[row] = 0

    @pl.when(~due_ref[row] & valid_ref[row, 0])
    def _():
      new.held[row] = old.held[row] + 1
      new.age[row] = old.age[row] + 1

  first = candidates.given() + ([] if pages is None else [pages])
  one = jax.ShapeDtypeStruct((batch,), jnp.int32)
  found, *new = pl.pallas_call(
    kernel,
    out_shape=(jax.ShapeDtypeStruct((batch, width), jnp.int32), *[one] * 4),
    grid=(batch,),
    input_output_aliases={len(first) + i: 1 + i for i in range(4)},
    compiler_params=plgpu.CompilerParams(num_warps=16),
    interpret=interpret,
    name='selection_list',
  )(*first, *counts, low, high, used, lengths, valid, due)
  return found, Counts(*new)


def gathered(
  k: Float[Array, 'B K W H'],
  v: Float[Array, 'B K W H'],
  all_k: Float[Array, 'B K S H'],
  all_v: Float[Array, 'B K S H'],
  used: Int32[Array, 'B'],
  listed: Int32[Array, 'B W'],
  held: Int32[Array, 'B'],
  valid: Bool[Array, 'B T'],
  due: Bool[Array, 'B'],
  *,
  interpret: bool = False,
) -> tuple[Float[Array, 'B K W H'], Float[Array, 'B K W H']]:
  """The listed keys and values of rows that select; of others the new token.

  Args:
    k: of the working set; its memory is the result's.
    v: likewise.
    all_k: of the cache.
    all_v: likewise.
    used: tokens that the cache holds, of which the last is the new one.
    listed: numbers of tokens.
    held: tokens of the working set, this step's included.
    valid: whether there is a new token.
    due: rows that select.
    interpret: runs on any device.
  """
  batch, kv, width, dim = k.shape
  some = min(_TOKENS, width)
  shape = (some, dim)

  def kernel(*refs):
    all_k_ref, all_v_ref, used_ref, listed_ref, held_ref, *refs = refs[2:]
    valid_ref, due_ref, k_ref, v_ref = refs
    head, number, row = (pl.program_id(i) for i in range(3))
    held, due = held_ref[row], due_ref[row]
    first, channels = number * some, pl.ds(0, dim)

    @pl.when(due & (first < held))
    def _():
      place = first + lax.broadcasted_iota(jnp.int32, (some,), 0)
      here = place < jnp.minimum(held, width)
      token = plgpu.load(
        listed_ref.at[row, pl.ds(first, some)], mask=here, other=0
      )
      token = jnp.broadcast_to(token[:, None], shape)
      channel = lax.broadcasted_iota(jnp.int32, shape, 1)
      for source, target in ((all_k_ref, k_ref), (all_v_ref, v_ref)):
        plgpu.store(
          target.at[row, head, pl.ds(first, some), channels],
          plgpu.load(source.at[row, head, token, channel]).astype(k.dtype),
          mask=jnp.broadcast_to(here[:, None], shape),
        )

    slot = held - 1
    comes = ~due & valid_ref[row, 0] & (slot < width)

    @pl.when(comes & (slot // some == number))
    def _():
      newest = used_ref[row] - 1
      for source, target in ((all_k_ref, k_ref), (all_v_ref, v_ref)):
        plgpu.store(
          target.at[row, head, slot, channels],
          plgpu.load(source.at[row, head, newest, channels]).astype(k.dtype),
        )

  like = jax.ShapeDtypeStruct(k.shape, k.dtype)
  return pl.pallas_call(
    kernel,
    out_shape=(like, like),
    grid=(kv, pl.cdiv(width, some), batch),
    input_output_aliases={0: 0, 1: 1},
    compiler_params=plgpu.CompilerParams(num_warps=4),
    interpret=interpret,
    name='selection_gather',
  )(k, v, all_k, all_v, used, listed, held, valid, due)
