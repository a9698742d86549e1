"""The decode kernel of selected_token on Hopper: Pallas Mosaic GPU.

A program attends the queries of one kv head over one split of its page list:
one warpgroup that keeps a ring of TMA copies in flight ahead of itself. The 64
rows of a wgmma are keys (of the scores), then channels (of the output); the
queries, T * G of them, are its columns, of which it takes any multiple of 8. So
the softmax is of T * G numbers a key and not of 64.

Codes of quantised keys are multiplied as they are, as 8-bit integers: a query
is two of them, coarse and fine (`two_codes`), columns side by side. Codes of
values are spread to bfloat16 in shared memory. Scales and zeros multiply the
scores and the weights, not the keys and values:
  q . k = k_scale * (q . code - k_zero * sum(q))
  sum_s p v = sum_s (p v_scale) code - sum_s p v_scale v_zero
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.keys import NEVER
from kernels_pallas.mosaic_gpu import LOG2E, tiled
from kernels_pallas.selected_token.codes import (
  FINE,
  SPREAD4,
  spread4,
  spread8,
  two_codes,
)

KEY = plgpu.Layout.WGMMA.reduce(1)  # one number a key
QUERY = plgpu.Layout.WGMMA.reduce(0)  # one number a query
# What a tile brings along: with the keys, and with the values.
K_PARTS = {'k', 'k_scale', 'k_zero', 'position'}
V_PARTS = {'v', 'v_scale', 'v_zero'}


def decode(
  rows,
  pages,
  ids,
  starts,
  used,
  positions,
  q_positions,
  sink,
  window,
  *,
  group,
  scale,
  splits,
  keys,
  wide,
  stages,
):
  """Partials of every split.

  Args:
    rows: [B K R H] queries, T * G padded to whole groups of 8.
    pages: the pool.
    ids: int32 [B K W], W * page a multiple of `keys`; -1: skipped. None: the
      pool is a contiguous cache.
    starts: int32 [B K W], or [B 1 W] of a contiguous cache.
    used: int32 [B K] entries of each list, or None: all; int32 [B] tokens of a
      contiguous cache.
    positions: int32 [P page] of single tokens, or None: starts + slot.
    q_positions: int32 [B T].
    sink: int32 [K] or None.
    window: int32 [K] or None.
    group: query heads a kv head.
    scale: of the scores.
    splits: programs a (row, kv head, block of queries).
    keys: of a tile.
    wide: queries of a program, a multiple of 8.
    stages: tiles in flight.

  Returns:
    out [B K splits H Rp] float32, lse [B K splits Rp] float32, Rp >= R.
  """
  b, kv, r, h = rows.shape
  dtype = rows.dtype
  blocks = -(-r // wide)
  factor = scale * LOG2E
  bits = pages.bits
  parts = 1 if bits == 16 else 2  # columns of a query
  page = pages.page
  joined = max(keys // page, 1)  # pages of a tile
  cut = max(page // keys, 1)  # tiles of a page
  span = min(page, keys)  # keys of one copy
  pool = {x.name: getattr(pages, x.name) for x in dataclasses.fields(pages)}
  pool['position'] = positions
  pool = {name: x for name, x in pool.items() if x is not None}
  queries = q_positions.shape[1]
  operands = {'q': rows, 'ids': ids, 'starts': starts, 'at': q_positions}
  operands |= {'used': used, 'sink': sink, 'window': window}
  if bits < 16:
    codes, step, q_sum = two_codes(rows, bits, wide)
    operands |= {'q': codes, 'q_step': step, 'q_sum': q_sum}
  operands = {name: x for name, x in operands.items() if x is not None}

  def kernel(*refs):
    given = dict(zip([*operands, *pool], refs))
    out_ref, lse_ref, barriers, memory = refs[-4:]
    (q_smem, p_smem, step_smem, sum_smem, ring, spread), words, last = memory
    out_smem, lse_smem = last
    if bits == 4:
      *_, word_ring, word_spread = words
    b_at = lax.axis_index('batch')
    head = lax.div(lax.axis_index('heads'), jnp.int32(blocks))
    block = lax.rem(lax.axis_index('heads'), jnp.int32(blocks))
    split = lax.axis_index('splits')
    q_full, k_full, v_full = barriers

    tokens = jnp.int32(starts.shape[2] * page)
    if ids is None:
      tokens = given['used'][b_at]
    elif used is not None:
      tokens = given['used'][b_at, head] * page
    n_used = lax.div(tokens + (keys - 1), jnp.int32(keys))  # in whole tiles
    begin = lax.div(split * n_used, jnp.int32(splits))
    end = lax.div((split + 1) * n_used, jnp.int32(splits))
    count = end - begin

    def entries(tile):
      """The places of a tile's pages in the list."""
      if cut > 1:
        return [lax.div(tile, jnp.int32(cut))]
      return [tile * joined + i for i in range(joined)]

    def ids_of(tile):
      if ids is not None:
        return [given['ids'][b_at, head, at] for at in entries(tile)]
      # A tile's last page may be unused, and hold anything: that before it is
      # read in its place, and masked.
      last = lax.div(tokens - 1, jnp.int32(page))
      home = (b_at * kv + head) * (pages.k.shape[0] // (b * kv))
      return [home + jnp.minimum(at, last) for at in entries(tile)]

    def starts_of(tile):
      row = head if ids is not None else 0
      return [given['starts'][b_at, row, at] for at in entries(tile)]

    def copy(tile, ids_now, slot, names, barrier):
      # A skipped page is read as page 0, and masked.
      offset = lax.rem(tile, jnp.int32(cut)) * keys if cut > 1 else 0
      for i, id_now in enumerate(ids_now):
        source = (jnp.maximum(id_now, 0), pl.ds(offset, span))
        target = (slot, pl.ds(i * span, span))
        for name in names & pool.keys():
          plgpu.copy_gmem_to_smem(
            given[name].at[source],
            ring[name].at[target],
            barrier.at[slot],
          )

    for s in range(stages):

      @pl.when(s < count)
      def _(s=s):
        ids_now = ids_of(begin + s)
        copy(begin + s, ids_now, s, K_PARTS, k_full)
        copy(begin + s, ids_now, s, V_PARTS, v_full)

    mine = pl.ds(block * wide, wide)
    columns = pl.ds(block * wide * parts, wide * parts)
    plgpu.copy_gmem_to_smem(given['q'].at[b_at, head, columns], q_smem, q_full)
    for name, target in (('q_step', step_smem), ('q_sum', sum_smem)):
      if name in given:
        source = given[name].at[b_at, head, mine]
        plgpu.copy_gmem_to_smem(source, target, q_full)
    # Position of each query; those past the last are dropped in the end.
    number = block * wide + plgpu.broadcasted_iota(
      jnp.int32, (wide,), 0, layout=QUERY
    )
    # From the queries' numbers even for one: on a constant the compiler's
    # search for layouts takes minutes.
    p_query = number
    for i in range(queries):
      p_query = jnp.where(number >= i * group, given['at'][b_at, i], p_query)
    if sink is not None:
      sink_now, window_now = given['sink'][head], given['window'][head]
    plgpu.barrier_wait(q_full)
    if bits < 16:
      q_step = plgpu.load(step_smem, layout=QUERY)
    if bits == 4:
      q_sum = plgpu.load(sum_smem, layout=QUERY)

    def of_keys(x):
      return lax.broadcast_in_dim(x, (keys, wide), (0,))

    def of_queries(x, n=keys):
      return lax.broadcast_in_dim(x, (n, wide), (1,))

    def mask(scores, starts_now, offset, slot):
      row = plgpu.broadcasted_iota(
        jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA
      )
      if positions is not None:
        s = of_keys(plgpu.load(ring['position'].at[slot], layout=KEY))
      else:
        s = starts_now[0] + offset + row
        for i in range(1, joined):
          start = starts_now[i] - i * span
          s = jnp.where(row >= i * span, start + row, s)
      p = of_queries(p_query)
      seen = s <= p
      if sink is not None:
        seen &= (s < sink_now) | (s > p - window_now)
      return jnp.where(seen, scores, -jnp.inf)

    def step(e, carry):
      acc, top, total, offsets = carry
      tile = begin + e
      slot = lax.rem(e, jnp.int32(stages))
      # Scalars first: their latency hides behind the wait for the keys.
      starts_now = starts_of(tile)
      if ids is not None:
        listed = zip(ids_of(tile), starts_now)
        starts_now = [jnp.where(i < 0, NEVER, start) for i, start in listed]
      ahead = jnp.minimum(e + stages, count - 1)
      ids_next = ids_of(begin + ahead)
      offset = lax.rem(tile, jnp.int32(cut)) * keys if cut > 1 else 0

      def refill(names, barrier):
        @pl.when(e + stages < count)
        def _():
          copy(begin + ahead, ids_next, slot, names, barrier)

      plgpu.barrier_wait(k_full.at[slot])
      key_tile = ring['k'].at[slot]
      if bits == 4:
        spread8(word_ring['k'].at[slot], word_spread['k'])
        key_tile = spread['k']
        plgpu.commit_smem()

      def compute_scores(s_ref):
        plgpu.wgmma(s_ref, key_tile, q_smem.transpose((1, 0)))
        return s_ref[...]

      product = jnp.float32 if bits == 16 else jnp.int32
      scores = pl.run_scoped(
        compute_scores, plgpu.ACC((keys, wide * parts), product)
      )
      if bits < 16:
        coarse, fine = scores[:, :wide], scores[:, wide:]
        scores = coarse.astype(jnp.float32)
        scores += fine.astype(jnp.float32) * (1 / FINE)
        scores *= of_queries(q_step)
        if bits == 4:
          k_zero = of_keys(plgpu.load(ring['k_zero'].at[slot], layout=KEY))
          scores -= k_zero * of_queries(q_sum)
        scores *= of_keys(plgpu.load(ring['k_scale'].at[slot], layout=KEY))
      scores = mask(scores, starts_now, offset, slot)
      new_top = jnp.maximum(top, scores.max(axis=0) * factor)
      # Nothing seen: subtract 0, so that exp2(-inf - -inf) is no NaN.
      base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
      p = jnp.exp2(scores * factor - of_queries(base))
      decay = jnp.exp2(top - base)
      # Sums stay with the keys' rows until the end: no exchange of threads.
      total = total * of_queries(decay) + p
      acc *= of_queries(decay, h)
      plgpu.barrier_wait(v_full.at[slot])
      if bits < 16:
        p *= of_keys(plgpu.load(ring['v_scale'].at[slot], layout=KEY))
      weights = p.astype(dtype)
      if bits == 4:
        # The rounded weights, so that the zeros cancel exactly what the codes'
        # offsets entered. (A split in float32 would be cheaper, but contracts
        # to the unrounded weights.)
        v_zero = of_keys(plgpu.load(ring['v_zero'].at[slot], layout=KEY))
        moved = weights.astype(jnp.float32) * (v_zero + SPREAD4)
        offsets = offsets * of_queries(decay) + moved
      p_smem.transpose((1, 0))[...] = weights
      values = ring['v'].at[slot] if bits == 16 else spread['v']
      if bits == 8:
        codes = plgpu.load(
          ring['v'].at[slot], layout=plgpu.Layout.WGMMA_UPCAST_2X
        )
        values[...] = codes.astype(dtype)
      elif bits == 4:
        spread4(word_ring['v'].at[slot], word_spread['v'])
      plgpu.commit_smem()
      refill(K_PARTS, k_full)

      def add_values(acc_ref):
        plgpu.wgmma(acc_ref, values.transpose((1, 0)), p_smem.transpose((1, 0)))

      acc = pl.run_state(add_values)(plgpu.ACC.init(acc))
      plgpu.commit_smem()
      refill(V_PARTS, v_full)
      return acc, new_top, total, offsets

    def zeros(n):
      return plgpu.layout_cast(
        jnp.zeros((n, wide), jnp.float32), plgpu.Layout.WGMMA
      )

    top = plgpu.layout_cast(jnp.full((wide,), -jnp.inf, jnp.float32), QUERY)
    acc, top, total, offsets = lax.fori_loop(
      0, count, step, (zeros(h), top, zeros(keys), zeros(keys))
    )
    total = total.sum(axis=0)
    if bits == 4:
      acc -= of_queries(offsets.sum(axis=0), h)

    seen = total > 0.0
    safe = jnp.where(seen, total, 1.0)
    out_smem[...] = acc * of_queries(1.0 / safe, h)
    lse_smem[...] = jnp.where(
      seen, (top + jnp.log2(safe)) * (1.0 / LOG2E), -jnp.inf
    )
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out_ref.at[b_at, head, split, :, mine])
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[b_at, head, split, mine])
    plgpu.wait_smem_to_gmem(0)

  def stage(x, as_words=False):
    if x.ndim == 2:
      return plgpu.SMEM((stages, keys), x.dtype)
    if as_words:
      return tiled((stages, keys, x.shape[2] // 4), jnp.int32)
    return tiled((stages, keys, x.shape[2]), x.dtype)

  # Each step of `spread4` and `spread8` writes one swizzled row: h / 4
  # bfloat16 numbers, h / 2 integers.
  swizzle = h // 2 if bits == 4 else 128
  kind = operands['q'].dtype
  fixed = (
    tiled((wide * parts, h), kind, swizzle),
    tiled((wide, keys), dtype, swizzle),
    plgpu.SMEM((wide,), jnp.float32),
    plgpu.SMEM((wide,), jnp.float32),
  )
  # Spread in shared memory: of int8 pages values, of int4 pages both, which
  # are written as words.
  spreads = {'v': ((keys, h), dtype)} if bits < 16 else {}
  spread_words = {'v': ((keys, h // 2), jnp.int32)}
  if bits == 4:
    spreads['k'] = (keys, h), jnp.int8
    spread_words['k'] = (keys, h // 4), jnp.int32
  numbers = (
    *fixed,
    {name: stage(x) for name, x in pool.items()},
    {name: tiled(*of, swizzle) for name, of in spreads.items()},
  )
  words = (
    *fixed,
    {name: stage(x, as_words=True) for name, x in pool.items()},
    {name: tiled(*of, swizzle) for name, of in spread_words.items()},
  )
  last = (plgpu.SMEM((h, wide), jnp.float32), plgpu.SMEM((wide,), jnp.float32))
  width = blocks * wide
  k_full, v_full = (
    plgpu.Barrier(
      num_arrivals=joined * len(parts & pool.keys()), num_barriers=stages
    )
    for parts in (K_PARTS, V_PARTS)
  )
  out, lse = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((b, kv, splits, h, width), jnp.float32),
      jax.ShapeDtypeStruct((b, kv, splits, width), jnp.float32),
    ),
    scratch_types=[
      (plgpu.Barrier(num_arrivals={16: 1, 8: 2, 4: 3}[bits]), k_full, v_full),
      # The output takes the place of the queries and the ring.
      plgpu.RefUnion(numbers, words if bits == 4 else (), last),
    ],
    grid=(b, splits, kv * blocks),
    grid_names=('batch', 'splits', 'heads'),
    # A barrier at every store and copy is latency, which short lists are made
    # of. Those of `commit_smem` stand where a warp could run ahead of the
    # others, before what they still read is written again.
    compiler_params=plgpu.CompilerParams(
      approx_math=True, unsafe_no_auto_barriers=True
    ),
  )(*operands.values(), *pool.values())
  return out, lse
