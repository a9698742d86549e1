"""selected_token on Hopper: Pallas Mosaic GPU.

Lists are cut into splits, one program each (`decode.py`), whose results are
merged by one launch more (`merge.py`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from kernels_pallas import dispatch, mosaic_gpu
from kernels_pallas.keys import NEVER, Pages
from kernels_pallas.partial import Partial, merge_axis
from kernels_pallas.selected_token.decode import decode
from kernels_pallas.selected_token.merge import merge_splits
from kernels_pallas.selected_token.rows import kv_heads

# Of a program, by bits, and half of it for head dims above 128: with more its
# registers would not suffice.
MOST_QUERIES = {16: 64, 8: 32, 4: 32}
# Programs for each of 132 multiprocessors, and the shared memory that they
# divide (of 228 KiB). Reading 16-bit pages is bound by bytes: one program with
# a deep ring suffices. Codes cost instructions: two programs hide each other's
# latency.
PROGRAMS = {16: 1, 8: 2, 4: 2}
SHARED_BYTES = 224 * 1024
OTHER_BYTES = 4 * 1024  # of a program: reductions, barriers, the system's own
# Lists longer than this many tiles a split are cut at their used length, which
# costs a small launch; shorter ones are cut at their width.
LONG_SPLIT = 8


@dataclasses.dataclass(frozen=True)
class DecodeSizes:
  """Static choices of the decode kernel.

  Attributes:
    stages: tiles of keys and values in flight a program; 0: as many as leave
      room for the other `PROGRAMS` on the multiprocessor.
    splits: programs a (row, kv head, block of queries); 0: as many as fill the
      chip.
    keys: of a tile, 64 or 128: a page of that size, several smaller ones, or a
      part of a larger one; 0: 128 for long lists and head dims up to 64, which
      are read faster so, if registers suffice (head dim at most 128, few
      queries), else 64.
  """

  stages: int = 0
  splits: int = 0
  keys: int = 0


GATHERED = 128  # tokens of a page that `attend_tokens` gathers: whole tiles


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
  if function != 'attend_tokens' and pages.page not in sizes:
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
  out_dtype=jnp.float32,
  block_sizes: dict[str, int] | None = None,
) -> Partial:
  """`kernels_pallas.selected_token.attend_pages` on a Hopper GPU.

  Raises:
    NotImplementedError: with the reason, where the kernel does not apply.
  """
  if reason := refuse('attend_pages', q, pages):
    raise NotImplementedError(reason)
  return _attend(
    q,
    pages,
    ids,
    starts,
    None,
    None,
    q_positions,
    sink,
    window,
    scale,
    _sizes(pages, block_sizes),
    out_dtype,
  )


def attend_contiguous(
  q: Float[Array, 'B T N H'],
  pages: Pages,
  starts: Int32[Array, 'B W'],
  used: Int32[Array, 'B'],
  *,
  q_positions: Int32[Array, 'B T'],
  sink: Int32[Array, 'K'] | None = None,
  window: Int32[Array, 'K'] | None = None,
  scale: float,
  out_dtype=jnp.float32,
  block_sizes: dict[str, int] | None = None,
) -> Partial:
  """`kernels_pallas.selected_token.attend_contiguous` on a Hopper GPU.

  Programs count a row's pages themselves, so no launch before them writes a
  list.

  Raises:
    NotImplementedError: with the reason, where the kernel does not apply.
  """
  if reason := refuse('attend_contiguous', q, pages):
    raise NotImplementedError(reason)
  return _attend(
    q,
    pages,
    None,
    starts[:, None],
    used,
    None,
    q_positions,
    sink,
    window,
    scale,
    _sizes(pages, block_sizes),
    out_dtype,
  )


def _sizes(pages: Pages, block_sizes) -> DecodeSizes:
  """Explicit sizes over tuned ones over defaults."""
  kind = jax.devices()[0].device_kind
  tuned = dispatch.tuned('attend_pages', kind, f'bits{pages.bits}')
  return dataclasses.replace(DecodeSizes(), **{**tuned, **(block_sizes or {})})


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
  positions = jnp.where(rows < 0, NEVER, positions)
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
    None,
    positions.reshape(-1, GATHERED),
    q_positions,
    sink,
    window,
    scale,
    dataclasses.replace(DecodeSizes(), **(block_sizes or {})),
    jnp.float32,
  )


def _attend(
  q, pages, ids, starts, used, positions, q_positions, sink, window, scale,
  sizes, out_dtype,
):  # fmt: skip
  """Splits the lists over programs and merges what they return.

  A contiguous cache has no ids, starts [B 1 W] and used tokens [B].
  """
  b, t, n, h = q.shape
  kv = kv_heads(pages, starts[:, 0]) if ids is None else ids.shape[1]
  group = n // kv
  # Rows: the queries of one kv head, padded to whole wgmmas.
  rows = q.reshape(b, t, kv, group, h).transpose(0, 2, 1, 3, 4)
  rows = rows.reshape(b, kv, t * group, h)
  if t * group > 8:  # TMA takes fewer than 8 rows, or whole groups of 8
    rows = mosaic_gpu.pad_to(rows, 2, 8)
  # Queries of a program.
  most = MOST_QUERIES[pages.bits] // (1 if h <= 128 else 2)
  wide = min(most, -(-t * group // 8) * 8)
  blocks = -(-t * group // wide)
  programs = mosaic_gpu.MULTIPROCESSORS * PROGRAMS[pages.bits]
  splits = sizes.splits or max(1, programs // (b * kv * blocks))
  keys = sizes.keys
  if not keys:
    length = starts.shape[2] * pages.page
    # As many bytes as 64 keys of 128 channels; or a long list.
    deep = h <= 64 or length > 128 * splits * LONG_SPLIT
    deep &= h <= 128 and wide <= 16  # else registers do not suffice
    keys = 128 if deep else 64
  # The list, padded to whole tiles of pages to skip.
  joined = max(keys // pages.page, 1)
  if ids is not None:
    ids = mosaic_gpu.pad_to(ids + 1, 2, joined) - 1
    starts = mosaic_gpu.pad_to(starts, 2, joined)
  elif starts.shape[2] % joined:
    starts = mosaic_gpu.pad_to(starts - NEVER, 2, joined) + NEVER
  tiles = starts.shape[2] * pages.page // keys
  if sink is not None and not sizes.splits and tiles > splits * LONG_SPLIT:
    # The programs of streaming heads end at once: with twice as many, those of
    # the other heads still fill the chip.
    splits *= 2
  splits = min(splits, tiles)
  if ids is not None and tiles > splits * LONG_SPLIT:
    place = jnp.arange(1, ids.shape[2] + 1, dtype=jnp.int32)
    used = jnp.max(jnp.where(ids >= 0, place, 0), axis=-1)
  out, lse = decode(
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
    wide=wide,
    stages=sizes.stages
    or _default_stages(h, pages, keys, wide, tiles <= splits * LONG_SPLIT),
  )
  out, lse = lax.platform_dependent(
    out,
    lse,
    cuda=lambda out, lse: merge_splits(
      out, lse, t * group, out_dtype=out_dtype
    ),
    default=lambda out, lse: _merge(out, lse, t * group, out_dtype),
  )
  if pages.bits == 4:
    # Step i of `spread4` takes the channels i and i + 4 of every 8.
    out = out.reshape(b, kv, -1, 4, h // 8, 2).transpose(0, 1, 2, 4, 5, 3)
  out = out.reshape(b, kv, t, group, h).transpose(0, 2, 1, 3, 4)
  lse = lse.reshape(b, kv, t, group).transpose(0, 2, 1, 3)
  return Partial(out.reshape(b, t, n, h), lse.reshape(b, t, n))


def _merge(out, lse, queries: int, out_dtype) -> Partial:
  part = merge_axis(Partial(out.swapaxes(-1, -2), lse), axis=2)
  out = part.out[:, :, :queries].astype(out_dtype)
  return Partial(out, part.lse[:, :, :queries])


def _default_stages(
  h: int, pages: Pages, keys: int, wide: int, short: bool
) -> int:
  """Tiles in flight for which the shared memory of a program has room.

  A ring of more than half of a multiprocessor's memory makes a launch begin a
  microsecond later: it is worth that to long lists alone.
  """
  spread = {16: 0, 8: 1, 4: 1.5}[pages.bits] * keys
  scales = {16: 0, 8: 8, 4: 16}[pages.bits] * keys
  fixed = 2 * h * (wide + spread) + 2 * wide * (keys + 2) + OTHER_BYTES
  stage = keys * h * pages.bits // 4 + scales
  programs = max(PROGRAMS[pages.bits], 2 if short else 1)
  room = SHARED_BYTES // programs - fixed
  return int(max(2, min(8, room // stage)))
