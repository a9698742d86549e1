"""SnapKV's kept tokens against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas.selected_token import contiguous
from lcx.select import window
from lcx.select.snapkv import snapkv

BATCH, LENGTH, HEADS, KV_HEADS, DIM, PAGE, WINDOW = 2, 128, 4, 2, 8, 8, 4
LENGTHS = np.array([128, 93])


def draw(seed=0):
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(BATCH, LENGTH, HEADS, DIM)) * 2
  k = rng.normal(size=(BATCH, KV_HEADS, LENGTH, DIM))
  at = np.broadcast_to(np.arange(LENGTH), (BATCH, LENGTH))
  last, last_at = window.last_queries(
    jnp.asarray(q, jnp.float32),
    jnp.asarray(at),
    jnp.asarray(at < LENGTHS[:, None]),
    WINDOW,
  )
  return last, last_at, jnp.asarray(k, jnp.float32)


def votes_of(q, k, length):
  """What the window of one kv head looks at: q [G w H], k [S H], to [S]."""
  votes = np.zeros(LENGTH)
  for head in q:
    for i, one in enumerate(head):
      p = length - WINDOW + i
      score = k[: p + 1] @ one / np.sqrt(DIM)
      weight = np.exp(score - score.max())
      votes[: p + 1] += weight / weight.sum()
  return votes


def expected(q, k, since, length, keep, kernel, pool):
  """Kept positions of one kv head: q [G w H], k [S H]."""
  votes = votes_of(q, k, length)
  end = since // PAGE * PAGE
  votes[end:] = 0
  half = kernel // 2
  padded = np.pad(votes, half)
  windows = np.lib.stride_tricks.sliding_window_view(padded, kernel)
  pooled = windows.mean(1) if pool == 'avg' else windows.max(1)
  order = np.argsort(-pooled[:end], kind='stable')
  return sorted(order[:keep])


@pytest.mark.parametrize('pool', ['avg', 'max'])
def test_kept_tokens_are_the_definition(pool):
  q, at, k = draw()
  pages, ids, starts = contiguous(k, k, PAGE)
  since = jnp.asarray(LENGTHS - WINDOW, jnp.int32)
  rows, positions = snapkv(
    q, at, pages, ids, starts, since=since, keep=12, kernel=5, pool=pool
  )
  for b, h in np.ndindex(BATCH, KV_HEADS):
    group = np.asarray(q[b].reshape(KV_HEADS, -1, WINDOW, DIM)[h], np.float64)
    keys = np.asarray(k[b, h], np.float64)
    want = expected(group, keys, LENGTHS[b] - WINDOW, LENGTHS[b], 12, 5, pool)
    got = np.asarray(positions[b, h])
    if pool == 'avg':
      assert list(got) == want
    else:  # equal maxima beside one another: any of them will do
      assert len(set(got) & set(want)) >= 10
    tokens = np.asarray(pages.k.reshape(-1, DIM)[rows[b, h]])
    np.testing.assert_array_equal(tokens, k[b, h, got])


def test_a_large_budget_keeps_all_that_is_old():
  q, at, k = draw(1)
  pages, ids, starts = contiguous(k, k, PAGE)
  since = jnp.asarray(LENGTHS - WINDOW, jnp.int32)
  rows, positions = snapkv(q, at, pages, ids, starts, since=since, keep=LENGTH)
  for b in range(BATCH):
    end = (LENGTHS[b] - WINDOW) // PAGE * PAGE
    got = np.asarray(positions[b, 0])
    assert list(got[:end]) == list(range(end))
    assert np.all(np.asarray(rows[b, 0, end:]) == -1)


def test_last_queries_are_found_in_any_order():
  rng = np.random.default_rng(2)
  q = jnp.asarray(rng.normal(size=(1, 16, 2, DIM)), jnp.float32)
  order = rng.permutation(16)
  at = jnp.asarray(order)[None]
  found, found_at = window.last_queries(q, at, at < 10, 4)
  assert found_at.tolist() == [[6, 7, 8, 9]]
  for i, p in enumerate((6, 7, 8, 9)):
    np.testing.assert_allclose(found[0, :, i], q[0, list(order).index(p)])
  _, short = window.last_queries(q, at, at < 2, 4)
  assert short.tolist() == [[-1, -1, 0, 1]]


@pytest.mark.xdist_group('mesh')
def test_sharded_pages_keep_the_same_tokens():
  q, at, k = draw(3)
  since = jnp.asarray(LENGTHS - WINDOW, jnp.int32)
  pages, ids, starts = contiguous(k, k, PAGE)
  _, want = snapkv(q, at, pages, ids, starts, since=since, keep=12)
  mesh = jax.make_mesh((8,), ('seq',), axis_types=(jax.sharding.AxisType.Auto,))

  def piece(q, at, k, since):
    pages, ids, starts = contiguous(k, k, PAGE)
    starts += jax.lax.axis_index('seq') * k.shape[2]
    _, positions = snapkv(
      q, at, pages, ids, starts, since=since, keep=12, axis='seq'
    )
    return positions

  got = jax.jit(
    jax.shard_map(
      piece,
      mesh=mesh,
      in_specs=(P(), P(), P(None, None, 'seq'), P()),
      out_specs=P(None, None, 'seq'),
      check_vma=False,
    )
  )(q, at, k, since)
  for b, h in np.ndindex(BATCH, KV_HEADS):
    kept = sorted(int(x) for x in got[b, h] if x < LENGTH)
    assert kept == list(np.asarray(want[b, h]))


def test_refusals():
  q, at, k = draw()
  pages, ids, starts = contiguous(k, k, PAGE)
  since = jnp.zeros(BATCH, jnp.int32)
  for message, kwargs in (
    ('keep=0 must be', {'keep': 0}),
    ('kernel=4 must be odd', {'keep': 4, 'kernel': 4}),
    ("pool='sum' must be", {'keep': 4, 'pool': 'sum'}),
  ):
    with pytest.raises(ValueError, match=message):
      snapkv(q, at, pages, ids, starts, since=since, **kwargs)
