"""Ring and Ulysses: exact attention over a prompt that is cut over devices.

Ring attention (Liu et al., arXiv:2310.01889) passes keys and values around the
mesh's `seq` axis and merges partials; Ulysses (Jacobs et al.,
arXiv:2309.14509) exchanges sequence for heads with all-to-alls; both compose
(USP, Fang and Zhao, arXiv:2405.07719): P = U x R devices, all-to-all in groups
of U neighbours, a ring of R groups.

Bytes that a device sends a layer, e bytes an element, n tokens, P = U R, K' kv
heads after copies, the least multiple of K that U divides:
  ring       (R - 1) * B * n / R * (2 K' / U * H * e + 4)
  all-to-all (U - 1) / U * B * n / P * (2 N + 2 K') * H * e
  all-gather (U - 1) * B * n / P * 8
The 4 and 8 are positions, which travel with the keys.

Layouts of the sequence over the ring, for balance under a causal mask: one run
each ('contiguous'), chunks r and 2 R - 1 - r ('zigzag'), or every R-th stripe
of 128 tokens ('striped', arXiv:2311.09431, coarsened to whole pages). In all of
them a device's keys are sorted by position, so what a query may see of any
device's keys is a prefix: one interval per row, and the kernel skips the rest.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from kernels_pallas.keys import NEVER
from kernels_pallas.partial import Partial, empty, merge
from kernels_pallas.passing_block import passing_block
from lcx import cache as caches
from lcx.methods import shards
from lcx.methods.base import (
  Context,
  Layout,
  Method,
  Prefill,
  Prompt,
  Rope,
  plain_layout,
)
from lcx.methods.dense import DenseDecode, DensePrefill, dense_trace

Order = Literal['contiguous', 'zigzag', 'striped']
STRIPE = 128  # tokens; whole pages, and whole tiles of the kernels


@dataclasses.dataclass(frozen=True)
class RingPrefill(Prefill):
  """Exact causal attention over sequence shards.

  Attributes:
    order: which tokens a device of the ring owns.
    ulysses: neighbours that exchange sequence for heads, U; 0: all of the seq
      axis (no ring); 1: none (a ring of all).
  """

  order: Order = 'zigzag'
  ulysses: int = 1

  def check(self, config, capacity: int) -> None:
    if self.order not in get_args(Order):
      raise ValueError(f'order={self.order!r} must be one of {get_args(Order)}')
    if self.ulysses < 0 or config.n_heads % max(self.ulysses, 1):
      raise ValueError(
        f'ulysses={self.ulysses} must divide n_heads={config.n_heads}'
      )

  def on(self, shards: int) -> Prefill:
    return DensePrefill() if shards == 1 else self

  def pieces(self, shards: int) -> int:
    if shards > 1:
      self._group(shards)  # refuses what does not divide
    return shards * (2 if self.order == 'zigzag' else 1)

  def layout(
    self, prompt: Prompt, question: int | None, room: int, shards: int
  ) -> Layout:
    plain = plain_layout(prompt.whole(question), room)
    order = owned(self.order, room, shards // self._group(shards))
    return Layout(*(x[order.reshape(-1)] for x in plain))

  def _group(self, shards: int) -> int:
    group = self.ulysses or shards
    if shards % group:
      raise ValueError(
        f'ulysses={group} must divide the mesh axis seq={shards}'
      )
    return group

  def attend(self, q, k, v, rope: Rope, cache, ctx: Context):
    q, rotated = rope(q, ctx.positions), rope(k, ctx.positions)
    cache = shards.store(cache, k, rotated, v, ctx)
    size = jax.lax.axis_size(ctx.axes.seq)
    group = self._group(size)
    positions = ctx.positions
    # Padding is later than every query, whatever its place in the layout.
    held = jnp.where(ctx.valid, positions, NEVER)
    q, rotated, v, positions, held = _heads_for_sequence(
      q, rotated, v, positions, held, group, ctx
    )
    part = _around_the_ring(q, rotated, v, positions, held, group, ctx)
    out = _sequence_for_heads(part.out, group, ctx).astype(q.dtype)
    return out, cache, dense_trace(out, ctx)


def owned(order: Order, room: int, ring: int) -> np.ndarray:
  """[ring room/ring] tokens that each device of the ring owns, ascending."""
  if order == 'contiguous':
    return np.arange(room).reshape(ring, -1)
  if order == 'zigzag':
    chunks = np.arange(room).reshape(2 * ring, -1)
    return np.concatenate([chunks[:ring], chunks[: ring - 1 : -1]], axis=1)
  stripes = np.arange(room).reshape(-1, ring, min(STRIPE, room // ring))
  return stripes.swapaxes(0, 1).reshape(ring, -1)


def _around_the_ring(q, k, v, positions, held, group: int, ctx: Context):
  """Partials over every group's keys in turn; R - 1 hops, overlapping.

  A hop is issued before the attention that it does not depend on.
  """
  size = jax.lax.axis_size(ctx.axes.seq)
  hops = [(i, (i + group) % size) for i in range(size)]
  k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
  total = empty(q.shape)
  for step in range(size // group):
    coming = None
    if step + 1 < size // group:
      coming = jax.lax.ppermute((k, v, held), ctx.axes.seq, hops)
    part = attend_to_prefix(q, k, v, positions, held, ctx.sliding_window)
    total = merge(total, Partial(part.out.astype(jnp.float32), part.lse))
    if coming is not None:
      k, v, held = coming
  return total


def attend_to_prefix(q, k, v, positions, held, sliding_window) -> Partial:
  """Attention over keys sorted by position, padding last.

  Args:
    q: [B T N H] rotated.
    k: [B K S H] rotated.
    v: [B K S H].
    positions: int32 [B T] of the queries.
    held: int32 [B S] of the keys, ascending; NEVER for padding.
    sliding_window: the model's own, or None.
  """

  def seen(limit: Int32[Array, 'B T']) -> Int32[Array, 'B T']:
    count = jax.vmap(lambda h, p: jnp.searchsorted(h, p, side='right'))
    return count(held, limit).astype(jnp.int32)

  stop = seen(positions)
  start = jnp.zeros_like(stop)
  if sliding_window is not None:
    start = seen(positions - sliding_window)
  return passing_block(q, k, v, start, stop)


def _heads_for_sequence(q, k, v, positions, held, group: int, ctx: Context):
  """All-to-all within a group: its whole sequence, 1 / U of the heads."""
  if group == 1:
    return q, k, v, positions, held
  if q.shape[2] % group:
    raise ValueError(
      f'ulysses={group} must divide the {q.shape[2]} query heads of a device: '
      'take a smaller one, the ring does the rest'
    )
  if k.shape[2] % group:  # fewer kv heads than devices: copies
    copies = group // np.gcd(k.shape[2], group)
    k, v = jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2)
  groups = _groups(group, ctx)

  def exchange(x):
    return jax.lax.all_to_all(
      x,
      ctx.axes.seq,
      split_axis=2,
      concat_axis=1,
      axis_index_groups=groups,
      tiled=True,
    )

  def gather(x):
    return jax.lax.all_gather(
      x, ctx.axes.seq, axis=1, axis_index_groups=groups, tiled=True
    )

  return exchange(q), exchange(k), exchange(v), gather(positions), gather(held)


def _sequence_for_heads(out, group: int, ctx: Context):
  """The inverse all-to-all, on the output."""
  if group == 1:
    return out
  return jax.lax.all_to_all(
    out,
    ctx.axes.seq,
    split_axis=1,
    concat_axis=2,
    axis_index_groups=_groups(group, ctx),
    tiled=True,
  )


def _groups(group: int, ctx: Context) -> list[list[int]]:
  size = jax.lax.axis_size(ctx.axes.seq)
  return [list(range(i, i + group)) for i in range(0, size, group)]


def _method(name: str, **fields) -> Method:
  return Method(
    name, RingPrefill(**fields), caches.CONFIGS['dense'], DenseDecode()
  )


METHODS = [
  _method('ring'),
  _method('ring_contiguous', order='contiguous'),
  _method('ring_striped', order='striped'),
  _method('ulysses', order='contiguous', ulysses=0),
]
