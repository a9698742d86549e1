"""The inner loop of prompt attention on Hopper, shared by two families.

One program attends 128 query rows over a stream of key tiles, of one head or of
the heads of a group one after the other. A plan, made in XLA, names the tiles;
the kernel only follows it:

  full tiles     every row sees every key: no mask at all;
  masked tiles   row t sees key s iff  s < stop[t]  and
                 (s >= first[t] - window  or  s < sink  or  the tile is listed).

The shape of the program is FlashAttention-3's (arXiv:2407.08608): two compute
warpgroups of 64 rows share a ring of key and value tiles that a third fills
with TMA copies; the scores of tile j + 1 and the values of tile j are in the
tensor core together while the softmax runs.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.partial import Partial

LOG2E = math.log2(math.e)
ROWS = 64  # query rows a warpgroup holds: the M of one wgmma
GROUPS = 2  # compute warpgroups of a program
TILE_Q = ROWS * GROUPS
# 65536 registers over 3 warpgroups: 232 for those that compute, 40 for the
# one that only copies (both multiples of 8; 128 * (2 * 232 + 40) <= 65536).
COMPUTE_REGISTERS = 232
COPY_REGISTERS = 40
MULTIPROCESSORS = 132
WAVES = 8  # programs a multiprocessor, at least, of those that take many heads
ROW = plgpu.Layout.WGMMA.reduce(1)  # one number a query row


class Plan(NamedTuple):
  """The key tiles of one query tile, in the order in which they stream.

  Every field is int32 [B N Tq] (or [B 1 Tq]: one plan for all heads). Full
  tiles come first, as two intervals and a range of the id list; masked tiles
  after them, as three intervals. A tile stands in one of the six only.
  """

  full0: jax.Array  # first tile of the first interval of full tiles
  n_full0: jax.Array
  full1: jax.Array
  n_full1: jax.Array
  list0: jax.Array  # first position in the row of ids
  n_list: jax.Array  # tiles (not ids) to take from the list
  masked0: jax.Array
  n_masked0: jax.Array
  masked1: jax.Array
  n_masked1: jax.Array
  masked2: jax.Array
  n_masked2: jax.Array
  listed: jax.Array  # bit e: masked tile number e is listed
  sink: jax.Array  # tokens
  window: jax.Array  # tokens
  spare: jax.Array  # pads a plan to 64 bytes

  @property
  def n_full(self):
    return self.n_full0 + self.n_full1 + self.n_list

  @property
  def n_masked(self):
    return self.n_masked0 + self.n_masked1 + self.n_masked2

  def masked_tile(self, e):
    """The tile at place e among the masked ones."""
    e1 = e - self.n_masked0
    e2 = e1 - self.n_masked1
    return jnp.where(
      e1 < 0,
      self.masked0 + e,
      jnp.where(e2 < 0, self.masked1 + e1, self.masked2 + e2),
    )


@dataclasses.dataclass(frozen=True)
class StreamSizes:
  """Static choices of the stream kernel.

  Attributes:
    tile_k: keys of a tile. 128 for head dims to 128; 64 for 256, whose
      accumulator takes 128 registers a thread.
    stages: tiles in the ring.
    overlap: whether the values of a tile run beside the softmax of the next.
  """

  tile_k: int = 128
  stages: int = 2
  overlap: bool = True


def unsupported(q, k) -> str | None:
  """Why the stream kernel cannot take these arrays; None if it can."""
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f'{q.dtype=} is neither bfloat16 nor float16'
  if k.dtype != q.dtype:
    return f'{k.dtype=} differs from {q.dtype=}'
  if q.shape[-1] not in (64, 128, 256):
    return f'head dim {q.shape[-1]} is not one of 64, 128, 256'
  return None


def tiled(shape, dtype, swizzle=128):
  """SMEM of 2-D tiles in the layout that wgmma and TMA share."""
  size = jnp.dtype(dtype).itemsize
  swizzle = min(swizzle, shape[-1] * size)  # bytes
  return plgpu.SMEM(
    shape,
    dtype,
    transforms=(
      plgpu.TilingTransform((8, swizzle // size)),
      plgpu.SwizzleTransform(swizzle),
    ),
  )


def pad_to(x, axis: int, multiple: int):
  """Zeros at the end of an axis, up to a multiple."""
  short = -x.shape[axis] % multiple
  if not short:
    return x
  pads = [(0, 0)] * x.ndim
  pads[axis] = (0, short)
  return jnp.pad(x, pads)


def across(rows, shape):
  """Repeats one number a row along the row."""
  return lax.broadcast_in_dim(rows, shape, (0,))


def softmax_step(scores, top, total, factor, may_be_empty):
  """One online-softmax step; `top` is in units of log2.

  Args:
    scores: [rows keys] float32, unscaled; -inf where masked.
    top: [rows] running maximum times factor.
    total: [rows] running sum of exp2.
    factor: scale * log2(e).
    may_be_empty: whether a row may have seen no key at all so far.

  Returns:
    p [rows keys] float32, top, total, and decay [rows], by which everything
    accumulated before must be multiplied.
  """
  new_top = jnp.maximum(top, scores.max(axis=1) * factor)
  # Nothing seen: subtract 0, so that exp2(-inf - -inf) is no NaN.
  base = (
    jnp.where(new_top == -jnp.inf, 0.0, new_top) if may_be_empty else new_top
  )
  p = jnp.exp2(scores * factor - across(base, scores.shape))
  decay = jnp.exp2(top - base)
  return p, new_top, total * decay + p.sum(axis=1), decay


def stream_attention(q, k, v, plan, ids, first, stop, *, scale, ids_k, sizes):
  """Attention of query tiles over the key tiles that a plan names.

  Args:
    q: [B T N H] bfloat16 or float16.
    k: [B K S H].
    v: [B K S H].
    plan: fields int32 [B N Tq] or [B 1 Tq], Tq = ceil(T / TILE_Q).
    ids: int32 [B N Tl W] listed blocks of ids_k keys, or None.
    first: int32 [B Tq * TILE_Q], see the module's rule.
    stop: int32 [B Tq * TILE_Q]; 0: the row sees nothing.
    scale: of the scores.
    ids_k: keys of a listed block, a multiple of sizes.tile_k.
    sizes: StreamSizes.

  Returns:
    Partial(out [B T N H] of q.dtype, lse [B T N] float32).
  """
  t = q.shape[1]
  # TMA wants the tiled dimension in whole tiles of 8; it fills what a copy
  # reads past the end with zeros. Caches are whole pages: no copy there.
  q = pad_to(q, 1, 8)
  k, v = pad_to(k, 2, 8), pad_to(v, 2, 8)
  batch, _, n, h = q.shape
  group = n // k.shape[1]
  tiles = plan.full0.shape[2]
  tile_k, stages = sizes.tile_k, sizes.stages
  parts = ids_k // tile_k  # tiles of a listed block
  factor = scale * LOG2E
  # A program takes several heads of a group, one after the other, if enough
  # programs are left: the next one's first tiles come while one ends.
  heads = q_slots = 1
  if sizes.overlap:
    programs = batch * n * tiles
    fitting = (x for x in range(1, group + 1) if group % x == 0)
    heads = max(
      x for x in fitting if x == 1 or programs >= x * WAVES * MULTIPROCESSORS
    )
    q_slots = min(heads, 2)
  packed = jnp.stack(plan, axis=-1)
  per_head = packed.shape[1] > 1
  # List rows may stand for several query tiles.
  list_stride = 1 if ids is None else -(-tiles // ids.shape[2])

  def where():
    b = lax.axis_index('batch')
    kv_head = lax.axis_index('kv_heads')
    first = kv_head * group + lax.axis_index('group') * heads
    # Longest tiles first: a causal tile's work grows with its index.
    tile = tiles - 1 - lax.axis_index('tiles')
    return b, kv_head, first, tile

  def read_plan(plan_ref, b, head, tile):
    row = plan_ref.at[b, head if per_head else 0, tile]
    return Plan(*(row[i] for i in range(len(Plan._fields))))

  def copy_thread(refs, scratch):
    k_ref, v_ref, plan_ref, ids_ref = refs
    plgpu.set_max_registers(COPY_REGISTERS, action='decrease')
    b, kv_head, first_head, tile = where()

    def fill_of_head(i, before):
      """Streams one head's tiles; `before`: tiles of the heads before."""
      head = first_head + i
      plan = read_plan(plan_ref, b, head, tile)
      total = plan.n_full + plan.n_masked

      def tile_at(e):
        e1 = e - plan.n_full0
        e2 = e1 - plan.n_full1
        j = jnp.where(e1 < 0, plan.full0 + e, plan.full1 + e1)
        if ids is not None:
          place = plan.list0 + jnp.maximum(lax.div(e2, jnp.int32(parts)), 0)
          place = jnp.minimum(place, ids.shape[3] - 1)
          block = ids_ref[b, head, lax.div(tile, jnp.int32(list_stride)), place]
          part = lax.rem(e2, jnp.int32(parts))
          j = jnp.where(e2 < 0, j, block * parts + part)
        return jnp.where(e < plan.n_full, j, plan.masked_tile(e - plan.n_full))

      def fill(e, tile_now):
        step = before + e
        slot = lax.rem(step, jnp.int32(stages))
        keys = pl.ds(tile_now * tile_k, tile_k)
        # Read before the waits, which hide how long a listed id takes to come.
        tile_next = tile_at(jnp.minimum(e + 1, total - 1))

        @pl.when(step >= stages)
        def _():
          plgpu.barrier_wait(scratch.k_free.at[slot])

        plgpu.copy_gmem_to_smem(
          k_ref.at[b, kv_head, keys],
          scratch.k.at[slot],
          scratch.k_full.at[slot],
        )

        @pl.when(step >= stages)
        def _():
          plgpu.barrier_wait(scratch.v_free.at[slot])

        plgpu.copy_gmem_to_smem(
          v_ref.at[b, kv_head, keys],
          scratch.v.at[slot],
          scratch.v_full.at[slot],
        )
        return tile_next

      lax.fori_loop(0, total, fill, tile_at(jnp.int32(0)))
      return before + total

    lax.fori_loop(0, heads, fill_of_head, jnp.int32(0))

  def compute_thread(refs, scratch, me):
    q_ref, plan_ref, first_ref, stop_ref, out_ref, lse_ref = refs
    plgpu.set_max_registers(COMPUTE_REGISTERS, action='increase')
    b, _, first_head, tile = where()
    rows = pl.ds(tile * TILE_Q + me * ROWS, ROWS)

    def fetch_queries(i):
      slot = lax.rem(i, jnp.int32(q_slots))
      plgpu.copy_gmem_to_smem(
        q_ref.at[b, rows, first_head + i],
        scratch.q.at[slot, me],
        scratch.q_full.at[slot * GROUPS + me],
      )

    def fetch_next(i):
      """Into the place of the last head's output, which has left by now."""
      plgpu.wait_smem_to_gmem(0)
      pl.when(i + 1 < heads)(lambda: fetch_queries(i + 1))

    def load_rows(ref):
      return plgpu.load(ref.at[b, rows], layout=ROW, optimized=False)

    def attend_head(i, before):
      """Attends one head; `before`: tiles of the heads before."""
      head = first_head + i
      plan = read_plan(plan_ref, b, head, tile)
      q_slot = lax.rem(i, jnp.int32(q_slots))
      q_smem = scratch.q.at[q_slot, me]

      total_tiles = plan.n_full + plan.n_masked

      def slot_of(e):
        return lax.rem(before + e, jnp.int32(stages))

      def mask(scores, e):
        j = plan.masked_tile(e)
        s = j * tile_k + plgpu.broadcasted_iota(
          jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA
        )
        low = load_rows(first_ref) - plan.window
        high = load_rows(stop_ref)
        # A listed tile counts as sink as a whole.
        listed = lax.bitwise_and(
          lax.shift_right_logical(plan.listed, e), jnp.int32(1)
        )
        sink = jnp.where(listed == 1, (j + 1) * tile_k, plan.sink)
        # s >= low or s < sink, as one comparison a side.
        seen = (s >= across(low, s.shape)) | (s < sink)
        return jnp.where(seen & (s < across(high, s.shape)), scores, -jnp.inf)

      def await_keys(e):
        @pl.when(e < total_tiles)
        def _():
          plgpu.barrier_wait(scratch.k_full.at[slot_of(e)])

      def scores_of(e):
        def body(s_ref):
          plgpu.wgmma(s_ref, q_smem, scratch.k.at[slot_of(e)].transpose((1, 0)))
          return s_ref[...]

        plgpu.barrier_wait(scratch.k_full.at[slot_of(e)])
        out = pl.run_scoped(body, plgpu.ACC((ROWS, tile_k), jnp.float32))
        plgpu.barrier_arrive(scratch.k_free.at[slot_of(e)])
        return out

      def add_values(e, p, acc):
        def body(acc_ref):
          plgpu.wgmma(acc_ref, p, scratch.v.at[slot_of(e)])

        plgpu.barrier_wait(scratch.v_full.at[slot_of(e)])
        acc = pl.run_state(body)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(scratch.v_free.at[slot_of(e)])
        return acc

      def overlapped(e, masked, carry):
        """Scores of tile e beside the values of tile e - 1."""
        acc, top, total, p = carry

        def body(s_ref, acc_ref):
          acc_ref[...] = acc
          plgpu.wgmma(s_ref, q_smem, scratch.k.at[slot_of(e)].transpose((1, 0)))
          plgpu.barrier_wait(scratch.v_full.at[slot_of(e - 1)])
          plgpu.wgmma(acc_ref, p, scratch.v.at[slot_of(e - 1)])
          scores = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
          plgpu.barrier_arrive(scratch.k_free.at[slot_of(e)])
          if masked:
            scores = mask(scores, e - plan.n_full)
          new = softmax_step(scores, top, total, factor, masked)
          # The barrier and the branch keep the compiler from hoisting the wait
          # for the values above the softmax that should hide it.
          new = lax.optimization_barrier(new)
          await_keys(e + 1)
          new_acc = acc_ref[...]
          plgpu.barrier_arrive(scratch.v_free.at[slot_of(e - 1)])
          return new_acc, *new

        new_acc, weights, top, total, decay = pl.run_scoped(
          body,
          plgpu.ACC((ROWS, tile_k), jnp.float32),
          plgpu.ACC((ROWS, h), jnp.float32),
        )
        new_acc *= across(decay, new_acc.shape)
        return new_acc, top, total, weights.astype(q.dtype)

      def in_turn(e, masked, carry):
        """Scores, softmax, values of tile e, one after the other."""
        acc, top, total = carry
        scores = scores_of(e)
        if masked:
          scores = mask(scores, e - plan.n_full)
        weights, top, total, decay = softmax_step(
          scores, top, total, factor, masked
        )
        acc *= across(decay, acc.shape)
        acc = add_values(e, weights.astype(q.dtype), acc)
        return acc, top, total

      acc = plgpu.layout_cast(
        jnp.zeros((ROWS, h), jnp.float32), plgpu.Layout.WGMMA
      )
      top = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
      total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
      plgpu.barrier_wait(scratch.q_full.at[q_slot * GROUPS + me])
      if sizes.overlap:
        # A step that adds no values opens the pipeline: tile -1 weighs zero.
        def open_stream(carry, masked):
          acc, top, total, _ = carry
          scores = scores_of(jnp.int32(0))
          if masked:
            scores = mask(scores, jnp.int32(0))
          p, top, total, _ = softmax_step(scores, top, total, factor, masked)
          await_keys(jnp.int32(1))
          return acc, top, total, p.astype(q.dtype)

        p = plgpu.layout_cast(
          jnp.zeros((ROWS, tile_k), q.dtype), plgpu.Layout.WGMMA
        )
        carry = acc, top, total, p
        # 0 or 1 rounds: loops stand for conditionals, which carry no layouts.
        some_full = jnp.minimum(plan.n_full, 1)
        only_masked = jnp.minimum(total_tiles, 1) - some_full
        carry = lax.fori_loop(
          0, some_full, lambda _, c: open_stream(c, False), carry
        )
        carry = lax.fori_loop(
          0, only_masked, lambda _, c: open_stream(c, True), carry
        )
        fetch_next(i)
        carry = lax.fori_loop(
          1, plan.n_full, lambda e, c: overlapped(e, False, c), carry
        )
        carry = lax.fori_loop(
          jnp.maximum(plan.n_full, 1),
          total_tiles,
          lambda e, c: overlapped(e, True, c),
          carry,
        )
        acc, top, total, p = carry
        acc = lax.fori_loop(
          jnp.maximum(total_tiles, 1) - 1,
          total_tiles,
          lambda e, c: add_values(e, p, c),
          acc,
        )
      else:
        carry = lax.fori_loop(
          0, plan.n_full, lambda e, c: in_turn(e, False, c), (acc, top, total)
        )
        acc, top, total = lax.fori_loop(
          plan.n_full, total_tiles, lambda e, c: in_turn(e, True, c), carry
        )

      # A row that sees nothing: out 0, lse -inf, whatever full tiles added.
      seen = (total > 0.0) & (load_rows(stop_ref) > 0)
      inverse = jnp.where(seen, 1.0 / jnp.where(seen, total, 1.0), 0.0)
      acc = jnp.where(
        across(seen, acc.shape), acc * across(inverse, acc.shape), 0.0
      )
      q_smem[...] = acc.astype(q.dtype)
      log2_total = jnp.log2(jnp.where(seen, total, 1.0))
      scratch.lse.at[me][...] = jnp.where(
        seen, (top + log2_total) * (1.0 / LOG2E), -jnp.inf
      )
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(q_smem, out_ref.at[b, rows, head])
      plgpu.copy_smem_to_gmem(scratch.lse.at[me], lse_ref.at[b, head, rows])
      return before + total_tiles

    fetch_queries(0)
    lax.fori_loop(0, heads, attend_head, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)

  def kernel(q_ref, k_ref, v_ref, plan_ref, first_ref, stop_ref, *rest):
    ids_ref = rest[0] if ids is not None else None
    out_ref, lse_ref, scratch = rest[-3:]
    scratch = Scratch(*scratch)
    wg = lax.axis_index('wg')

    @pl.when(wg < GROUPS)
    def _():
      compute_thread(
        (q_ref, plan_ref, first_ref, stop_ref, out_ref, lse_ref), scratch, wg
      )

    @pl.when(wg == GROUPS)
    def _():
      copy_thread((k_ref, v_ref, plan_ref, ids_ref), scratch)

  operands = [q, k, v, packed, first, stop]
  if ids is not None:
    operands.append(ids)
  full, free = (
    plgpu.Barrier(num_barriers=stages),
    plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
  )
  out, lse = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      # Rows innermost and padded, for one-dimensional copies of 64.
      jax.ShapeDtypeStruct((batch, n, tiles * TILE_Q), jnp.float32),
    ),
    scratch_types=[
      Scratch(
        q=tiled((q_slots, GROUPS, ROWS, h), q.dtype),
        k=tiled((stages, tile_k, h), q.dtype),
        v=tiled((stages, tile_k, h), q.dtype),
        lse=plgpu.SMEM((GROUPS, ROWS), jnp.float32),
        q_full=plgpu.Barrier(num_barriers=q_slots * GROUPS),
        k_full=full,
        v_full=full,
        k_free=free,
        v_free=free,
      )
    ],
    # One kv head after the other: its keys and values stay in L2 while its
    # query tiles read them, each in an order of its own.
    grid=(batch, n // group, tiles, group // heads),
    grid_names=('batch', 'kv_heads', 'tiles', 'group'),
    num_threads=GROUPS + 1,
    thread_name='wg',
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(*operands)
  return Partial(out[:, :t], lse[:, :, :t].transpose(0, 2, 1))


class Scratch(NamedTuple):
  """Shared memory and barriers of one program."""

  q: Any  # [q_slots GROUPS ROWS H] queries, then the output
  k: Any  # [stages tile_k H]
  v: Any
  lse: Any  # [GROUPS ROWS]
  q_full: Any  # the queries have come
  k_full: Any  # a key tile has come
  v_full: Any
  k_free: Any  # both warpgroups are done with a key tile
  v_free: Any
