"""selected_token on Hopper: Pallas Mosaic GPU.

A program attends the queries of one kv head over one split of its page list:
one warpgroup that keeps a ring of TMA copies in flight ahead of itself. The
queries (T * G of them) are padded to the 64 rows of a wgmma; decoding is bound
by bytes, so the padding is free. Splits are merged by XLA.

Quantised pages are spread to bfloat16 in shared memory, as codes; scales and
zeros multiply the scores and the weights, not the keys and values:
  q . k = k_scale * (q . code - k_zero * sum(q))
  sum_s p v = sum_s (p v_scale) code - sum_s p v_scale v_zero
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from kernels_pallas import dispatch, mosaic_gpu
from kernels_pallas.keys import Pages
from kernels_pallas.mosaic_gpu import LOG2E, ROW, ROWS, across, tiled
from kernels_pallas.partial import Partial, merge_axis

SPREAD4 = 128.0  # what `_spread4` adds to every code
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one number a key
UNUSED = 2**30  # a page that starts there is never visible
# Programs for each of 132 multiprocessors, and the shared memory of one (of
# 227 KiB together). Reading 16-bit pages is bound by bytes: one program with
# a deep ring reaches 2% more than two. Codes cost instructions: two programs
# hide each other's latency.
PROGRAMS = {16: 1, 8: 2, 4: 2}
MULTIPROCESSORS = 132
SHARED_BYTES = 224 * 1024
# Lists longer than this many tiles a split are cut at their used length, which
# costs a small launch; shorter ones are cut at their width.
LONG_SPLIT = 8


@dataclasses.dataclass(frozen=True)
class DecodeSizes:
  """Static choices of the decode kernel.

  Attributes:
    stages: tiles of keys and values in flight a program; 0: as many as leave
      room for a second program on the multiprocessor.
    splits: programs a (row, kv head); 0: as many as fill the chip.
    keys: of a tile, 64 or 128: a page of that size, several smaller ones, or a
      part of a larger one; 0: 128 for long lists of 16-bit pages, which are
      read faster so, else 64.
  """

  stages: int = 0
  splits: int = 0
  keys: int = 0


GATHERED = 128  # tokens of a page that `attend_tokens` gathers: whole tiles
# What a tile brings along: with the keys, and with the values.
K_PARTS = {'k', 'k_scale', 'k_zero', 'position'}
V_PARTS = {'v', 'v_scale', 'v_zero'}


def refuse(function: str, q, pages: Pages, *_, **__) -> str | None:
  """Why this implementation cannot serve; None if it can."""
  if pages.bits == 32:
    return f'{pages.k.dtype=} is no 16-bit, 8-bit or 4-bit number'
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f'{q.dtype=} is neither bfloat16 nor float16'
  if pages.bits == 16 and pages.k.dtype != q.dtype:
    return f'{pages.k.dtype=} differs from {q.dtype=}'
  if pages.head_dim not in (64, 128, 256):
    return f'head dim {pages.head_dim} is not one of 64, 128, 256'
  if pages.bits == 4 and q.dtype != jnp.bfloat16:
    return f'int4 pages with {q.dtype=}'
  if pages.bits == 4 and pages.head_dim == 64:
    return 'int4 pages of head dim 64: rows of 32 bytes'
  sizes = (16, 32, 64, 128, 256)
  if pages.bits < 16:
    sizes = sizes[1:]  # 16 scales are 64 bytes: TMA aligns to 128
  if function == 'attend_pages' and pages.page not in sizes:
    return f'{pages.page=} is not one of {sizes}'
  return None


def attend_pages(
  q: Float[Array, 'B T N H'],
  pages: Pages,
  ids: Int32[Array, 'B K W'],
  starts: Int32[Array, 'B K W'],
  *,
  q_positions: Int32[Array, 'B T'],
  sink: Int32[Array, 'K'] | None = None,
  window: Int32[Array, 'K'] | None = None,
  scale: float,
  block_sizes: dict[str, int] | None = None,
) -> Partial:
  """`kernels_pallas.selected_token.attend_pages` on a Hopper GPU.

  Raises:
    NotImplementedError: with the reason, where the kernel does not apply.
  """
  if reason := refuse('attend_pages', q, pages):
    raise NotImplementedError(reason)
  kind = jax.devices()[0].device_kind
  tuned = dispatch.tuned('attend_pages', kind, f'bits{pages.bits}')
  return _attend(
    q,
    pages,
    ids,
    starts,
    None,
    q_positions,
    sink,
    window,
    scale,
    dataclasses.replace(DecodeSizes(), **{**tuned, **(block_sizes or {})}),
  )


def attend_tokens(
  q: Float[Array, 'B T N H'],
  pages: Pages,
  rows: Int32[Array, 'B K W'],
  positions: Int32[Array, 'B K W'],
  *,
  q_positions: Int32[Array, 'B T'],
  sink: Int32[Array, 'K'] | None = None,
  window: Int32[Array, 'K'] | None = None,
  scale: float,
  block_sizes: dict[str, int] | None = None,
) -> Partial:
  """`kernels_pallas.selected_token.attend_tokens` on a Hopper GPU.

  XLA gathers the tokens into pages of their own; the kernel attends those,
  with a position for each key.

  Raises:
    NotImplementedError: with the reason, where the kernel does not apply.
  """
  if reason := refuse('attend_tokens', q, pages):
    raise NotImplementedError(reason)
  b, kv, _ = rows.shape
  rows = mosaic_gpu.pad_to(rows + 1, 2, GATHERED) - 1
  positions = mosaic_gpu.pad_to(positions, 2, GATHERED)
  positions = jnp.where(rows < 0, UNUSED, positions)
  rows = jnp.maximum(rows, 0)

  def gather(x):
    if x is None:
      return None
    flat = x.reshape(-1, *x.shape[2:])
    return flat[rows].reshape(-1, GATHERED, *x.shape[2:])

  ids = jnp.arange(rows.size // GATHERED, dtype=jnp.int32).reshape(b, kv, -1)
  return _attend(
    q,
    jax.tree.map(gather, pages),
    ids,
    jnp.zeros_like(ids),
    positions.reshape(-1, GATHERED),
    q_positions,
    sink,
    window,
    scale,
    dataclasses.replace(DecodeSizes(), **(block_sizes or {})),
  )


def _attend(
  q, pages, ids, starts, positions, q_positions, sink, window, scale, sizes
):
  """Splits the lists over programs and merges what they return."""
  b, t, n, h = q.shape
  kv = ids.shape[1]
  group = n // kv
  # Rows: the queries of one kv head, padded to whole wgmmas.
  rows = q.reshape(b, t, kv, group, h).transpose(0, 2, 1, 3, 4)
  rows = rows.reshape(b, kv, t * group, h)
  if t * group > 8:  # TMA takes fewer than 8 rows, or whole groups of 8
    rows = mosaic_gpu.pad_to(rows, 2, 8)
  blocks = -(-t * group // ROWS)
  programs = MULTIPROCESSORS * PROGRAMS[pages.bits]
  splits = sizes.splits or max(1, programs // (b * kv * blocks))
  keys = sizes.keys
  if not keys:
    length = ids.shape[2] * pages.page
    deep = pages.bits == 16 and h <= 128 and length > 128 * splits * LONG_SPLIT
    keys = 128 if deep else 64
  # The list, padded to whole tiles of pages to skip.
  ids = mosaic_gpu.pad_to(ids + 1, 2, max(keys // pages.page, 1)) - 1
  starts = mosaic_gpu.pad_to(starts, 2, max(keys // pages.page, 1))
  tiles = ids.shape[2] * pages.page // keys
  if sink is not None and not sizes.splits and tiles > splits * LONG_SPLIT:
    # The programs of streaming heads end at once: with twice as many, those of
    # the other heads still fill the chip.
    splits *= 2
  splits = min(splits, tiles)
  used = None
  if tiles > splits * LONG_SPLIT:
    place = jnp.arange(1, ids.shape[2] + 1, dtype=jnp.int32)
    used = jnp.max(jnp.where(ids >= 0, place, 0), axis=-1)
  if pages.bits == 4:
    # Step i of `_spread4` takes the channels i and i + 4 of every 8.
    rows = rows.reshape(b, kv, -1, h // 8, 2, 4)
    rows = rows.transpose(0, 1, 2, 5, 3, 4).reshape(b, kv, -1, h)
  out, lse = _decode(
    rows,
    pages,
    ids,
    starts,
    used,
    positions,
    q_positions,
    sink,
    window,
    group=group,
    scale=scale,
    splits=splits,
    keys=keys,
    stages=sizes.stages or _default_stages(h, pages, keys),
  )
  part = _merge_splits(out, lse)
  out, lse = part.out[:, :, : t * group], part.lse[:, :, : t * group]
  if pages.bits == 4:
    out = out.reshape(b, kv, -1, 4, h // 8, 2).transpose(0, 1, 2, 4, 5, 3)
  out = out.reshape(b, kv, t, group, h).transpose(0, 2, 1, 3, 4)
  lse = lse.reshape(b, kv, t, group).transpose(0, 2, 1, 3)
  return Partial(out.reshape(b, t, n, h), lse.reshape(b, t, n))


def _merge_splits(out, lse) -> Partial:
  """The exact merge over axis 2, as one loop over elements.

  Written as sums of slices: XLA turns a reduction over so few elements into
  three kernels, which cost as much as the attention of a short list.
  """
  if out.shape[2] > 32:
    return merge_axis(Partial(out, lse), axis=2)
  parts = [lse[:, :, i] for i in range(out.shape[2])]
  top = functools.reduce(jnp.maximum, parts)
  top = jnp.where(jnp.isfinite(top), top, 0.0)
  weights = [jnp.exp(x - top) for x in parts]
  total = sum(weights)
  safe = jnp.where(total > 0, total, 1.0)
  merged = sum(w[..., None] * out[:, :, i] for i, w in enumerate(weights))
  return Partial(merged / safe[..., None], jnp.log(total) + top)


def _default_stages(h: int, pages: Pages, keys: int) -> int:
  spread = 0 if pages.bits == 16 else 2 * keys
  scales = {16: 0, 8: 8, 4: 16}[pages.bits] * keys
  fixed = 2 * h * (ROWS + spread)
  stage = keys * h * pages.bits // 4 + scales
  room = SHARED_BYTES // PROGRAMS[pages.bits] - fixed
  return max(2, min(8, room // stage))


def _spread4(words, which, slot):
  """Turns a tile of 4-bit codes into bfloat16 numbers 128 + code.

  0x4300 | code is that number: its unit is the lowest bit of the mantissa.
  """
  _, ring, spread = words
  word = ring['kv'[which]].at[slot][...]
  width = word.shape[1]
  for i in range(4):
    nibbles = lax.shift_right_logical(word, jnp.int32(4 * i))
    spread[which][:, i * width : (i + 1) * width] = lax.bitwise_or(
      lax.bitwise_and(nibbles, jnp.int32(0x000F000F)), jnp.int32(0x43004300)
    )


def _decode(
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
  stages,
):
  """Partials of every split.

  Args:
    rows: [B K R H] queries, T * G padded to whole groups of 8.
    pages: the pool.
    ids: int32 [B K W], W * page a multiple of `keys`; -1: skipped.
    starts: int32 [B K W].
    used: int32 [B K] entries of each list, or None: all.
    positions: int32 [P page] of single tokens, or None: starts + slot.
    q_positions: int32 [B T].
    sink: int32 [K] or None.
    window: int32 [K] or None.
    group: query heads a kv head.
    scale: of the scores.
    splits: programs a (row, kv head).
    keys: of a tile.
    stages: tiles in flight.

  Returns:
    out [B K splits Rp H] float32, lse [B K splits Rp] float32, Rp >= R.
  """
  b, kv, r, h = rows.shape
  dtype = rows.dtype
  blocks = -(-r // ROWS)
  kept = min(r, ROWS)  # rows written
  factor = scale * LOG2E
  bits = pages.bits
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
  operands = {name: x for name, x in operands.items() if x is not None}

  def kernel(*refs):
    given = dict(zip([*operands, *pool], refs))
    out_ref, lse_ref, barriers, memory = refs[-4:]
    (q_smem, ring, spread), words, (out_smem, lse_smem) = memory
    b_at = lax.axis_index('batch')
    head = lax.div(lax.axis_index('heads'), jnp.int32(blocks))
    block = lax.rem(lax.axis_index('heads'), jnp.int32(blocks))
    split = lax.axis_index('splits')
    q_full, k_full, v_full = barriers

    n_used = jnp.int32(ids.shape[2] * page // keys)
    if used is not None:
      # In whole tiles.
      tokens = given['used'][b_at, head] * page
      n_used = lax.div(tokens + (keys - 1), jnp.int32(keys))
    begin = lax.div(split * n_used, jnp.int32(splits))
    end = lax.div((split + 1) * n_used, jnp.int32(splits))
    count = end - begin

    def pages_of(tile, name):
      """The list's entries of one tile."""
      ref = given[name]
      if cut > 1:
        return [ref[b_at, head, lax.div(tile, jnp.int32(cut))]]
      return [ref[b_at, head, tile * joined + i] for i in range(joined)]

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
        ids_now = pages_of(begin + s, 'ids')
        copy(begin + s, ids_now, s, K_PARTS, k_full)
        copy(begin + s, ids_now, s, V_PARTS, v_full)

    plgpu.copy_gmem_to_smem(
      given['q'].at[b_at, head, pl.ds(block * ROWS, ROWS)], q_smem, q_full
    )
    # Position of each row's query; rows past the last are dropped in the end.
    row = block * ROWS + plgpu.broadcasted_iota(
      jnp.int32, (ROWS,), 0, layout=ROW
    )
    # From the rows' numbers even for one query: on a constant the compiler's
    # search for layouts takes minutes.
    p_row = row
    for i in range(queries):
      p_row = jnp.where(row >= i * group, given['at'][b_at, i], p_row)
    if sink is not None:
      sink_now, window_now = given['sink'][head], given['window'][head]
    plgpu.barrier_wait(q_full)
    if bits == 4:
      q_sum = plgpu.load(q_smem, layout=plgpu.Layout.WGMMA)
      q_sum = q_sum.astype(jnp.float32).sum(axis=1)

    def along(columns):
      return lax.broadcast_in_dim(columns, (ROWS, keys), (1,))

    def mask(scores, starts_now, offset, slot):
      column = plgpu.broadcasted_iota(
        jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA
      )
      if positions is not None:
        s = along(plgpu.load(ring['position'].at[slot], layout=COLUMN))
      else:
        s = starts_now[0] + offset + column
        for i in range(1, joined):
          start = starts_now[i] - i * span
          s = jnp.where(column >= i * span, start + column, s)
      p = across(p_row, s.shape)
      seen = s <= p
      if sink is not None:
        seen &= (s < sink_now) | (s > p - window_now)
      return jnp.where(seen, scores, -jnp.inf)

    def step(e, carry):
      acc, top, total, offsets = carry
      tile = begin + e
      slot = lax.rem(e, jnp.int32(stages))
      # Scalars first: their latency hides behind the wait for the keys.
      entries = zip(pages_of(tile, 'ids'), pages_of(tile, 'starts'))
      starts_now = [jnp.where(i < 0, UNUSED, start) for i, start in entries]
      ahead = jnp.minimum(e + stages, count - 1)
      ids_next = pages_of(begin + ahead, 'ids')
      offset = lax.rem(tile, jnp.int32(cut)) * keys if cut > 1 else 0

      def refill(names, barrier):
        @pl.when(e + stages < count)
        def _():
          copy(begin + ahead, ids_next, slot, names, barrier)

      def matrix(which):
        """Keys (0) or values (1) of the tile, ready for a wgmma."""
        if bits == 16:
          return ring['kv'[which]].at[slot]
        if bits == 8:
          codes = plgpu.load(
            ring['kv'[which]].at[slot], layout=plgpu.Layout.WGMMA_UPCAST_2X
          )
          spread[which][...] = codes.astype(dtype)
        else:
          _spread4(words, which, slot)
        plgpu.commit_smem()
        return spread[which]

      plgpu.barrier_wait(k_full.at[slot])
      key_tile = matrix(0)

      def compute_scores(s_ref):
        plgpu.wgmma(s_ref, q_smem, key_tile.transpose((1, 0)))
        return s_ref[...]

      scores = pl.run_scoped(
        compute_scores, plgpu.ACC((ROWS, keys), jnp.float32)
      )
      if bits < 16:
        k_scale = along(plgpu.load(ring['k_scale'].at[slot], layout=COLUMN))
        if bits == 4:
          k_zero = along(plgpu.load(ring['k_zero'].at[slot], layout=COLUMN))
          scores -= (k_zero + SPREAD4) * across(q_sum, scores.shape)
        scores *= k_scale
      scores = mask(scores, starts_now, offset, slot)
      refill(K_PARTS, k_full)
      p, top, total, decay = mosaic_gpu.softmax_step(
        scores, top, total, factor, True
      )
      acc *= across(decay, acc.shape)
      plgpu.barrier_wait(v_full.at[slot])
      values = matrix(1)
      if bits < 16:
        p *= along(plgpu.load(ring['v_scale'].at[slot], layout=COLUMN))
      weights = p.astype(dtype)
      if bits == 4:
        # The rounded weights, so that the zeros cancel exactly what the codes'
        # offsets entered. (A split in float32 would be cheaper, but contracts
        # to the unrounded weights.)
        v_zero = along(plgpu.load(ring['v_zero'].at[slot], layout=COLUMN))
        moved = weights.astype(jnp.float32) * (v_zero + SPREAD4)
        offsets = offsets * decay + moved.sum(axis=1)

      def add_values(acc_ref):
        plgpu.wgmma(acc_ref, weights, values)

      acc = pl.run_state(add_values)(plgpu.ACC.init(acc))
      refill(V_PARTS, v_full)
      return acc, top, total, offsets

    acc = plgpu.layout_cast(
      jnp.zeros((ROWS, h), jnp.float32), plgpu.Layout.WGMMA
    )
    top = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
    total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
    acc, top, total, offsets = lax.fori_loop(
      0, count, step, (acc, top, total, total)
    )
    if bits == 4:
      acc -= across(offsets, acc.shape)

    seen = total > 0.0
    safe = jnp.where(seen, total, 1.0)
    out_smem[...] = acc * across(1.0 / safe, acc.shape)
    lse_smem[...] = jnp.where(
      seen, (top + jnp.log2(safe)) * (1.0 / LOG2E), -jnp.inf
    )
    plgpu.commit_smem()
    first = block * ROWS
    plgpu.copy_smem_to_gmem(
      out_smem.at[pl.ds(0, kept)],
      out_ref.at[b_at, head, split, pl.ds(first, kept)],
    )
    plgpu.copy_smem_to_gmem(
      lse_smem, lse_ref.at[b_at, head, split, pl.ds(first, ROWS)]
    )
    plgpu.wait_smem_to_gmem(0)

  def stage(x, as_words=False):
    if x.ndim == 2:
      return plgpu.SMEM((stages, keys), x.dtype)
    if as_words:
      return tiled((stages, keys, x.shape[2] // 4), jnp.int32)
    return tiled((stages, keys, x.shape[2]), x.dtype)

  # Each step of `_spread4` writes one swizzled row of h / 4 bfloat16 numbers.
  swizzle = h // 2 if bits == 4 else 128
  width = (blocks - 1) * ROWS + kept
  k_full, v_full = (
    plgpu.Barrier(
      num_arrivals=joined * len(parts & pool.keys()), num_barriers=stages
    )
    for parts in (K_PARTS, V_PARTS)
  )
  out, lse = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((b, kv, splits, width, h), jnp.float32),
      jax.ShapeDtypeStruct((b, kv, splits, blocks * ROWS), jnp.float32),
    ),
    scratch_types=[
      (plgpu.Barrier(), k_full, v_full),
      # The output takes the place of the queries and the ring.
      plgpu.RefUnion(
        (
          tiled((ROWS, h), dtype, swizzle),
          {name: stage(x) for name, x in pool.items()},
          () if bits == 16 else (tiled((keys, h), dtype, swizzle),) * 2,
        ),
        # int4 pages and their spread codes, as words.
        ()
        if bits != 4
        else (
          tiled((ROWS, h), dtype, swizzle),
          {name: stage(x, as_words=True) for name, x in pool.items()},
          (tiled((keys, h // 2), jnp.int32, swizzle),) * 2,
        ),
        (
          plgpu.SMEM((ROWS, h), jnp.float32),
          plgpu.SMEM((ROWS,), jnp.float32),
        ),
      ),
    ],
    grid=(b, splits, kv * blocks),
    grid_names=('batch', 'splits', 'heads'),
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(*operands.values(), *pool.values())
  return out, lse[..., :width]
