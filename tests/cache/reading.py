"""Reads caches back in plain numpy, and drives them with made-up tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.keys import NEVER
from lcx.cache import CacheShape

HEADS, DIM = 2, 8
RNG = np.random.default_rng(0)
KEYS = RNG.normal(size=(512, HEADS, DIM)).astype(np.float32)
VALUES = RNG.normal(size=(512, HEADS, DIM)).astype(np.float32)

# Jitted once, donated as the engine does.
append = jax.jit(lambda c, k, v, p, n: c.append(k, v, p, n), donate_argnums=0)
truncate = jax.jit(lambda c, n: c.truncate(n), donate_argnums=0)
fork = jax.jit(lambda c, s: c.fork(s), donate_argnums=0)
free = jax.jit(lambda c, r: c.free(r), donate_argnums=0)
reset = jax.jit(lambda c, r: c.reset(r), donate_argnums=0)
trim = jax.jit(lambda c: c.trim(), donate_argnums=0)
insert = jax.jit(lambda c, r, o: c.insert(r, o), donate_argnums=0)


def empty(config, batch, capacity=64, dtype=jnp.float32, **shape):
  return config.init(
    CacheShape(batch, HEADS, DIM, capacity, dtype=dtype, **shape)
  )


def feed(cache, rows, width, positions=None):
  """Appends token numbers `rows[b]` to row b, padded with NaN to `width`.

  `positions[b]` is that of the first token; by default the row's cursor.
  """
  batch = len(rows)
  k = np.full((batch, width, HEADS, DIM), np.nan, np.float32)
  v = np.full((batch, width, HEADS, DIM), np.nan, np.float32)
  first = np.asarray(cache.used) if positions is None else positions
  for b, tokens in enumerate(rows):
    k[b, : len(tokens)] = KEYS[np.asarray(tokens, int)]
    v[b, : len(tokens)] = VALUES[np.asarray(tokens, int)]
  count = np.array([len(tokens) for tokens in rows], np.int32)
  steps = np.arange(width, dtype=np.int32)
  return append(cache, k, v, np.asarray(first, 'i')[:, None] + steps, count)


def decode(codes, scale, zero):
  """Dequantises in numpy, written apart from the code under test."""
  codes = np.asarray(codes)
  if scale is None:
    return codes.astype(np.float32)
  if zero is not None:
    low, high = codes & 15, codes >> 4
    codes = np.stack([low, high], -1).reshape(*codes.shape[:-1], -1)
    codes = codes - np.asarray(zero)[..., None]
  return codes * np.asarray(scale)[..., None]


def read(cache):
  """Per row, per head: ({position: key}, {position: value}) of held tokens."""
  p = cache.pages()
  k, v = decode(p.k, p.k_scale, p.k_zero), decode(p.v, p.v_scale, p.v_zero)
  ids, starts = np.asarray(cache.page_ids()), np.asarray(cache.page_starts())
  last = np.asarray(cache.last_position())
  np.testing.assert_array_equal(ids < 0, starts == NEVER)

  def head(b, h):
    keys, values = {}, {}
    for page, start in zip(ids[b, h], starts[b, h]):
      for slot in range(k.shape[1] if page >= 0 else 0):
        if start + slot <= last[b]:
          assert start + slot not in keys, 'a position is held twice'
          keys[int(start) + slot] = k[page, slot]
          values[int(start) + slot] = v[page, slot]
    return keys, values

  batch, heads, _ = ids.shape
  return [[head(b, h) for h in range(heads)] for b in range(batch)]


def error(config, x):
  """How far a stored copy of x [... H] may be, a vector."""
  bits = getattr(config, 'bits', 16)
  if bits == 16:
    return np.zeros(x.shape[:-1])
  if bits == 8:
    return 0.5001 * np.abs(x).max(-1) / 127
  return 0.5001 * (x.max(-1) - x.min(-1)) / 15


def visible(config, head, length, first=0, layer=0):
  """Positions that the next query may see in a head."""
  everything = range(first, first + length)
  ring = hasattr(config, 'bits') and config.ring_flags(layer, HEADS)[head]
  if not ring:
    return list(everything)
  return [
    s
    for s in everything
    if s - first < config.sink or s > first + length - config.recent
  ]


def check_rows(cache, rows, exact=True):
  """Asserts that each row holds its tokens, at positions from 0 on.

  `exact` is about bounds: whether they must be tight.
  """
  np.testing.assert_array_equal(cache.used, [len(tokens) for tokens in rows])
  held = read(cache)
  for b, tokens in enumerate(rows):
    check_row(cache.config, held[b], tokens)
    if 'bounds' in cache.config.provides:
      check_bounds(cache, b, tokens, exact)
  if hasattr(cache, 'vacancy'):
    check_pool(cache)


def check_row(config, held, tokens, first=0):
  """Asserts that a row, as `read`, holds these tokens from `first` on."""
  for head, (keys, values) in enumerate(held):
    seen = visible(config, head, len(tokens), first)
    assert set(seen) <= set(keys) <= set(range(first, first + len(tokens)))
    for s in seen:
      token = tokens[s - first]
      for got, all_of in ((keys, KEYS), (values, VALUES)):
        want = all_of[token, head]
        assert np.abs(got[s] - want).max() <= error(config, want) + 1e-6


def check_bounds(cache, row, tokens, exact=True):
  """Asserts that bounds hold for the unquantised keys, and are tight."""
  kmin, kmax = map(np.asarray, cache.bounds())
  logical = getattr(cache.config, 'logical_page', cache.config.page)
  heads = cache.stats_heads() if hasattr(cache, 'stats_heads') else range(HEADS)
  for h, head in enumerate(np.asarray(heads)):
    for c in range(-(-len(tokens) // logical)):
      keys = KEYS[np.asarray(tokens[c * logical : (c + 1) * logical]), head]
      assert (kmin[row, h, c] <= keys.min(0)).all()
      assert (kmax[row, h, c] >= keys.max(0)).all()
      slack = 0 if exact else 1.05 * error(cache.config, keys).max() * 2
      assert (kmin[row, h, c] >= keys.min(0) - slack).all()
      assert (kmax[row, h, c] <= keys.max(0) + slack).all()


def check_pool(cache):
  """Asserts that pages are held or free, and that what is written is private.

  After `trim` nothing leaks.
  """
  table, used = np.asarray(cache.table), np.asarray(cache.used)
  page, pages = cache.page, cache.pool.k.shape[0]
  held = table[table >= 0]
  count = np.bincount(held, minlength=pages)
  taken = int(cache.vacancy.taken[0])
  vacant = np.asarray(cache.vacancy.order)[taken:]
  assert len(set(vacant.tolist())) == len(vacant)
  assert not count[vacant].any(), 'a page is held and free'
  full = ~np.asarray(cache.ring)
  for b in range(table.shape[0]):
    mine = table[b][table[b] >= 0]
    assert len(set(mine.tolist())) == len(mine), 'a page in two slots of a row'
    ring_pages = table[b][~full]
    assert (count[ring_pages[ring_pages >= 0]] == 1).all()
    if int(cache.status[b]) == 0:
      open_on = table[b][full][:, used[b] // page :]
      assert (count[open_on[open_on >= 0]] == 1).all(), 'may be overwritten'
  after = trim(jax.tree.map(jnp.copy, cache))
  left = np.bincount(
    np.asarray(after.table)[np.asarray(after.table) >= 0], minlength=pages
  )
  assert pages - int(after.vacancy.taken[0]) == int((left == 0).sum())
