"""Inputs for the kernel tests: every kind of row in one call."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.block_sparse import EVERYTHING, BlockList
from kernels_pallas.keys import Pages

# (sink, window, listed): the kinds of head, in this order over the heads.
KINDS = (
  (0, EVERYTHING, False),  # dense causal
  (5, 37, False),  # streaming, edges inside blocks
  (0, 0, True),  # lists alone
  (40, 21, True),  # lists over sink and window: overlaps count once
  (0, 0, False),  # sees nothing
  (0, 1, False),  # itself alone
  (64, 64, True),  # edges at block borders
  (300, 50, True),  # a sink past its window
)


def floats(rng, shape, dtype):
  return jnp.asarray(rng.normal(size=shape), dtype)


def random_lists(rng, b, n, tb, n_blocks, width, kinds):
  """Sorted unique ids and counts; heads without a list have count 0."""
  ids = np.zeros((b, n, tb, width), np.int32)
  count = np.zeros((b, n, tb), np.int32)
  for i in np.ndindex(b, n, tb):
    use = rng.integers(0, min(width, n_blocks) + 1)
    chosen = np.sort(rng.permutation(n_blocks)[:use])
    ids[i][:use] = chosen
    ids[i][use:] = rng.integers(0, n_blocks, width - use)  # unused: anything
    count[i] = use if kinds[i[1] % len(kinds)][2] else 0
  return ids, count


def block_case(
  seed=0,
  *,
  b=2,
  t=70,
  s=200,
  kv=2,
  group=4,
  h=64,
  dtype=jnp.float32,
  block_q=16,
  block_k=32,
  width=4,
  kinds=KINDS,
):
  """(q, k, v, blocks), {q_start, lengths}: ragged, a row past its length."""
  rng = np.random.default_rng(seed)
  n = kv * group
  tb = -(-t // block_q)
  ids, count = random_lists(rng, b, n, tb, -(-s // block_k), width, kinds)
  sink, window = np.asarray(
    [kinds[i % len(kinds)][:2] for i in range(n)], np.int32
  ).T
  blocks = BlockList(
    *(jnp.asarray(x) for x in (ids, count, sink, window)), block_q, block_k
  )
  q_start = np.full(b, s - t, np.int32)
  lengths = np.full(b, s, np.int32)
  if b > 1:  # starts early; its last queries are padding
    q_start[1] = rng.integers(0, max(1, (s - t) // 2 + 1))
    lengths[1] = max(1, q_start[1] + t - rng.integers(0, t // 2 + 1))
  return (
    floats(rng, (b, t, n, h), dtype),
    floats(rng, (b, kv, s, h), dtype),
    floats(rng, (b, kv, s, h), dtype),
    blocks,
  ), {'q_start': jnp.asarray(q_start), 'lengths': jnp.asarray(lengths)}


def pool(rng, bits: int, p: int, page: int, h: int, dtype=jnp.float32) -> Pages:
  """A pool of random pages; keys and values of size about 1."""
  if bits >= 16:
    return Pages(
      floats(rng, (p, page, h), dtype), floats(rng, (p, page, h), dtype)
    )

  def code(kind, low, high, width):
    return jnp.asarray(rng.integers(low, high, (p, page, width)), kind)

  def uniform(low, high):
    return jnp.asarray(rng.uniform(low, high, (p, page)), jnp.float32)

  if bits == 8:
    codes = [code(jnp.int8, -127, 128, h) for _ in range(2)]
    return Pages(*codes, *(uniform(0.01, 0.02) for _ in range(2)))
  codes = [code(jnp.uint8, 0, 256, h // 2) for _ in range(2)]
  scales = [uniform(0.15, 0.3) for _ in range(2)]
  return Pages(*codes, *scales, uniform(6, 9), uniform(6, 9))


def page_case(
  seed=0,
  *,
  b=2,
  t=3,
  kv=2,
  group=4,
  h=64,
  page=16,
  width=6,
  bits=16,
  dtype=jnp.float32,
  streaming=False,
):
  """(q, pages, ids, starts), keywords; one row has no page, one skips some."""
  rng = np.random.default_rng(seed)
  p = b * kv * width + 3
  ids = rng.permutation(p)[: b * kv * width].reshape(b, kv, width)
  starts = np.stack(
    [rng.permutation(2 * width)[:width] * page for _ in range(b * kv)]
  ).reshape(b, kv, width)
  ids[0, 0, 1:3] = -1
  ids[-1, -1] = -1
  last = rng.integers(t, 2 * width * page, b)
  positions = last[:, None] - t + np.arange(t)
  kwargs = {'q_positions': jnp.asarray(positions, jnp.int32)}
  if streaming:
    kwargs['sink'] = jnp.asarray(np.arange(kv) * 19 + 5, jnp.int32)
    kwargs['window'] = jnp.asarray(np.arange(kv) * 23 + 30, jnp.int32)
  return (
    floats(rng, (b, t, kv * group, h), dtype),
    pool(rng, bits, p, page, h, dtype),
    jnp.asarray(ids, jnp.int32),
    jnp.asarray(starts, jnp.int32),
  ), kwargs


def contiguous_case(seed=0, *, width=6, **kwargs):
  """Like `page_case`, of a cache: (q, pages, starts, used), keywords.

  Positions jump before page 2; the first row is full, the last is empty.
  """
  (q, pages, ids, _), named = page_case(seed, width=width, **kwargs)
  b, page = q.shape[0], pages.page
  pages = jax.tree.map(lambda x: x[: ids.size], pages)
  number = np.arange(width)
  start = np.where(number < 2, number, number + 3) * page
  used = np.random.default_rng(seed).integers(1, width * page, b)
  used[0], used[-1] = width * page, 0 if b > 1 else width * page - 7
  starts = np.where(number * page < used[:, None], start, 2**30)
  return (
    q,
    pages,
    jnp.asarray(starts, jnp.int32),
    jnp.asarray(used, jnp.int32),
  ), named


def token_case(seed=0, *, width=40, **kwargs):
  """Like `page_case` with single tokens: (q, pages, rows, positions)."""
  (q, pages, ids, _), named = page_case(seed, **kwargs)
  rng = np.random.default_rng(seed + 1)
  b, kv, _ = ids.shape
  tokens = pages.k.shape[0] * pages.page
  rows = np.stack([rng.permutation(tokens)[:width] for _ in range(b * kv)])
  rows = rows.reshape(b, kv, width).astype(np.int32)
  rows[0, 0, 3:9] = -1
  rows[-1, -1] = -1
  last = int(np.max(named['q_positions'])) + 20
  positions = rng.integers(0, last, (b, kv, width)).astype(np.int32)
  return (q, pages, jnp.asarray(rows), jnp.asarray(positions)), named


def passing_case(
  seed=0, *, b=2, t=70, s=200, kv=2, group=2, h=64, dtype=jnp.float32
):
  """APB's rows: an anchor, then queries over passing | anchor | local."""
  rng = np.random.default_rng(seed)
  anchor = t // 4
  passing = s - t
  row = np.arange(t)
  start = np.where(row < anchor, passing, passing // 2) + 0 * row
  start = np.stack([start, np.where(row < anchor, passing, 0)])[:b]
  stop = np.broadcast_to(passing + row + 1, (b, t)).copy()
  stop[-1, -3:] = 0  # rows without keys
  return (
    floats(rng, (b, t, kv * group, h), dtype),
    floats(rng, (b, kv, s, h), dtype),
    floats(rng, (b, kv, s, h), dtype),
    jnp.asarray(start, jnp.int32),
    jnp.asarray(stop, jnp.int32),
  )
