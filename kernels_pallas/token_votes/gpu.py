"""token_votes on NVIDIA GPUs: two launches in Pallas Triton, then the best.

  logits   reads keys once and leaves the logits of candidates, and of each
           head and part of the keys the maximum and the sum of exponentials
  votes    sums those up, and then the heads' votes (with the maxima from which
           `kernels_pallas.best_in_order.gpu` narrows them)

A program of the first takes every so manyth tile of keys, so that programs end
together wherever the candidates lie; the loop has no branch, so that the
compiler loads tiles ahead. A thread keeps a maximum and a sum of its own for
each logit of a tile, and they are reduced once, behind the loop.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from kernels_pallas.best_in_order import gpu as best_in_order
from kernels_pallas.best_in_order.gpu import GROUP, coarser

_COLUMNS = 16  # of the smallest product on the tensor core
_MOST_COLUMNS = 64  # logits of a token that a program holds
_LOWEST = -1e30  # a maximum that exp can be taken of
_TILE = 2**14  # bytes of a tile of keys
_STAGES = 3  # tiles that a program has in shared memory
# Programs of a launch, as many as 132 multiprocessors hold at once: three where
# a product has few columns, else two.
_SCORERS = 3 * 132, 2 * 132
_COUNTERS = 4 * 132
_NUMBERS = 2**13  # logits that a program which votes holds at once


def refuse(function: str, q, k, low, high, n: int, **_) -> str | None:
  """Why this implementation cannot serve; None if it can."""
  del function, low, high
  heads, dim = q.shape[2:]
  kv, length = k.shape[1:3]
  if dim not in (64, 128, 256):
    return f'head dim {dim} is not one of 64, 128, 256'
  if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    return f'{q.dtype} queries'
  if q.dtype != k.dtype:
    return f'{q.dtype} queries of {k.dtype} keys'
  if heads // kv > _MOST_COLUMNS or heads > 256:
    return f'{heads} heads of {kv} kv heads: too many for a program'
  if max(k.size, q.size // dim * length) >= 2**31:
    return f'{length} keys, whose offsets (or logits) 32 bits do not hold'
  if length > best_in_order.MOST and n * GROUP > best_in_order.MOST:
    return f'{n=} of {length} exceeds {best_in_order.MOST // GROUP}'
  return None


def best_voted(
  q: Float[Array, 'B R N H'],
  k: Float[Array, 'B K S H'],
  low: Int32[Array, 'B R'],
  high: Int32[Array, 'B R'],
  n: int,
  *,
  kind: str,
  scale: float,
  weight: Float[Array, 'B R N'] | None,
  interpret: bool = False,
) -> tuple[Int32[Array, 'B R n'], Int32[Array, 'B R']]:
  """`kernels_pallas.token_votes.best_voted` on an NVIDIA GPU.

  Raises:
    NotImplementedError: with the reason, where the kernels do not apply.
  """
  if reason := refuse('best_voted', q, k, low, high, n):
    raise NotImplementedError(reason)
  how = {'kind': kind, 'interpret': interpret}
  found = logits(q, k, low, high, scale=scale, **how)
  levels = votes(found, low, high, weight=weight, **how)
  index, count = best_in_order.best(levels, n, interpret=interpret)
  return index.reshape(*low.shape, n), count.reshape(low.shape)


class Logits(NamedTuple):
  """Of R queries' candidates; anything where a token is no candidate.

  Attributes:
    scores: tokens last.
    top: the largest of each part of the candidates.
    total: sum of exp(score - top) of each part.
  """

  scores: Float[Array, 'B R N S']
  top: Float[Array, 'B R N n']
  total: Float[Array, 'B R N n']


def logits(
  q: Float[Array, 'B R N H'],
  k: Float[Array, 'B K S H'],
  low: Int32[Array, 'B R'],
  high: Int32[Array, 'B R'],
  *,
  kind: str,
  scale: float,
  interpret: bool = False,
) -> Logits:
  """Logits of candidates; arguments as in `best_voted`."""
  batch, rows, heads, dim = q.shape
  kv, length = k.shape[1:3]
  group = heads // kv
  # Rows share a pass over the keys, as far as a program holds their logits.
  splits = pl.cdiv(rows * group, _MOST_COLUMNS // group * group)
  some = pl.cdiv(rows, splits)  # rows of a program
  columns = max(_COLUMNS, pl.next_power_of_2(some * group))
  tile = max(16, _TILE // (dim * k.dtype.itemsize))
  tiles = pl.cdiv(length, tile)
  programs = _SCORERS[columns > _COLUMNS]
  parts = min(tiles, max(1, programs // (kv * splits * batch)))
  shape = (tile, columns)
  exact = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

  def kernel(q_ref, k_ref, low_ref, high_ref, scores_ref, top_ref, total_ref):
    number, part, b = (pl.program_id(i) for i in range(3))
    head, split = number % kv, number // kv
    mate = lax.broadcasted_iota(jnp.int32, (columns,), 0)
    row = split * some + mate // group
    real = (mate < some * group) & (row < rows)
    safe, at = jnp.minimum(row, rows - 1), head * group + mate % group
    first = plgpu.load(low_ref.at[b, safe])
    last = plgpu.load(high_ref.at[b, safe])
    last = jnp.where(real, jnp.minimum(last, length), first)
    some_real = real & (first < last)
    begin = jnp.min(jnp.where(some_real, first, length)) // tile + part
    end = pl.cdiv(jnp.max(jnp.where(some_real, last, 0)), tile)
    turn = (dim, columns)
    queries = plgpu.load(
      q_ref.at[
        b,
        jnp.broadcast_to(safe[None], turn),
        jnp.broadcast_to(at[None], turn),
        lax.broadcasted_iota(jnp.int32, turn, 0),
      ]
    )

    def visit(i, carry):
      top, total = carry
      start = (begin + i * parts) * tile
      token = start + lax.broadcasted_iota(jnp.int32, (tile,), 0)
      keys = k_ref.at[b, head, pl.ds(start, tile), pl.ds(0, dim)]
      if length % tile:
        here = jnp.broadcast_to((token < length)[:, None], (tile, dim))
        keys = plgpu.load(keys, mask=here, other=jnp.zeros((), k_ref.dtype))
      else:
        keys = plgpu.load(keys)
      found = scale * jnp.dot(
        keys, queries, precision=exact, preferred_element_type=jnp.float32
      )
      token = jnp.broadcast_to(token[:, None], shape)
      # All tokens of a tile: stores are wide where the mask is a column's.
      mask = jnp.broadcast_to(real[None], shape)
      if length % tile:
        mask &= token < length
      plgpu.store(
        scores_ref.at[
          b,
          jnp.broadcast_to(safe[None], shape),
          # Columns of no head point behind the end: an interpreted store
          # writes back what their place holds.
          jnp.broadcast_to(jnp.where(real, at, heads)[None], shape),
          token,
        ],
        found,
        mask=mask,
      )
      if kind != 'soft':
        return carry
      inside = (token >= first[None]) & (token < last[None])
      found = jnp.where(inside, found, -jnp.inf)
      apart = jnp.exp(-jnp.abs(found - top))
      total = jnp.where(found > top, total * apart + 1, total + apart)
      return jnp.maximum(top, found), total

    none = jnp.full(shape, _LOWEST, jnp.float32)
    count = jnp.maximum(pl.cdiv(end - begin, parts), 0)
    top, total = lax.fori_loop(0, count, visit, (none, jnp.zeros_like(none)))
    most = jnp.max(top, axis=0)
    total = jnp.sum(total * jnp.exp(top - most[None]), axis=0)
    place = jnp.where(real, part, parts)
    plgpu.store(top_ref.at[b, safe, at, place], most, mask=real)
    plgpu.store(total_ref.at[b, safe, at, place], total, mask=real)

  sums = jax.ShapeDtypeStruct((batch, rows, heads, parts), jnp.float32)
  scores = jax.ShapeDtypeStruct((batch, rows, heads, length), jnp.float32)
  found = pl.pallas_call(
    kernel,
    out_shape=(scores, sums, sums),
    grid=(kv * splits, parts, batch),
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=_STAGES),
    interpret=interpret,
    name='token_logits',
  )(q, k, low, high)
  return Logits(*found)


def votes(
  logits: Logits,
  low: Int32[Array, 'B R'],
  high: Int32[Array, 'B R'],
  *,
  kind: str,
  weight: Float[Array, 'B R N'] | None = None,
  interpret: bool = False,
) -> list[Float[Array, 'R C']]:
  """Votes for each candidate, -inf for others; maxima of GROUP votes, ....

  Args:
    logits: of candidates.
    low: first candidate of each query.
    high: one past its last.
    kind: of vote.
    weight: of each head's vote; None: all alike.
    interpret: runs on any device.

  Returns:
    As `kernels_pallas.best_in_order.gpu.best` takes them, B * R rows.
  """
  batch, queries, heads, width = logits.scores.shape
  rows, parts = batch * queries, logits.top.shape[3]
  lead = pl.next_power_of_2(heads)
  tile = max(_NUMBERS // lead, GROUP ** coarser(width))
  tiles = pl.cdiv(width, tile)
  run = pl.cdiv(tiles * rows, _COUNTERS)  # tiles of a program
  widths = [pl.cdiv(width, GROUP**i) for i in range(coarser(width) + 1)]

  def kernel(scores_ref, top_ref, total_ref, low_ref, high_ref, *refs):
    weight_ref = None if weight is None else refs[0]
    out_refs = refs[0 if weight is None else 1 :]
    first, row = pl.program_id(0) * run, pl.program_id(1)
    head = lax.broadcasted_iota(jnp.int32, (lead,), 0)
    low, high = low_ref[row], high_ref[row]

    def block(ref, first, size, mask, other):
      """[lead size] of all heads."""
      mask = (head < heads)[:, None] & jnp.broadcast_to(mask, (1, size))
      return plgpu.load(
        ref.at[row, pl.ds(0, lead), pl.ds(first, size)], mask=mask, other=other
      )

    def log_sums():
      """The log-sum-exp [lead] of each head's candidates."""
      size = pl.next_power_of_2(parts)
      real = lax.broadcasted_iota(jnp.int32, (size,), 0) < parts
      tops = block(top_ref, 0, size, real, _LOWEST)
      sums = block(total_ref, 0, size, real, 0.0)
      top = jnp.max(tops, axis=1)
      total = jnp.sum(sums * jnp.exp(tops - top[:, None]), axis=1)
      return top + jnp.log(total)

    def count(number, sums):
      """Votes of a tile, by all heads' sums."""
      token = number * tile + lax.broadcasted_iota(jnp.int32, (tile,), 0)
      inside = (token >= low) & (token < jnp.minimum(high, width))
      # Of a tile all or nothing, as far as it goes: wide loads.
      some = (number * tile < high) & (number * tile + tile > low)
      some &= token < width
      part = block(scores_ref, number * tile, tile, some, 0.0)
      if kind == 'soft':
        part = jnp.exp(jnp.minimum(part - sums[:, None], 0.0))
      if weight_ref is not None:
        at = jnp.minimum(head, heads - 1)
        part *= plgpu.load(weight_ref.at[row, at])[:, None]
      part = jnp.where((head < heads)[:, None], part, 0.0)
      found = jnp.where(inside, jnp.sum(part, axis=0), -jnp.inf)
      for level, out_ref in enumerate(out_refs):
        if level:
          found = jnp.max(found.reshape(-1, GROUP), axis=1)
        size = tile // GROUP**level
        place = number * size + lax.broadcasted_iota(jnp.int32, (size,), 0)
        real = place < widths[level]
        at = jnp.where(real, place, widths[level])
        plgpu.store(out_ref.at[row, at], found, mask=real)

    sums = log_sums() if kind == 'soft' else None
    pl.loop(0, run)(lambda i: count(first + i, sums))

  flat = [x.reshape(rows, *x.shape[2:]) for x in logits]
  operands = [*flat, low.reshape(rows), high.reshape(rows)]
  if weight is not None:
    operands.append(weight.reshape(rows, heads))
  return pl.pallas_call(
    kernel,
    out_shape=[jax.ShapeDtypeStruct((rows, n), jnp.float32) for n in widths],
    grid=(pl.cdiv(tiles, run), rows),
    compiler_params=plgpu.CompilerParams(num_warps=8),
    interpret=interpret,
    name='token_votes',
  )(*operands)
