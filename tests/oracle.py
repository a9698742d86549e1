"""The float64 oracle of every kernel, and the one tolerance table.

Plain numpy, one loop per (row, head): the definition in the docstrings, kept
apart from all code under test.
"""

import chex
import jax.numpy as jnp
import ml_dtypes
import numpy as np

# dtype of the operands -> (absolute tolerance of out, of lse), for values of
# size about 1 and scores of a few. bfloat16 has 8 bits: weights and outputs
# are rounded to 2**-9; float16 to 2**-12.
TOLERANCE = {
  'float32': (2e-5, 2e-5),
  'float16': (3e-3, 2e-3),
  'bfloat16': (2e-2, 1e-2),
  'int8': (2e-2, 1e-2),  # codes times bfloat16 queries
  'int4': (2e-2, 1e-2),
}


def assert_close(got, want, kind: str) -> None:
  """Compares Partials: `want` from this module, `kind` of TOLERANCE."""
  out_tol, lse_tol = TOLERANCE[kind]
  want_out, want_lse = want
  got_out = np.asarray(jnp.asarray(got.out, jnp.float32), np.float64)
  got_lse = np.asarray(got.lse, np.float64)
  none = ~np.isfinite(want_lse)
  np.testing.assert_array_equal(got_lse[none], -np.inf)
  np.testing.assert_array_equal(got_out[none], 0)
  size = max(1.0, float(np.max(np.abs(want_out), initial=0)))
  chex.assert_trees_all_close(got_out, want_out, rtol=0, atol=out_tol * size)
  size = max(1.0, float(np.max(np.abs(want_lse[~none]), initial=0)))
  chex.assert_trees_all_close(
    np.where(none, 0, got_lse),
    np.where(none, 0, want_lse),
    rtol=0,
    atol=lse_tol * size,
  )


def wide(x) -> np.ndarray:
  """To float64, whatever the dtype."""
  x = np.asarray(x)
  if x.dtype == ml_dtypes.bfloat16:
    x = x.astype(np.float32)
  return x.astype(np.float64)


def attend(q, k, v, mask, scale):
  """q [B T N H], k and v [B K S H], mask [B N T S] -> out, lse in float64."""
  q, k, v = wide(q), wide(k), wide(v)
  b, t, n, h = q.shape
  group = n // k.shape[1]
  out = np.zeros((b, t, n, h))
  lse = np.full((b, t, n), -np.inf)
  for i in range(b):
    for j in range(n):
      scores = scale * q[i, :, j] @ k[i, j // group].T
      scores = np.where(mask[i, j], scores, -np.inf)
      some = mask[i, j].any(axis=-1)
      top = np.where(some, scores.max(axis=-1, initial=-np.inf), 0.0)
      weights = np.where(mask[i, j], np.exp(scores - top[:, None]), 0.0)
      total = weights.sum(axis=-1)
      safe = np.where(some, total, 1.0)
      out[i, :, j] = (weights / safe[:, None]) @ v[i, j // group]
      lse[i, :, j] = np.where(some, top + np.log(safe), -np.inf)
  return out, lse


def block_mask(blocks, q_start, lengths, t, s, sliding_window=None):
  """The rule of BlockList, head by head: [B N T S]."""
  ids, count = np.asarray(blocks.ids), np.asarray(blocks.count)
  b, n = ids.shape[:2]
  mask = np.zeros((b, n, t, s), bool)
  key = np.arange(s)
  tile = np.arange(t) // blocks.block_q
  for i in range(b):
    p = int(q_start[i]) + np.arange(t)[:, None]
    for j in range(n):
      seen = (key < int(blocks.sink[j])) | (key > p - int(blocks.window[j]))
      for m in range(ids.shape[2]):
        mine = ids[i, j, m, : count[i, j, m]]
        seen[tile == m] |= np.isin(key // blocks.block_k, mine)
      seen &= (key <= p) & (key < lengths[i]) & (p < lengths[i])
      if sliding_window is not None:
        seen &= key > p - sliding_window
      mask[i, j] = seen
  return mask


def block_sparse(
  q, k, v, blocks, *, q_start, lengths, scale=None, sliding_window=None
):
  """The oracle of `kernels_pallas.block_sparse.block_sparse`."""
  mask = block_mask(
    blocks, q_start, lengths, q.shape[1], k.shape[2], sliding_window
  )
  return attend(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)


def passing_block(q, k, v, start, stop, scale=None):
  """The oracle of `kernels_pallas.passing_block.passing_block`."""
  key = np.arange(k.shape[2])
  start, stop = np.asarray(start)[..., None], np.asarray(stop)[..., None]
  mask = ((key >= start) & (key < stop))[:, None]
  shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[2])
  mask = np.broadcast_to(mask, shape)
  return attend(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)


def dequantise(codes, scale, zero):
  """[P page ..] codes as in Pages -> float64 [P page H]."""
  codes = np.asarray(codes)
  if scale is None:
    return wide(codes)
  if zero is None:
    return wide(codes) * wide(scale)[..., None]
  both = np.empty((*codes.shape[:-1], 2 * codes.shape[-1]))
  both[..., 0::2], both[..., 1::2] = codes & 15, codes >> 4
  return (both - wide(zero)[..., None]) * wide(scale)[..., None]


def selected(
  q, pages, rows, positions, q_positions, sink=None, window=None, scale=None
):
  """The oracle of `attend_tokens`: rows [B K W] = page * page_size + slot."""
  rows, positions = np.asarray(rows), np.asarray(positions)
  kv = rows.shape[1]
  group = q.shape[2] // kv
  h = q.shape[-1]
  flat = np.maximum(rows, 0)
  k = dequantise(pages.k, pages.k_scale, pages.k_zero).reshape(-1, h)[flat]
  v = dequantise(pages.v, pages.v_scale, pages.v_zero).reshape(-1, h)[flat]
  at = np.asarray(q_positions)[:, None, :, None]
  mask = (rows >= 0)[:, :, None] & (positions[:, :, None] <= at)
  if sink is not None:
    edge = np.asarray(sink)[:, None, None]
    recent = np.asarray(window)[:, None, None]
    mask &= (positions[:, :, None] < edge) | (
      positions[:, :, None] > at - recent
    )
  mask = np.repeat(mask, group, axis=1)
  return attend(q, k, v, mask, h**-0.5 if scale is None else scale)


def rows_of_pages(ids, starts, page: int):
  """(ids, starts) [B K W] as (rows, positions) [B K W*page]."""
  ids, starts = np.asarray(ids)[..., None], np.asarray(starts)[..., None]
  slot = np.arange(page)
  rows = np.where(ids >= 0, ids * page + slot, -1)
  shape = (*ids.shape[:2], -1)
  return rows.reshape(shape), (starts + slot).reshape(shape)
