"""The TPU inner loop of the prompt families (Pallas, Mosaic TPU).

A program is one tile: one query head, `block_q` rows. Its list row comes to
SMEM by the grid's own pipeline (the lists of a layer do not fit there whole);
the kernel walks it and copies the key blocks from HBM itself, `group` blocks a
step into one of two buffers, the next step's (or the next tile's first) while
this one is computed. Work and bytes are therefore those of the list.

Scores are row-major, s = q k^T [rows, keys], and a row's running maximum
stands in all lanes of a [rows, 128] buffer, as in JAX's splash attention; so do
its bounds. Its sum stays apart by lane until the tile ends.

Bundles from the first to the last matmul of an unmasked and a masked block by
the compiler's schedule (experiments/results/tpu_schedule.jsonl; splash in
brackets, its mask included), 512 x 512: 954 and 993 on v5e (1050), 662 and 884
on v6e (680). Tried at that size (libtpu 0.0.48.1, no rows):
- scores transposed, keys on sublanes: 1185 and 1315, 730 and 930; at 256 x 256
  it is the better one on v6e (314 and 321; here 325 and 331).
- weights cast to bfloat16 before their matmul: 936 and 954, 691 and 899; at
  256 x 256 on v6e 318 and 320.
- that, with the next step's scores in this one's code, through a float32
  buffer: 985 and 1215, 585 and 731. But from branch to branch, so with what
  stands around the matmuls, 1130 for 1109 and 818 for 907 unmasked; and a
  tile's first scores and last step would overlap with nothing.
- independent parts of 128 or 256 queries of the transposed form, which the
  compiler runs one after the other: 1.6 to 1.8 times as many.
From branch to branch a 256 x 256 block takes 513 on v6e, transposed 409 and
splash's 571; a 512 x 512 one 884, 914 and 907. On v5e 512 x 512 is bound by
the matrix units: 64 matmuls of 16 rows each are 1024 cycles, which the schedule
queues closer than that.

FLOPs: 4 block_q block_k H a visit. Bytes: 2 block_k H itemsize a visit, so the
intensity is block_q FLOPs a byte (bfloat16): 512 rows keep a v5e or v6e busy.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from kernels_pallas import tiles
from kernels_pallas.keys import Pages
from kernels_pallas.partial import Partial

LOG2E = math.log2(math.e)
# Masked scores lie below every running maximum (which starts at FLOOR), so
# that their weight is exp2(-5e29) = 0 without a second mask.
MASKED, FLOOR = -1e30, -5e29
NEVER = 2**30  # a position that no query reaches
HEAD_DIMS = (64, 128, 256)
LANES = 128
# Slots of a list row in SMEM, before the ids.
_FIELDS = (
  'skip',
  'sinks',
  'cursor',
  'middle',
  'lead',
  'total',
  'whole',
  'clear',
  'floor',
  'count',
  'sink',
  'window',
)
_IDS = 16


def refuse(q, k_dtype) -> str | None:
  """Why no TPU kernel takes these queries and keys, or None."""
  if q.shape[-1] not in HEAD_DIMS:
    return f'head dim {q.shape[-1]} must be in {HEAD_DIMS}'
  for dtype in (q.dtype, k_dtype):
    if dtype == jnp.float16:
      return 'Mosaic TPU loads no float16: use bfloat16'
  return None


def refuse_blocks(block_q: int, block_k: int) -> str | None:
  """Why no TPU kernel takes these blocks, or None."""
  if block_q % 128:
    return f'{block_q=} must be a multiple of 128'
  if block_k % 32:
    return f'{block_k=} must be a multiple of 32'
  return None


@dataclasses.dataclass(frozen=True)
class _Static:
  """What a kernel is specialised on."""

  block_k: int
  group: int  # blocks a step
  scale: float
  sliding_window: int | None
  queries_per_kv: int
  tiles: int
  width: int  # of the lists
  page: int | None  # None: contiguous keys
  precision: lax.Precision


def list_rows(plan, first, ids, count, sink, window, block_k, sliding_window):
  """The SMEM rows [B*N*Tb + 1, 1, _IDS + W]: a tile's plan, then its ids.

  The one row more, of zeros, stands after the last tile's: every tile looks
  at the next one's row, to start its first copies.
  """
  b, n, tb, width = ids.shape
  low = first.reshape(b, 1, tb, -1) - window[None, :, None, None]
  clear = jnp.max(low, axis=-1)
  floor = jnp.zeros_like(clear)
  if sliding_window is not None:
    bound = jnp.max(first.reshape(b, 1, tb, -1) - sliding_window, axis=-1)
    clear = jnp.maximum(clear, bound)
    floor = jnp.broadcast_to(bound, clear.shape)

  def up(keys):
    return tiles.ceil_div(jnp.maximum(keys, 0), block_k)

  def wide(x):
    return jnp.broadcast_to(x[None, :, None], (b, n, tb))

  fields = {
    **plan._asdict(),
    'clear': up(clear),
    'floor': up(floor),
    'count': count,
    'sink': wide(sink),
    'window': wide(window),
  }
  rows = jnp.stack([fields[name] for name in _FIELDS], axis=-1)
  rows = jnp.pad(rows, ((0, 0),) * 3 + ((0, _IDS - len(_FIELDS)),))
  rows = jnp.concatenate([rows, ids], axis=-1).reshape(-1, 1, _IDS + width)
  return jnp.pad(rows, ((0, 1), (0, 0), (0, 0)))


def _field(row_ref, name: str):
  return row_ref[0, 0, _FIELDS.index(name)]


def _block(row_ref, visit):
  """(block id, is it a listed block of the middle) of a visit."""
  sinks, middle = _field(row_ref, 'sinks'), _field(row_ref, 'middle')
  slot = _IDS + _field(row_ref, 'cursor') + visit - sinks
  in_middle = (visit >= sinks) & (visit < sinks + middle)
  width = row_ref.shape[2]
  if width > _IDS:
    chosen = row_ref[0, 0, jnp.clip(slot, _IDS, width - 1)]
  else:
    chosen = 0
  rest = _field(row_ref, 'lead') + visit - sinks - middle
  block = jnp.where(visit < sinks, _field(row_ref, 'skip') + visit, rest)
  return jnp.where(in_middle, chosen, block), in_middle


def _lanes(x, width: int):
  """[rows 128], alike in all lanes, as [rows width]."""
  if width < LANES:
    return x[:, :width]
  return jnp.tile(x, (1, width // LANES))


def _is_id(row_ref, slot, block):
  """Whether ids[slot] is used and is this block."""
  width = row_ref.shape[2] - _IDS
  if not width:
    return jnp.bool_(False)
  used = (slot >= 0) & (slot < _field(row_ref, 'count'))
  at = _IDS + jnp.clip(slot, 0, width - 1)
  return used & (row_ref[0, 0, at] == block)


def _kernel(
  # SMEM
  row_ref,  # [1 1 _IDS+W]
  next_ref,  # the next tile's
  table_ref,  # [1 1 pages] or None
  # VMEM
  first_ref,  # [1 1 block_q]
  stop_ref,
  q_ref,  # [1 1 block_q H]
  # HBM
  k_hbm,  # [B K S H], or a pool [P page H]
  v_hbm,
  # outputs
  out_ref,  # [1 1 block_q H]
  lse_ref,  # [1 1 1 block_q]
  # scratch
  k_buf,  # [2 group*block_k H]
  v_buf,
  acc_ref,  # [block_q H]
  top_ref,  # [block_q 128], a row's maximum in every lane
  weight_ref,  # [block_q 128], a row's sum is that of its lanes
  bounds_ref,  # [2 block_q 128]: first and stop in every lane
  parity_ref,  # SMEM [1]: the buffer of the next tile's first step
  sems,  # [2 2]
  *,
  static: _Static,
):
  bk, group = static.block_k, static.group
  b, head, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
  kv = lax.div(head, static.queries_per_kv)
  total = _field(row_ref, 'total')
  steps = lax.div(total + group - 1, group)

  def copies(ref, step, slot):
    """The copies of a step: repeats of its last block fill a short one."""
    last = _field(ref, 'total') - 1
    for e in range(group):
      block, _ = _block(ref, jnp.minimum(step * group + e, last))
      for index, (hbm, buf) in enumerate(((k_hbm, k_buf), (v_hbm, v_buf))):
        sem = sems.at[slot, index]
        if static.page is None:
          source = hbm.at[b, kv, pl.ds(pl.multiple_of(block * bk, bk), bk)]
          target = buf.at[slot, pl.ds(e * bk, bk)]
          yield pltpu.make_async_copy(source, target, sem)
          continue
        for p in range(bk // static.page):
          page = table_ref[0, 0, block * (bk // static.page) + p]
          at = e * bk + p * static.page
          yield pltpu.make_async_copy(
            hbm.at[jnp.maximum(page, 0)],
            buf.at[slot, pl.ds(at, static.page)],
            sem,
          )

  def start(ref, step, slot):
    for copy in copies(ref, step, slot):
      copy.start()

  @pl.when(i == 0)
  def _():
    parity_ref[0] = 0

    @pl.when(total > 0)
    def _():
      start(row_ref, 0, 0)

  base = parity_ref[0]
  # The next row belongs to this (batch row, head) only before the last tile.
  next_total = jnp.where(i + 1 < static.tiles, _field(next_ref, 'total'), 0)

  @pl.when((steps == 0) & (next_total > 0))
  def _():
    start(next_ref, 0, base)

  acc_ref[...] = jnp.zeros_like(acc_ref)
  weight_ref[...] = jnp.zeros_like(weight_ref)
  top_ref[...] = jnp.full_like(top_ref, FLOOR)
  for at, ref in enumerate((first_ref, stop_ref)):
    bounds_ref[at] = jnp.broadcast_to(ref[0], (LANES, ref.shape[2])).T
  sink, window = _field(row_ref, 'sink'), _field(row_ref, 'window')
  sinks, middle = _field(row_ref, 'sinks'), _field(row_ref, 'middle')
  scale = static.scale * LOG2E

  def update(slot, keys):
    """One step; `keys`: (key, reach) of its columns if it needs a mask."""
    s = lax.dot_general(
      q_ref[0, 0],
      k_buf[slot],
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
      precision=static.precision,
    )
    width = s.shape[1]
    if keys is not None:
      key, reach = keys
      mask = reach >= _lanes(bounds_ref[0], width)
      mask &= key < _lanes(bounds_ref[1], width)
      s = jnp.where(mask, s, MASKED)
    # In units of the unscaled scores: scaling them first is done twice over.
    top = top_ref[...]
    new = jnp.maximum(top, jnp.max(s, axis=1, keepdims=True))
    p = jnp.exp2((s - _lanes(new, width)) * scale)
    fade = jnp.exp2((top - new) * scale)
    top_ref[...] = new
    weight_ref[...] = weight_ref[...] * fade + sum(
      p[:, at : at + LANES] for at in range(0, width, LANES)
    )
    # Float32 to the matrix units, which round it: a cast is VPU work more.
    acc_ref[...] = acc_ref[...] * _lanes(fade, acc_ref.shape[1]) + jnp.dot(
      p,
      v_buf[slot].astype(jnp.float32),
      preferred_element_type=jnp.float32,
      precision=static.precision,
    )

  def columns(blocks, listed):
    """(key, reach) [1 keys]: a row sees it iff reach >= first, key < stop."""
    lane = lax.broadcasted_iota(jnp.int32, (1, group * bk), 1)
    key, far = jnp.zeros_like(lane), jnp.zeros_like(lane)
    for e, (is_listed, live) in enumerate(listed):
      here = lane >= e * bk
      begin = jnp.where(live, (blocks[e] - e) * bk, NEVER)
      key = jnp.where(here, lane + begin, key)
      far = jnp.where(here, jnp.where(is_listed, tiles.BIG, window), far)
    reach = jnp.where(key < sink, tiles.BIG, key + far)
    if static.sliding_window is not None:
      reach = jnp.minimum(reach, key + static.sliding_window)
    return key, reach

  def step(j, pointer):
    slot = lax.rem(base + j, 2)

    @pl.when(j + 1 < steps)
    def _():
      start(row_ref, j + 1, 1 - slot)

    @pl.when((j + 1 == steps) & (next_total > 0))
    def _():
      start(next_ref, 0, 1 - slot)

    for copy in copies(row_ref, j, slot):
      copy.wait()

    blocks, listed, whole = [], [], jnp.bool_(True)
    for e in range(group):
      visit = j * group + e
      block, in_middle = _block(row_ref, visit)
      live = visit < total
      in_window = live & (visit >= sinks + middle)
      # A listed block at the window's edge: the ids from `pointer` on are
      # those at or above the window's first block, met in order.
      hit = in_window & _is_id(row_ref, pointer, block)
      pointer = pointer + hit.astype(jnp.int32)
      edge = (visit == sinks - 1) & _is_id(
        row_ref, _field(row_ref, 'cursor') - 1, block
      )
      inside = (
        in_middle
        | ((block + 1) * bk <= sink)
        | (block >= _field(row_ref, 'clear'))
      )
      whole &= (
        live
        & inside
        & (block < _field(row_ref, 'whole'))
        & (block >= _field(row_ref, 'floor'))
      )
      blocks.append(jnp.where(live, block, 0))
      listed.append((in_middle | hit | edge, live))

    @pl.when(whole)
    def _():
      update(slot, None)

    @pl.when(jnp.logical_not(whole))
    def _():
      update(slot, columns(blocks, listed))

    return pointer

  lax.fori_loop(0, steps, step, _field(row_ref, 'cursor') + middle)
  parity_ref[0] = lax.rem(base + steps, 2)
  weight = jnp.sum(weight_ref[...], axis=1, keepdims=True)
  # A row with stop 0 took part in the unmasked steps.
  weight = jnp.where(bounds_ref[1] > 0, weight, 0.0)
  safe = jnp.where(weight > 0, weight, 1.0)
  lse = top_ref[...] * static.scale + jnp.log(safe)
  lse = jnp.where(weight > 0, lse, -jnp.inf)
  lse_ref[0, 0] = lse.T[:1]
  weight = _lanes(weight, acc_ref.shape[1])
  out = acc_ref[...] / jnp.where(weight > 0, weight, 1.0)
  out_ref[0, 0] = jnp.where(weight > 0, out, 0.0).astype(out_ref.dtype)


def attend_rows(
  q: Float[Array, 'B T N H'],
  keys: tuple[Float[Array, 'B K S H'], Float[Array, 'B K S H']] | Pages,
  table: Int32[Array, 'B K W'] | None,
  first: Int32[Array, 'B T'],
  stop: Int32[Array, 'B T'],
  blocks,
  *,
  scale: float,
  sliding_window: int | None,
  step_keys: int = 512,
  vmem_limit_bytes: int | None = None,
) -> Partial:
  """The rule of `kernels_pallas.tiles` over the blocks of a BlockList.

  Args:
    q: queries.
    keys: (k, v) [B K S H], or floating point pages with their `table`.
    table: pages of each (row, kv head), or None.
    first: [B T], see `kernels_pallas.tiles`.
    stop: [B T].
    blocks: a BlockList; its block_q is the tile.
    scale: of the scores, positive.
    sliding_window: the layer's own, or None.
    step_keys: keys a step takes, in whole blocks.
    vmem_limit_bytes: None: the compiler's default.
  """
  if not scale > 0:
    raise ValueError(f'{scale=} must be positive on a TPU')
  b, t, n, h = q.shape
  bq, bk = blocks.block_q, blocks.block_k
  paged = isinstance(keys, Pages)
  if paged:
    assert table is not None
    k, v = keys.k, keys.v
    kv, s = table.shape[1], table.shape[2] * keys.page
  else:
    k, v = keys
    kv, s = k.shape[1], k.shape[2]
    if s % bk:
      short = ((0, 0), (0, 0), (0, -s % bk), (0, 0))
      k, v = jnp.pad(k, short), jnp.pad(v, short)
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
  tb = blocks.ids.shape[2]
  pad = tb * bq - t
  q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
  first, stop = (jnp.pad(x, ((0, 0), (0, pad))) for x in (first, stop))
  rows = list_rows(
    plan,
    first,
    blocks.ids,
    blocks.count,
    blocks.sink,
    blocks.window,
    bk,
    sliding_window,
  )
  # Whole vectors of keys a step; short ones are filled with dead blocks.
  least = LANES // math.gcd(bk, LANES)
  group = least * max(1, step_keys // (least * bk))
  static = _Static(
    block_k=bk,
    group=group,
    scale=scale,
    sliding_window=sliding_window,
    queries_per_kv=n // kv,
    tiles=tb,
    width=blocks.ids.shape[3],
    page=keys.page if paged else None,
    precision=lax.Precision.HIGHEST
    if q.dtype == jnp.float32
    else lax.Precision.DEFAULT,
  )

  def row_spec(ahead):
    return pl.BlockSpec(
      (1, 1, rows.shape[2]),
      lambda b, n_, i: ((b * n + n_) * tb + i + ahead, 0, 0),
      memory_space=pltpu.SMEM,
    )

  lane_spec = pl.BlockSpec((1, 1, bq), lambda b, n_, i: (b, 0, i))
  tile_spec = pl.BlockSpec((1, 1, bq, h), lambda b, n_, i: (b, n_, i, 0))
  any_spec = pl.BlockSpec(memory_space=pl.ANY)
  specs = [row_spec(0), row_spec(1)]
  inputs = [rows, rows]
  kernel = functools.partial(_kernel, static=static)
  if table is not None:
    specs.append(
      pl.BlockSpec(
        (1, 1, table.shape[2]),
        lambda b, n_, i: (b * kv + lax.div(n_, n // kv), 0, 0),
        memory_space=pltpu.SMEM,
      )
    )
    inputs.append(table.reshape(b * kv, 1, -1))
  else:
    kernel = _without_table(kernel)
  visited = s if blocks.dense or not static.width else static.width * bk
  pairs = b * n * t * min(s, visited) // (2 if visited >= s else 1)
  out, lse = pl.pallas_call(
    kernel,
    grid=(b, n, tb),
    in_specs=[*specs, lane_spec, lane_spec, tile_spec, any_spec, any_spec],
    out_specs=[
      tile_spec,
      pl.BlockSpec((1, 1, 1, bq), lambda b, n_, i: (b, n_, 0, i)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((b, n, 1, tb * bq), jnp.float32),
    ],
    scratch_shapes=[
      pltpu.VMEM((2, group * bk, h), k.dtype),
      pltpu.VMEM((2, group * bk, h), v.dtype),
      pltpu.VMEM((bq, h), jnp.float32),
      pltpu.VMEM((bq, LANES), jnp.float32),
      pltpu.VMEM((bq, LANES), jnp.float32),
      pltpu.VMEM((2, bq, LANES), jnp.int32),
      pltpu.SMEM((1,), jnp.int32),
      pltpu.SemaphoreType.DMA((2, 2)),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=vmem_limit_bytes,
    ),
    cost_estimate=pl.CostEstimate(
      flops=4 * h * pairs,
      transcendentals=pairs,
      bytes_accessed=q.nbytes * 2 + 2 * h * k.itemsize * pairs // bq,
    ),
    name='lcx_block_attention',
  )(
    *inputs,
    first[:, None],
    stop[:, None],
    q,
    k,
    v,
  )
  out = out.transpose(0, 2, 1, 3)[:, :t]
  return Partial(out, lse[:, :, 0].transpose(0, 2, 1)[:, :t])


def _without_table(kernel):
  def call(row_ref, next_ref, *refs):
    return kernel(row_ref, next_ref, None, *refs)

  return call
