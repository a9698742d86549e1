"""Votes of all heads for keys, or for pages by their bounds: two launches.

The first reads keys (or bounds) once and leaves logits, and of each tile and
head the maximum and the sum of exponentials. The second sums those up, and then
the heads' votes (`lcx.select.soft_vote` has the definitions).
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
_VOTES = 1024  # of a program
_PARTS = 1024  # of which as many are summed up at a time


class Source(NamedTuple):
  """What is scored, in rows of a kv head: operands of a kernel, or their refs.

  Attributes:
    k: [B K C H] keys; of bounds, the largest.
    least: [B K C H] bounds' smallest keys; None: k are keys.
    pages: int32 [B m] pages of keys that are scored, ascending, NEVER behind
      them; None: all.
  """

  k: Any
  least: Any = None
  pages: Any = None

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
      other=0.0,
    )


class Logits(NamedTuple):
  """Of candidates, G queries a kv head.

  Attributes:
    scores: -inf where there is no candidate.
    top: the largest of each tile.
    total: sum of exp(score - top) of each tile.
  """

  scores: Float[Array, 'B K C G']
  top: Float[Array, 'B K n G']
  total: Float[Array, 'B K n G']


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
  tile = 128 if width <= 2**15 else 256
  if source.least is not None:
    tile //= 2  # two products
  dtype = jnp.promote_types(q.dtype, source.k.dtype)
  exact = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
  span = 1 if source.least is None else page  # tokens that a row stands for

  def kernel(*refs):
    *refs, scores_ref, top_ref, total_ref = refs
    own, (q_ref, low_ref, high_ref, due_ref) = source.read(refs)
    number, head, b = (pl.program_id(i) for i in range(3))
    first = number * tile

    def products(token):
      column = lax.broadcasted_iota(jnp.int32, (dim, columns), 1)
      channel = lax.broadcasted_iota(jnp.int32, (dim, columns), 0)
      mine = jnp.minimum(column, group - 1)
      queries = plgpu.load(q_ref.at[b, head * group + mine, channel])

      def product(ref, queries):
        return jnp.dot(
          own.rows(ref, b, head, token).astype(dtype),
          queries.astype(dtype),
          precision=exact,
          preferred_element_type=jnp.float32,
        )

      if own.least is None:
        return product(own.k, queries)
      most = product(own.k, jnp.maximum(queries, 0))
      return most + product(own.least, jnp.minimum(queries, 0))

    @pl.when(due_ref[b])
    def _():
      token = own.tokens(b, first, tile, page)
      begin = jnp.where(token < NEVER, token, 0) * span
      inside = (token < NEVER) & (begin < high_ref[b])
      inside &= begin + span > low_ref[b]
      shape = (tile, columns)
      found = lax.cond(
        jnp.max(inside.astype(jnp.int32)) > 0,
        lambda: products(token) * scale,
        lambda: jnp.zeros(shape, jnp.float32),
      )
      found = jnp.where(inside[:, None], found, -jnp.inf)
      top = jnp.max(found, axis=0)
      weight = jnp.exp(found - jnp.maximum(top, _LOWEST)[None])
      place = first + lax.broadcasted_iota(jnp.int32, shape, 0)
      column = lax.broadcasted_iota(jnp.int32, shape, 1)
      real = (column < group) & (place < width)
      _store(
        scores_ref,
        (b, head),
        (jnp.where(real, place, width), column),
        found,
        real,
      )
      column = lax.broadcasted_iota(jnp.int32, (columns,), 0)
      real = column < group
      at = jnp.where(real, number, top_ref.shape[2])
      _store(top_ref, (b, head), (at, column), top, real)
      _store(total_ref, (b, head), (at, column), jnp.sum(weight, axis=0), real)

  parts = pl.cdiv(width, tile)
  part = jax.ShapeDtypeStruct((batch, kv, parts, group), jnp.float32)
  found = pl.pallas_call(
    kernel,
    out_shape=(
      jax.ShapeDtypeStruct((batch, kv, width, group), jnp.float32),
      part,
      part,
    ),
    grid=(parts, kv, batch),
    compiler_params=plgpu.CompilerParams(num_warps=4 if tile < 256 else 8),
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
  batch, kv, width, group = logits.scores.shape
  parts = logits.top.shape[2]
  lead = pl.next_power_of_2(group)
  tile = min(_VOTES, pl.next_power_of_2(width))
  tile = max(tile, GROUP ** coarser(width))
  some = min(_PARTS, pl.next_power_of_2(parts))
  widths = [pl.cdiv(width, GROUP**level) for level in range(coarser(width) + 1)]

  def kernel(scores_ref, top_ref, total_ref, due_ref, *refs):
    weight_ref = None if weight is None else refs[0]
    out_refs = refs[0 if weight is None else 1 :]
    number, b = pl.program_id(0), pl.program_id(1)
    column = lax.broadcasted_iota(jnp.int32, (lead,), 0)

    def block(ref, head, first, size, other):
      """[size lead] of a head."""
      place = first + lax.broadcasted_iota(jnp.int32, (size, lead), 0)
      real = (place < ref.shape[2]) & (column < group)[None]
      return plgpu.load(
        ref.at[b, head, pl.ds(first, size), pl.ds(0, lead)],
        mask=real,
        other=other,
      )

    def log_sum(head):
      """The log-sum-exp [lead] of a head's candidates."""

      def step(i, carry):
        top, total = carry
        tops = block(top_ref, head, i * some, some, -jnp.inf)
        sums = block(total_ref, head, i * some, some, 0.0)
        new = jnp.maximum(top, jnp.max(tops, axis=0))
        sums = jnp.sum(sums * jnp.exp(tops - new[None]), axis=0)
        return new, total * jnp.exp(top - new) + sums

      none = jnp.full((lead,), _LOWEST, jnp.float32), jnp.zeros((lead,))
      top, total = lax.fori_loop(0, pl.cdiv(parts, some), step, none)
      return top + jnp.log(total)

    def of_head(head, found):
      scores = block(scores_ref, head, number * tile, tile, -jnp.inf)
      part = scores
      if kind == 'soft':
        part = jnp.exp(jnp.minimum(scores - log_sum(head)[None], 0.0))
        part = jnp.where(scores == -jnp.inf, -jnp.inf, part)
      if weight_ref is not None:
        at = head * group + jnp.minimum(column, group - 1)
        part *= plgpu.load(weight_ref.at[b, at])[None]
      part = jnp.where((column < group)[None], part, 0.0)
      return found + jnp.sum(part, axis=1)

    @pl.when(due_ref[b])
    def _():
      found = lax.fori_loop(0, kv, of_head, jnp.zeros((tile,), jnp.float32))
      # A weight of 0 makes no number of -inf.
      found = jnp.where(found > -jnp.inf, found, -jnp.inf)
      for level, out_ref in enumerate(out_refs):
        if level:
          found = jnp.max(found.reshape(-1, GROUP), axis=1)
        size = tile // GROUP**level
        place = number * size + lax.broadcasted_iota(jnp.int32, (size,), 0)
        real = place < widths[level]
        at = jnp.where(real, place, widths[level])
        _store(out_ref, (b,), (at,), found, real)

  operands = [*logits, due] + ([] if weight is None else [weight])
  return pl.pallas_call(
    kernel,
    out_shape=[jax.ShapeDtypeStruct((batch, n), jnp.float32) for n in widths],
    grid=(pl.cdiv(width, tile), batch),
    compiler_params=plgpu.CompilerParams(num_warps=8),
    interpret=interpret,
    name='selection_votes',
  )(*operands)


def _store(ref, fixed, at, value, mask):
  """Stores value at ref[*fixed, *at] where `mask`; at points away elsewhere.

  (An interpreted store writes back what a place holds that it leaves out.)
  """
  plgpu.store(ref.at[(*fixed, *at)], value, mask=mask)
