"""The plain XLA inner loops of the prompt families: online softmax over tiles.

Two walks. `attend_intervals`: every head sees one interval of keys per row
(dense causal, sliding window, passing blocks); all heads go together and keys
are sliced, never copied block by block. `attend_lists`: heads differ; tiles
(one head, one query block) are sorted by their number of visits and walked in
batches of lanes, so that work is proportional to the lists although XLA has no
ragged loop. Trip counts are data: work follows them, memory never holds T x S.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from kernels_pallas import tiles
from kernels_pallas.partial import Partial

_NEG = -1e30  # finite: the difference of two masked scores is 0, not NaN


def dot(spec: str, x, y):
  """Einsum with a float32 result; float32 operands are not rounded."""
  exact = x.dtype == jnp.float32
  return jnp.einsum(
    spec,
    x,
    y,
    preferred_element_type=jnp.float32,
    precision=lax.Precision.HIGHEST if exact else None,
  )


def step(carry, scores, v, mask, spec: str):
  """One online softmax update; scores [... rows keys] float32."""
  top, total, acc = carry
  if mask is not None:
    scores = jnp.where(mask, scores, _NEG)
  new = jnp.maximum(top, jnp.max(scores, axis=-1))
  weights = jnp.exp(scores - new[..., None])
  if mask is not None:
    weights = jnp.where(mask, weights, 0.0)
  fade = jnp.exp(top - new)
  total = total * fade + jnp.sum(weights, axis=-1)
  acc = acc * fade[..., None] + dot(spec, weights.astype(v.dtype), v)
  return new, total, acc


def finish(carry, dtype) -> Partial:
  """(top, total, acc) of the last `step` as a Partial; empty rows too."""
  top, total, acc = carry
  some = total > 0
  safe = jnp.where(some, total, 1.0)
  out = jnp.where(some[..., None], acc / safe[..., None], 0.0)
  lse = jnp.where(some, top + jnp.log(safe), -jnp.inf)
  return Partial(out.astype(dtype), lse)


def begin(rows: tuple[int, ...], head_dim: int):
  """The carry of `step` before any key: [*rows], [*rows], [*rows H]."""
  return (
    jnp.full(rows, _NEG, jnp.float32),
    jnp.zeros(rows, jnp.float32),
    jnp.zeros((*rows, head_dim), jnp.float32),
  )


def attend_intervals(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B K S H'],
  v: Float[Array, 'B K S H'],
  first: Int32[Array, 'B T'],
  stop: Int32[Array, 'B T'],
  *,
  scale: float,
  tile: int = 256,
  chunk: int = 512,
) -> Partial:
  """Row t of every head sees keys first[t] <= s < stop[t].

  FLOPs: 4 N H times the pairs in the visited (tile, chunk) rectangles.
  Temporary bytes: 8 N tile chunk.
  """
  b, t, n, h = q.shape
  kv, s = k.shape[1], k.shape[2]
  tile, chunk = min(tile, t), min(chunk, s)
  n_tiles = tiles.ceil_div(t, tile)
  pad = n_tiles * tile - t
  qs = (q * jnp.asarray(scale, jnp.float32)).astype(q.dtype)
  qs = jnp.pad(qs, ((0, 0), (0, pad), (0, 0), (0, 0)))
  qs = qs.reshape(b, n_tiles, tile, kv, n // kv, h)
  # Tiles lead, rows of one kv head lie together: [B*Tb K G*tile H].
  qs = qs.transpose(0, 1, 3, 4, 2, 5).reshape(-1, kv, n // kv * tile, h)
  firsts = tiles.by_tile(first, tile, 0).reshape(-1, tile)
  stops = tiles.by_tile(stop, tile, 0).reshape(-1, tile)
  row = jnp.repeat(jnp.arange(b), n_tiles)

  def one(args):
    q, first, stop, row = args
    seen = first < stop
    low = jnp.min(jnp.where(seen, first, tiles.BIG))
    high = jnp.max(jnp.where(seen, stop, 0))
    # Chunks below `clear` lie inside every row's interval.
    clear_low = jnp.max(jnp.where(seen, first, 0))
    clear_high = jnp.min(jnp.where(seen, stop, tiles.BIG))
    low = jnp.maximum(low, 0)
    count = jnp.maximum(tiles.ceil_div(high - low, chunk), 0)
    head = jnp.clip(tiles.ceil_div(clear_low - low, chunk), 0, count)
    body = jnp.clip((clear_high - low) // chunk, head, count)

    def visit(masked):
      def f(j, carry):
        # The last chunk is moved back so that it ends at S; keys that an
        # earlier chunk had are masked by `fresh`.
        fresh = low + j * chunk
        start = jnp.minimum(fresh, s - chunk)
        at = (row, 0, start, 0)
        kc = lax.dynamic_slice(k, at, (1, kv, chunk, h))[0]
        vc = lax.dynamic_slice(v, at, (1, kv, chunk, h))[0]
        scores = dot('kqh,ksh->kqs', q, kc)
        if not masked:
          return step(carry, scores, vc, None, 'kqs,ksh->kqh')
        key = start + jnp.arange(chunk)
        mask = (key >= jnp.maximum(first, fresh)[:, None]) & (
          key < stop[:, None]
        )
        shape = (kv, n // kv, tile, chunk)
        mask = jnp.broadcast_to(mask, shape).reshape(kv, -1, chunk)
        return step(carry, scores, vc, mask, 'kqs,ksh->kqh')

      return f

    carry = begin((kv, n // kv * tile), h)
    carry = lax.fori_loop(0, head, visit(True), carry)
    carry = lax.fori_loop(head, body, visit(False), carry)
    carry = lax.fori_loop(body, count, visit(True), carry)
    out, lse = finish(carry, q.dtype)
    # A row that sees nothing took part in the unmasked chunks.
    seen = jnp.tile(seen, n // kv)
    return Partial(
      jnp.where(seen[:, None], out, 0), jnp.where(seen, lse, -jnp.inf)
    )

  out, lse = lax.map(one, (qs, firsts, stops, row))
  out = out.reshape(b, n_tiles, kv, n // kv, tile, h)
  out = out.transpose(0, 1, 4, 2, 3, 5).reshape(b, -1, n, h)[:, :t]
  lse = lse.reshape(b, n_tiles, n, tile).transpose(0, 1, 3, 2)
  return Partial(out, lse.reshape(b, -1, n)[:, :t])


def attend_lists(
  q: Float[Array, 'B T N H'],
  fetch: Callable,
  kv_heads: int,
  first: Int32[Array, 'B T'],
  stop: Int32[Array, 'B T'],
  blocks,
  *,
  scale: float,
  sliding_window: int | None,
  lanes: int,
  chunk: int,
) -> Partial:
  """Each tile (b, head, query block) visits the blocks of its own plan.

  FLOPs: 4 H block_q block_k times the visits, each tile's visits rounded up to
  `chunk` and to the longest tile of its batch of `lanes` (tiles are sorted).

  Args:
    q: queries.
    fetch: (b [lanes], kv head [lanes], block [lanes chunk]) -> k, v, each
      [lanes chunk*block_k H]; block ids are in range.
    kv_heads: K.
    first: [B T], see `kernels_pallas.tiles`.
    stop: [B T].
    blocks: a BlockList.
    scale: of the scores.
    sliding_window: the layer's own window.
    lanes: tiles that go together.
    chunk: blocks that a visit takes at once.
  """
  b, t, n, h = q.shape
  bq, bk = blocks.block_q, blocks.block_k
  width = blocks.ids.shape[-1]
  plan = tiles.plan(
    first,
    stop,
    blocks.ids,
    blocks.count,
    blocks.sink,
    blocks.window,
    block_q=bq,
    block_k=bk,
    sliding_window=sliding_window,
  )
  tb = plan.total.shape[2]
  n_tiles = b * n * tb
  lanes = min(lanes, n_tiles)
  order = jnp.argsort(plan.total.reshape(-1))
  # Short batches are filled with tile 0 again; the scatter writes it twice
  # with the same values.
  order = jnp.pad(order, (-n_tiles % lanes, 0), constant_values=0)
  order = order.reshape(-1, lanes)
  qs = (q * jnp.asarray(scale, jnp.float32)).astype(q.dtype)
  qs = jnp.pad(qs, ((0, 0), (0, tb * bq - t), (0, 0), (0, 0)))
  qs = qs.reshape(b, tb, bq, n, h).transpose(0, 3, 1, 2, 4)
  qs = qs.reshape(n_tiles, bq, h)
  firsts = tiles.by_tile(first, bq, 0)
  stops = tiles.by_tile(stop, bq, 0)
  ids = blocks.ids.reshape(n_tiles, width)
  counts = blocks.count.reshape(n_tiles)
  flat = tiles.Plan(*(x.reshape(n_tiles) for x in plan))

  def batch(tile):
    row, head, i = tile // (n * tb), tile // tb % n, tile % tb
    p = tiles.Plan(*(x[tile] for x in flat))
    q = qs[tile]
    first = firsts[row, i][:, :, None]  # [lanes bq 1]
    stop = stops[row, i][:, :, None]
    sink = blocks.sink[head][:, None, None]
    window = blocks.window[head][:, None, None]
    listed_ids, listed_count = ids[tile], counts[tile]

    def visit(j, carry):
      slot = j * chunk + jnp.arange(chunk)[None]  # [1 chunk]
      sinks, listed_end = p.sinks[:, None], (p.sinks + p.middle)[:, None]
      block = jnp.where(
        slot < sinks,
        p.skip[:, None] + slot,
        p.lead[:, None] + slot - listed_end,
      )
      is_listed = jnp.zeros(block.shape, bool)
      if width:
        middle = (slot >= sinks) & (slot < listed_end)
        at = jnp.clip(p.cursor[:, None] + slot - sinks, 0, width - 1)
        chosen = jnp.take_along_axis(listed_ids, at, axis=1)
        block = jnp.where(middle, chosen, block)
        used = jnp.arange(width) < listed_count[:, None]
        member = (block[..., None] == listed_ids[:, None]) & used[:, None]
        is_listed = middle | jnp.any(member, axis=-1)
      live = slot < p.total[:, None]
      block = jnp.where(live, block, 0)
      k, v = fetch(row, head // (n // kv_heads), block)
      key = (block[..., None] * bk + jnp.arange(bk)).reshape(lanes, 1, -1)
      live = jnp.repeat(live, bk, axis=1)[:, None]
      is_listed = jnp.repeat(is_listed, bk, axis=1)[:, None]
      mask = (key < stop) & live
      mask &= (key < sink) | (key >= first - window) | is_listed
      if sliding_window is not None:
        mask &= key >= first - sliding_window
      return step(carry, dot('lqh,lsh->lqs', q, k), v, mask, 'lqs,lsh->lqh')

    steps = tiles.ceil_div(jnp.max(p.total), chunk)
    carry = lax.fori_loop(0, steps, visit, begin((lanes, bq), h))
    return finish(carry, q.dtype)

  out, lse = lax.map(batch, order)
  where = order.reshape(-1)
  out = (
    jnp.zeros((n_tiles, bq, h), q.dtype).at[where].set(out.reshape(-1, bq, h))
  )
  lse = jnp.zeros((n_tiles, bq), jnp.float32).at[where].set(lse.reshape(-1, bq))
  out = out.reshape(b, n, tb * bq, h)[:, :, :t].transpose(0, 2, 1, 3)
  lse = lse.reshape(b, n, tb * bq)[:, :, :t].transpose(0, 2, 1)
  return Partial(out, lse)


def default_lanes(block_q: int, keys: int) -> int:
  """Tiles a batch: cache-sized on a CPU, enough to fill a GPU elsewhere."""
  budget = 2**17 if jax.default_backend() == 'cpu' else 2**23
  return max(1, budget // (block_q * keys))
