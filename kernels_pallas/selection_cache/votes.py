"""Votes of all heads for keys, or for pages by their bounds: two launches.

The first reads keys (or bounds) once and leaves logits, and of each head and
some of its candidates the maximum and the sum of exponentials. The second sums
those up, and then the heads' votes, which `lcx.select.soft_vote` defines.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.best_in_order.gpu import GROUP, coarser
from kernels_pallas.keys import NEVER

_COLUMNS = 16  # of the smallest product on the tensor core
_LOWEST = -1e30  # a maximum that exp can be taken of
_TILE_BYTES = 2**15  # of keys that a program holds at once
# Programs of a launch, as many as 132 multiprocessors hold at once: with more,
# those that end at once would take longer, and work would end in a tail.
_SCORERS = 5 * 132
_COUNTERS = 2 * 132
_NUMBERS = 2**13  # that a program which sums up holds at once


class Source(NamedTuple):
  """What is scored, in rows of a kv head: operands of a kernel, or their refs.

  Attributes:
    k: [B K C H] keys, or codes of them; of bounds, the largest.
    least: [B K C H] bounds' smallest keys; None: k are keys.
    pages: int32 [B m] pages of keys that are scored, ascending, NEVER behind
      them; None: all.
    scale: float32 [B K C] by which codes are multiplied; None: k are keys.
  """

  k: Any
  least: Any = None
  pages: Any = None
  scale: Any = None

  def given(self) -> list:
    return [x for x in self if x is not None]

  def read(self, refs: list) -> tuple['Source', list]:
    """(the same of refs, which come in the order of `given`; other refs)."""
    found = iter(refs)
    own = Source(*(None if x is None else next(found) for x in self))
    return own, list(found)

  def width(self, page: int) -> int:
    """How many there are."""
    return self.k.shape[2] if self.pages is None else self.pages.shape[1] * page

  def tokens(self, b, first, tile: int, page: int):
    """[tile] numbers of keys, or of bounds; NEVER: there is none."""
    place = first + lax.broadcasted_iota(jnp.int32, (tile,), 0)
    if self.pages is None:
      return jnp.where(place < self.k.shape[2], place, NEVER)
    m = self.pages.shape[1]
    at = plgpu.load(self.pages.at[b, jnp.minimum(place // page, m - 1)])
    none = (place >= m * page) | (at == NEVER)
    return jnp.where(none, NEVER, jnp.where(none, 0, at) * page + place % page)

  def rows(self, ref, b, head, token):
    """[tile H] rows of keys or bounds; 0 where there are none."""
    dim = ref.shape[3]
    shape = (token.shape[0], dim)
    at = jnp.broadcast_to(token[:, None], shape)
    return plgpu.load(
      ref.at[
        b,
        head,
        jnp.minimum(at, ref.shape[2] - 1),
        lax.broadcasted_iota(jnp.int32, shape, 1),
      ],
      mask=at < NEVER,
      other=jnp.zeros((), ref.dtype),
    )


class Logits(NamedTuple):
  """Of candidates, for N queries.

  Attributes:
    scores: -inf where there is no candidate.
    top: the largest of each part of the candidates.
    total: sum of exp(score - top) of each part.
  """

  scores: Float[Array, 'B C N']
  top: Float[Array, 'B n N']
  total: Float[Array, 'B n N']


def logits(
  q: Float[Array, 'B N H'],
  source: Source,
  low: Int32[Array, 'B'],
  high: Int32[Array, 'B'],
  due: Bool[Array, 'B'],
  *,
  scale: float,
  page: int,
  interpret: bool = False,
) -> Logits:
  """Logits of a query a head; nothing is written for rows that are not due.

  Args:
    q: queries in the frame of the keys, equally many for every kv head.
    source: what is scored.
    low: first candidate token.
    high: one past the last.
    due: rows to score.
    scale: of logits.
    page: tokens of a page.
    interpret: runs on any device.
  """
  batch, heads, dim = q.shape
  kv = source.k.shape[1]
  group = heads // kv
  columns = max(_COLUMNS, pl.next_power_of_2(group))
  width = source.width(page)
  dtype = jnp.promote_types(q.dtype, source.k.dtype)
  exact = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
  tile = max(16, _TILE_BYTES // (dim * dtype.itemsize))
  if source.least is not None:
    tile = max(16, tile // 2)  # two products
  tiles = pl.cdiv(width, tile)
  run = pl.cdiv(tiles * kv * batch, _SCORERS)  # tiles of a program
  parts = pl.cdiv(tiles, run)
  span = 1 if source.least is None else page  # tokens that a row stands for
  shape = (tile, columns)

  def kernel(*refs):
    *refs, scores_ref, top_ref, total_ref = refs
    own, (q_ref, low_ref, high_ref, due_ref) = source.read(list(refs))
    head, part, b = (pl.program_id(i) for i in range(3))
    mate = lax.broadcasted_iota(jnp.int32, (columns,), 0)

    def products(token):
      column = lax.broadcasted_iota(jnp.int32, (dim, columns), 1)
      channel = lax.broadcasted_iota(jnp.int32, (dim, columns), 0)
      at = head * group + jnp.minimum(column, group - 1)
      queries = plgpu.load(q_ref.at[b, at, channel])

      def product(ref, queries):
        return jnp.dot(
          own.rows(ref, b, head, token).astype(dtype),
          queries.astype(dtype),
          precision=exact,
          preferred_element_type=jnp.float32,
        )

      if own.scale is not None:
        at = jnp.minimum(token, own.scale.shape[2] - 1)
        step = plgpu.load(own.scale.at[b, head, at])
        return product(own.k, queries) * step[:, None]
      if own.least is None:
        return product(own.k, queries)
      most = product(own.k, jnp.maximum(queries, 0))
      return most + product(own.least, jnp.minimum(queries, 0))

    def visit(i, carry):
      top, total = carry
      first = (part * run + i) * tile
      token = own.tokens(b, first, tile, page)
      begin = jnp.where(token < NEVER, token, 0) * span
      inside = (token < NEVER) & (
        jnp.maximum(begin, low_ref[b]) < jnp.minimum(begin + span, high_ref[b])
      )
      found = lax.cond(
        jnp.max(inside.astype(jnp.int32)) > 0,
        lambda: products(token) * scale,
        lambda: jnp.zeros(shape, jnp.float32),
      )
      found = jnp.where(inside[:, None], found, -jnp.inf)
      place = first + lax.broadcasted_iota(jnp.int32, shape, 0)
      column = lax.broadcasted_iota(jnp.int32, shape, 1)
      real = (column < group) & (place < width)
      plgpu.store(
        # Other lanes point behind the end: an interpreted store writes back
        # what their place holds.
        scores_ref.at[b, jnp.where(real, place, width), head * group + column],
        found,
        mask=real,
      )
      new = jnp.maximum(top, jnp.max(found, axis=0))
      weight = jnp.sum(jnp.exp(found - new[None]), axis=0)
      return new, total * jnp.exp(top - new) + weight

    @pl.when(due_ref[b])
    def _():
      none = jnp.full((columns,), _LOWEST, jnp.float32)
      top, total = lax.fori_loop(0, run, visit, (none, jnp.zeros_like(none)))
      at = jnp.where(mate < group, part, parts), head * group + mate
      plgpu.store(top_ref.at[(b, *at)], top, mask=mate < group)
      plgpu.store(total_ref.at[(b, *at)], total, mask=mate < group)

  sums = jax.ShapeDtypeStruct((batch, parts, heads), jnp.float32)
  found = pl.pallas_call(
    kernel,
    out_shape=(
      jax.ShapeDtypeStruct((batch, width, heads), jnp.float32),
      sums,
      sums,
    ),
    # Heads first: together they fill the lines of the scores.
    grid=(kv, parts, batch),
    compiler_params=plgpu.CompilerParams(num_warps=4),
    interpret=interpret,
    name='selection_logits',
  )(*source.given(), q, low, high, due)
  return Logits(*found)


def votes(
  logits: Logits,
  due: Bool[Array, 'B'],
  *,
  kind: str,
  weight: Float[Array, 'B N'] | None = None,
  interpret: bool = False,
) -> list[Float[Array, 'B C']]:
  """Votes for each candidate, -inf for others; maxima of GROUP votes, ....

  Args:
    logits: of candidates.
    due: rows to vote; nothing is written for others.
    kind: 'soft' or 'top_k'.
    weight: of each query's vote; None: all alike.
    interpret: runs on any device.

  Returns:
    As `kernels_pallas.best_in_order.gpu.best` takes them.
  """
  batch, width, heads = logits.scores.shape
  parts = logits.top.shape[1]
  lead = pl.next_power_of_2(heads)
  some = max(1, _NUMBERS // lead)
  tile = max(some, GROUP ** coarser(width))
  tiles = pl.cdiv(width, tile)
  run = pl.cdiv(tiles * batch, _COUNTERS)  # tiles of a program
  widths = [pl.cdiv(width, GROUP**i) for i in range(coarser(width) + 1)]

  def kernel(scores_ref, top_ref, total_ref, due_ref, *refs):
    weight_ref = None if weight is None else refs[0]
    out_refs = refs[0 if weight is None else 1 :]
    first, b = pl.program_id(0) * run, pl.program_id(1)
    head = lax.broadcasted_iota(jnp.int32, (lead,), 0)

    def block(ref, first, size, other):
      """[size lead] of all heads."""
      place = first + lax.broadcasted_iota(jnp.int32, (size, lead), 0)
      return plgpu.load(
        ref.at[b, pl.ds(first, size), pl.ds(0, lead)],
        mask=(place < ref.shape[1]) & (head < heads)[None],
        other=other,
      )

    def log_sums():
      """The log-sum-exp [lead] of each head's candidates."""

      def visit(i, carry):
        top, total = carry
        tops = block(top_ref, i * some, some, -jnp.inf)
        sums = block(total_ref, i * some, some, 0.0)
        new = jnp.maximum(top, jnp.max(tops, axis=0))
        sums = jnp.sum(sums * jnp.exp(tops - new[None]), axis=0)
        return new, total * jnp.exp(top - new) + sums

      none = jnp.full((lead,), _LOWEST, jnp.float32)
      top, total = lax.fori_loop(
        0, pl.cdiv(parts, some), visit, (none, jnp.zeros_like(none))
      )
      return top + jnp.log(total)

    def count(number, sums):
      """Votes of a tile, by all heads' sums."""
      scores = block(scores_ref, number * tile, tile, -jnp.inf)
      part = scores
      if kind == 'soft':
        part = jnp.exp(jnp.minimum(scores - sums[None], 0.0))
      if weight_ref is not None:
        at = jnp.minimum(head, heads - 1)
        part *= plgpu.load(weight_ref.at[b, at])[None]
      # What is no candidate has no logit of any head.
      real = (head < heads)[None] & (scores > -jnp.inf)
      found = jnp.sum(jnp.where(real, part, 0.0), axis=1)
      found = jnp.where(jnp.max(scores, axis=1) > -jnp.inf, found, -jnp.inf)
      for level, out_ref in enumerate(out_refs):
        if level:
          found = jnp.max(found.reshape(-1, GROUP), axis=1)
        size = tile // GROUP**level
        place = number * size + lax.broadcasted_iota(jnp.int32, (size,), 0)
        real = place < widths[level]
        at = jnp.where(real, place, widths[level])
        plgpu.store(out_ref.at[b, at], found, mask=real)

    @pl.when(due_ref[b])
    def _():
      sums = log_sums() if kind == 'soft' else None
      pl.loop(0, run)(lambda i: count(first + i, sums))

  operands = [*logits, due] + ([] if weight is None else [weight])
  return pl.pallas_call(
    kernel,
    out_shape=[jax.ShapeDtypeStruct((batch, n), jnp.float32) for n in widths],
    grid=(pl.cdiv(tiles, run), batch),
    compiler_params=plgpu.CompilerParams(num_warps=8),
    interpret=interpret,
    name='selection_votes',
  )(*operands)
