"""block_lse on Hopper: a matrix product that keeps one number a block.

A cluster of two programs takes 256 rows of a head and one in `phases` tiles of
256 cells. Each program holds 128 rows, two compute warpgroups of 64; a third
fills a ring with pieces of 64 channels: its own rows, and cells, of which each
program of the cluster loads half for both. The ring runs on over tiles, so the
next one's first pieces come while the last one's scores are summed.

In shared memory the cells of a tile stand by their place in the block: first
cell of every block, second cell of every block, .... So a block's scores are
the same column of `per_block` slices of the accumulator, and its maximum and
sum need no exchange between threads.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic_gpu import (
  COMPUTE_REGISTERS,
  COPY_REGISTERS,
  GROUPS,
  MULTIPROCESSORS,
  ROW,
  ROWS,
  TILE_Q,
  across,
  pad_to,
  tiled,
)

CLUSTER = 2
CELLS = 256  # of a tile
PIECE = 64  # channels of a stage: 128 bytes
GRANULE = 8  # blocks: TMA takes them in whole tiles of so many
STAGES = 4
WAVES = 6  # programs a multiprocessor, at least: the last ones leave few idle


class Scratch(NamedTuple):
  """Shared memory and barriers of one program."""

  rows: Any  # [STAGES TILE_Q PIECE]
  cells: Any  # [STAGES CELLS PIECE]
  out: Any  # [GROUPS ROWS blocks]
  full: Any  # rows and cells of a stage have come
  free: Any  # both programs of the cluster are done with a stage


def refuse(
  function: str, rows, cells, *args, per_block: int, **kwargs
) -> str | None:
  """Why this implementation cannot serve; None if it can."""
  del function, args, kwargs
  if rows.dtype not in (jnp.bfloat16, jnp.float16):
    return f'{rows.dtype=} is neither bfloat16 nor float16'
  if rows.shape[-1] % PIECE:
    return f'rows of {rows.shape[-1]} channels, which {PIECE} does not divide'
  if per_block not in (4, 8, 16):
    return f'{per_block=} is not one of 4, 8, 16'
  whole = GRANULE * per_block  # others are padded
  if -(-cells.shape[2] // whole) * whole < CELLS:
    return f'{cells.shape[2]} cells are less than a tile of {CELLS}'
  return None


def granule() -> int:
  """See `kernels_pallas.block_scores.granule`: TMA's whole tiles."""
  return GRANULE


def block_lse(rows, cells, last, factor, *, per_block):
  """See `kernels_pallas.block_scores.block_lse`.

  Raises:
    NotImplementedError: with the reason, where the kernel does not apply.
  """
  if reason := refuse('block_lse', rows, cells, per_block=per_block):
    raise NotImplementedError(reason)
  batch, kv_heads, group, n_rows, f = rows.shape
  n_blocks = cells.shape[2] // per_block
  # A copy, where there are others.
  cells = pad_to(cells, 2, GRANULE * per_block)
  flat = rows.reshape(batch * kv_heads, group * n_rows, f)
  flat = pad_to(flat, 1, CLUSTER * TILE_Q)

  def of_rows(x, padding):
    x = jnp.tile(x, (1, group))
    short = flat.shape[1] - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, short)), constant_values=padding)

  seen = of_rows(last, -1)
  # Tiles that any row of a cluster sees.
  ends = jnp.max(seen.reshape(batch, -1, CLUSTER * TILE_Q), axis=-1)
  ends = jnp.minimum(ends, cells.shape[2] - 1) // CELLS + 1
  lse = _launch(
    flat,
    cells.reshape(batch * kv_heads, -1, per_block, f),
    seen,
    of_rows(factor, 1.0),
    ends.astype(jnp.int32),
  )
  lse = lse[:, : group * n_rows, :n_blocks]
  lse = lse.reshape(batch, kv_heads, group, n_rows, n_blocks)
  # Tiles that nobody sees were not written.
  first = jnp.arange(n_blocks) * per_block
  visible = first <= last[:, None, None, :, None]
  return jnp.where(visible, lse, -jnp.inf)


def _launch(rows, cells, last, factor, ends):
  """[heads M blocks] float32, blocks of whole tiles.

  Args:
    rows: [heads M F], M in whole clusters.
    cells: [heads J per_block F].
    last: int32 [B M].
    factor: float32 [B M].
    ends: int32 [B M / (CLUSTER * TILE_Q)] tiles that a cluster visits.
  """
  heads, m, f = rows.shape
  kv_heads = heads // last.shape[0]
  per_block = cells.shape[2]
  blocks = CELLS // per_block  # of a tile
  tiles = -(-cells.shape[1] // blocks)
  clusters = m // (CLUSTER * TILE_Q)
  want = -(-WAVES * MULTIPROCESSORS // (heads * clusters * CLUSTER))
  phases = max(1, min(tiles, want))
  pieces = f // PIECE

  def kernel(rows_ref, cells_ref, last_ref, factor_ref, ends_ref, *rest):
    out_ref, scratch = rest[0], Scratch(*rest[1])
    head = lax.axis_index('heads')
    batch = lax.div(head, jnp.int32(kv_heads))
    phase = lax.axis_index('phases')
    pair = lax.axis_index('pairs')
    first = (pair * CLUSTER + lax.axis_index('cluster')) * TILE_Q
    short = jnp.maximum(ends_ref[batch, pair] - phase, 0)
    count = lax.div(short + (phases - 1), jnp.int32(phases))
    steps = count * pieces
    me = lax.axis_index('wg')

    def slot_of(step):
      return lax.rem(step, jnp.int32(STAGES))

    def copy_thread():
      plgpu.set_max_registers(COPY_REGISTERS, action='decrease')

      @pl.loop(0, steps)
      def _(step):
        slot = slot_of(step)
        tile = phase + lax.div(step, jnp.int32(pieces)) * phases
        channels = pl.ds(lax.rem(step, jnp.int32(pieces)) * PIECE, PIECE)

        @pl.when(step >= STAGES)
        def _():
          plgpu.barrier_wait(scratch.free.at[slot])

        plgpu.copy_gmem_to_smem(
          rows_ref.at[head, pl.ds(first, TILE_Q), channels],
          scratch.rows.at[slot],
          scratch.full.at[slot],
        )
        for i in range(per_block):
          plgpu.copy_gmem_to_smem(
            cells_ref.at[head, pl.ds(tile * blocks, blocks), i, channels],
            scratch.cells.at[slot, pl.ds(i * blocks, blocks)],
            scratch.full.at[slot],
            collective_axes='cluster',
          )

      # The other program still arrives at this one's barriers: wait for it.
      @pl.loop(jnp.maximum(steps, STAGES), steps + STAGES)
      def _(step):
        plgpu.barrier_wait(scratch.free.at[slot_of(step)])

    def compute_thread():
      plgpu.set_max_registers(COMPUTE_REGISTERS, action='increase')
      mine = pl.ds(first + me * ROWS, ROWS)

      def load(ref):
        return plgpu.load(ref.at[batch, mine], layout=ROW, optimized=False)

      @pl.loop(0, count)
      def _(i):
        tile = phase + i * phases

        def products(acc):
          @pl.loop(0, pieces)
          def _(piece):
            step = i * pieces + piece
            slot = slot_of(step)
            plgpu.barrier_wait(scratch.full.at[slot])
            plgpu.wgmma(
              acc,
              scratch.rows.at[slot, pl.ds(me * ROWS, ROWS)],
              scratch.cells.at[slot].transpose((1, 0)),
            )
            plgpu.wgmma_wait(1)

            @pl.when(piece > 0)
            def _():
              plgpu.barrier_arrive(scratch.free.at[slot_of(step - 1)])

          scores = acc[...]
          plgpu.barrier_arrive(scratch.free.at[slot_of((i + 1) * pieces - 1)])
          return scores

        scores = pl.run_scoped(products, plgpu.ACC((ROWS, CELLS), jnp.float32))
        # Column j of slice p is cell p of block j.
        shape = (ROWS, blocks)
        cell = plgpu.broadcasted_iota(
          jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA
        )
        cell = tile * CELLS + cell * per_block
        bound = across(load(last_ref), shape)
        slices = [
          jnp.where(
            cell + p <= bound,
            scores[:, p * blocks : (p + 1) * blocks],
            -jnp.inf,
          )
          for p in range(per_block)
        ]
        top = slices[0]
        for x in slices[1:]:
          top = jnp.maximum(top, x)
        base = jnp.where(top == -jnp.inf, 0.0, top)
        scale = across(load(factor_ref), shape)
        total = jnp.exp2((slices[0] - base) * scale)
        for x in slices[1:]:
          total += jnp.exp2((x - base) * scale)
        out = scratch.out.at[me]
        plgpu.wait_smem_to_gmem(0)
        out[...] = base * scale + jnp.log2(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
          out, out_ref.at[head, mine, pl.ds(tile * blocks, blocks)]
        )

      plgpu.wait_smem_to_gmem(0)

    pl.when(me < GROUPS)(compute_thread)
    pl.when(me == GROUPS)(copy_thread)

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((heads, m, tiles * blocks), jnp.float32),
    scratch_types=[
      Scratch(
        rows=tiled((STAGES, TILE_Q, PIECE), rows.dtype),
        cells=tiled((STAGES, CELLS, PIECE), rows.dtype),
        out=plgpu.SMEM((GROUPS, ROWS, blocks), jnp.float32),
        full=plgpu.Barrier(num_arrivals=1 + per_block, num_barriers=STAGES),
        free=plgpu.ClusterBarrier(
          collective_axes=('cluster',),
          num_arrivals=GROUPS,
          num_barriers=STAGES,
        ),
      )
    ],
    grid=(heads, phases, clusters),
    grid_names=('heads', 'phases', 'pairs'),
    cluster=(CLUSTER,),
    cluster_names=('cluster',),
    num_threads=GROUPS + 1,
    thread_name='wg',
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(rows, cells, last, factor, ends)
