"""What every cache must do, whatever it stores."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.keys import NEVER
from lcx.cache import CacheShape, Dense, Paged, Shards, Status
from tests.cache import reading
from tests.cache.reading import DIM, HEADS, check_row, check_rows, empty, feed

SMALL = dict(page=8, logical_page=4, sink=5, recent=9, slack=4)
CONFIGS = {
  'dense': Dense(page=8, stats=True),
  'paged': Paged(**SMALL),
  'mixed-int8': Paged(**SMALL, bits=8, ring_heads=((False, True),)),
  'rings-int4': Paged(**SMALL, bits=4, ring_heads='all'),
}
ROWS = [list(range(45)), list(range(100, 117)), [], list(range(200, 264))]
# All tests append 23 or 4 tokens to 4 rows: two compilations a cache.
WIDE, NARROW = 23, 4

every_cache = pytest.mark.parametrize('name', CONFIGS)


def unquantised(config):
  return getattr(config, 'bits', 16) == 16


def grow(config, rows):
  """A cache that was fed `rows` in uneven pieces: one long, many short."""
  cache = empty(config, len(rows))
  done = [0] * len(rows)
  width = WIDE
  while any(d < len(r) for d, r in zip(done, rows)):
    takes = [width - b % 2 for b in range(len(rows))]
    piece = [r[d : d + n] for r, d, n in zip(rows, done, takes)]
    done = [d + len(p) for d, p in zip(done, piece)]
    cache = feed(cache, piece, width)
    width = NARROW
  return cache


@every_cache
def test_ragged_rows_hold_what_each_was_given(name):
  cache = grow(CONFIGS[name], ROWS)
  check_rows(cache, ROWS)
  assert not np.asarray(cache.status).any()
  last = [len(r) - 1 for r in ROWS]
  np.testing.assert_array_equal(cache.last_position(), last)


@every_cache
def test_rows_equal_alone(name):
  together = reading.read(grow(CONFIGS[name], ROWS))
  for row in (0, 1):
    rows = [r if b == row else [] for b, r in enumerate(ROWS)]
    alone = reading.read(grow(CONFIGS[name], rows))
    chex.assert_trees_all_equal(together[row], alone[row])


@every_cache
@pytest.mark.parametrize('cut', [4, 1])
def test_append_truncate_append_equals_fresh(name, cut):
  config = CONFIGS[name]
  kept = [tokens[: max(0, len(tokens) - cut)] for tokens in ROWS]
  cache = reading.truncate(grow(config, ROWS), np.array(list(map(len, kept))))
  check_rows(cache, kept, exact=unquantised(config))
  new = [[300 + row] * cut for row in range(4)]
  more = [tokens + n for tokens, n in zip(kept, new)]
  cache = feed(cache, new, NARROW)
  check_rows(cache, more, exact=unquantised(config))
  if unquantised(config):
    logical = getattr(config, 'logical_page', config.page)
    for mine, fresh in zip(cache.bounds(), grow(config, more).bounds()):
      for row, tokens in enumerate(more):
        n = -(-len(tokens) // logical)
        np.testing.assert_array_equal(mine[row, :, :n], fresh[row, :, :n])


@every_cache
def test_drafts_are_rolled_back_again_and_again(name):
  config = CONFIGS[name]
  rows = [list(range(20)), [], list(range(9)), list(range(7))]
  cache = feed(empty(config, 4), rows, WIDE)
  for step in range(16):
    cache = feed(cache, [[400 + step] * 4] * 4, NARROW)
    rows = [r + [400 + step] * ((step + b) % 4) for b, r in enumerate(rows)]
    cache = reading.truncate(cache, np.array(list(map(len, rows))))
    held = reading.read(cache)
    for row, tokens in enumerate(rows):
      check_row(config, held[row], tokens)
  assert not np.asarray(cache.status).any()
  check_rows(cache, rows, exact=unquantised(config))


@every_cache
def test_fork_then_diverge(name):
  cache = reading.fork(grow(CONFIGS[name], ROWS), np.array([0, 0, 0, 1]))
  rows = [ROWS[0], ROWS[0], ROWS[0], ROWS[1]]
  check_rows(cache, rows)
  for step in range(3):
    new = [[300 + 10 * step + row] * (row + 1) for row in range(4)]
    rows = [r + n for r, n in zip(rows, new)]
    cache = feed(cache, new, NARROW)
    check_rows(cache, rows)
  assert not np.asarray(cache.status).any()


@every_cache
def test_rows_swap(name):
  cache = reading.fork(grow(CONFIGS[name], ROWS), np.array([3, 2, 1, 0]))
  check_rows(cache, ROWS[::-1])


@every_cache
def test_fork_then_cut_into_what_is_shared(name):
  config = CONFIGS[name]
  if getattr(config, 'has_ring', False):
    pytest.skip('rings cannot be cut so far: test_paged says what they do')
  cache = grow(config, [ROWS[0], [], [], []])
  cache = reading.fork(cache, np.array([0, 0, 0, 3]))
  cache = reading.truncate(cache, np.array([45, 13, 16, 0]))
  rows = [ROWS[0], ROWS[0][:13], ROWS[0][:16], []]
  check_rows(cache, rows)
  new = [[], list(range(300, 323)), list(range(330, 350)), [1]]
  cache = feed(cache, new, WIDE)
  check_rows(cache, [r + n for r, n in zip(rows, new)])


@every_cache
@pytest.mark.parametrize('how', ['free', 'reset'])
def test_emptied_rows_are_like_new(name, how):
  cache = grow(CONFIGS[name], ROWS)
  cache = getattr(reading, how)(cache, np.array([True, False, True, False]))
  rows = [[], ROWS[1], [], ROWS[3]]
  check_rows(cache, rows)
  cache = feed(cache, [ROWS[1], [], ROWS[0][:9], []], WIDE)
  check_rows(cache, [ROWS[1], ROWS[1], ROWS[0][:9], ROWS[3]])


@every_cache
def test_insert_replaces_one_row(name):
  config = CONFIGS[name]
  other = feed(empty(config, 1, capacity=32), [list(range(300, 323))], WIDE)
  cache = reading.insert(grow(config, ROWS), np.int32(1), other)
  rows = [ROWS[0], list(range(300, 323)), ROWS[2], ROWS[3]]
  check_rows(cache, rows)
  new = [list(range(330, 334))] * 3 + [[]]
  check_rows(feed(cache, new, NARROW), [r + n for r, n in zip(rows, new)])


@every_cache
def test_insert_refuses_what_does_not_fit(name):
  config = CONFIGS[name]
  cache = empty(config, 2, capacity=32)
  with pytest.raises(ValueError, match='insert takes one row'):
    cache.insert(0, empty(config, 2, capacity=32))
  if not getattr(config, 'endless', False):
    with pytest.raises(ValueError, match='insert takes one row'):
      cache.insert(0, empty(config, 1, capacity=64))


@every_cache
def test_positions_need_not_start_at_zero(name):
  config = CONFIGS[name]
  rows = [list(range(13)), [], [], []]
  cache = feed(empty(config, 4), rows, WIDE, [1000, 0, 0, 0])
  new = [[13, 14, 15, 16], [5, 6], [], []]
  cache = feed(cache, new, NARROW, [1013, 77, 0, 0])
  np.testing.assert_array_equal(cache.last_position(), [1016, 78, -1, -1])
  held = reading.read(cache)
  check_row(config, held[0], list(range(17)), first=1000)
  check_row(config, held[1], [5, 6], first=77)


@every_cache
def test_a_gap_in_positions_drops_the_row_alone(name):
  cache = feed(empty(CONFIGS[name], 4), [[1, 2, 3], [4], [], []], NARROW)
  cache = feed(cache, [[5], [6], [7], []], NARROW, [4, 1, 0, 0])
  np.testing.assert_array_equal(cache.status, [Status.POSITION_GAP, 0, 0, 0])
  check_rows(cache, [[1, 2, 3], [4, 6], [7], []])


@every_cache
def test_positions_may_jump_between_pages_alone(name):
  config = CONFIGS[name]
  k = np.ones((4, WIDE, HEADS, DIM), np.float32)
  positions = np.arange(WIDE, dtype=np.int32) + np.zeros((4, 1), np.int32)
  positions[0, 8:] += 100  # where the second page begins
  positions[1, 9:] += 100
  count = np.array([20, 20, 9, 0], np.int32)
  cache = reading.append(empty(config, 4), k, k, positions, count)
  np.testing.assert_array_equal(cache.status, [0, Status.POSITION_GAP, 0, 0])
  np.testing.assert_array_equal(cache.last_position(), [119, -1, 8, -1])
  np.testing.assert_array_equal(cache.page_starts()[0, 0, :3], [0, 108, 116])
  cache = reading.truncate(cache, np.array([10, 0, 8, 0]))
  np.testing.assert_array_equal(cache.last_position(), [109, -1, 7, -1])
  starts = np.asarray(cache.page_starts()[0, 0])
  assert sorted(starts[starts < NEVER]) == [0, 108]


@every_cache
def test_over_capacity_drops_whole_appends_of_the_row_alone(name):
  config = CONFIGS[name]
  if getattr(config, 'endless', False):
    pytest.skip('rings hold rows of any length')
  cache = grow(config, [ROWS[3][:62], [7], [], []])
  cache = feed(cache, [[1, 2, 3], [8], [], []], NARROW)
  np.testing.assert_array_equal(cache.status, [Status.OVER_CAPACITY, 0, 0, 0])
  cache = feed(cache, [[1], [9], [], []], NARROW)  # would fit: has a hole now
  check_rows(cache, [ROWS[3][:62], [7, 8, 9], [], []])
  cache = reading.truncate(cache, np.array([61, 3, 0, 0]))
  assert not np.asarray(cache.status).any()
  cache = feed(cache, [[1, 2, 3], [], [], []], NARROW)
  rows = [ROWS[3][:61] + [1, 2, 3], [7, 8, 9], [], []]
  check_rows(cache, rows, exact=unquantised(config))


@every_cache
def test_appends_trace_once_a_width(name):
  chex.clear_trace_counter()
  step = jax.jit(
    chex.assert_max_traces(lambda c, k, p: c.append(k, k, p), n=1),
    donate_argnums=0,
  )
  cache = empty(CONFIGS[name], 2)
  for i in range(12):
    cache = step(
      cache,
      jnp.ones((2, 1, HEADS, DIM)),
      jnp.full((2, 1), i, jnp.int32),
    )
  np.testing.assert_array_equal(cache.used, [12, 12])


@every_cache
@pytest.mark.parametrize('batch, heads', [(1, 1), (2, 2)])
def test_appends_write_in_place(name, batch, heads):
  """A copy of keys, values or statistics would need temporary memory."""
  config = CONFIGS[name]
  if 'mixed' not in name and batch == 2:
    heads = 1  # size 1 between larger ones once made XLA copy
  elif 'mixed' in name and heads == 1:
    pytest.skip('its flags are of two heads')
  shape = CacheShape(batch, heads, DIM, 1 << 16, jnp.float32)
  cache = jax.eval_shape(lambda: config.init(shape))
  kv = jax.ShapeDtypeStruct((batch, 1, heads, DIM), jnp.float32)
  positions = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
  step = jax.jit(lambda c, k, v, p: c.append(k, v, p), donate_argnums=0)
  memory = step.lower(cache, kv, kv, positions).compile().memory_analysis()
  parts = cache.nbytes()
  assert memory.alias_size_in_bytes == sum(parts.values())
  pools = [parts[x] for x in ('keys', 'values', 'stats') if parts[x]]
  if min(pools) > 1 << 18:  # rings alone are small
    assert memory.temp_size_in_bytes < min(pools) / 3


@every_cache
def test_a_shard_is_shaped_like_a_cache_of_its_own(name):
  config = CONFIGS[name]
  if 'mixed' in name:
    config = Paged(**SMALL, bits=8, ring_heads=((False, True, True, False),))
    alone = Paged(**SMALL, bits=8, ring_heads=((False, True),))
  else:
    alone = config
  sizes = Shards(data=2, seq=2, model=2)

  def piece(spec, leaf):
    shape = list(leaf.shape)
    for i, axes in enumerate(spec):
      for name in axes if isinstance(axes, tuple) else (axes,):
        parts = getattr(sizes, name) if name else 1
        assert shape[i] % parts == 0
        shape[i] //= parts
    return jax.ShapeDtypeStruct(shape, leaf.dtype)

  whole = config.init(CacheShape(4, 4, DIM, 128, jnp.float32, shards=sizes))
  pieces = jax.tree.map(
    piece,
    config.specs(),
    whole,
    is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec),
  )
  mine = alone.init(CacheShape(2, 2, DIM, 64, jnp.float32))
  for got, want in zip(jax.tree.leaves(pieces), jax.tree.leaves(mine)):
    assert (got.shape, got.dtype) == (want.shape, want.dtype)


@every_cache
def test_nbytes_are_those_of_the_arrays(name):
  cache = empty(CONFIGS[name], 2)
  total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  assert sum(cache.nbytes().values()) == total
  assert cache.nbytes('host') == {}
  with pytest.raises(ValueError, match='tier='):
    cache.nbytes('disk')


@pytest.mark.parametrize(
  'shape',
  [
    dict(batch=0),
    dict(capacity=0),
    dict(batch=3, shards=Shards(data=2)),
    dict(n_kv_heads=3, shards=Shards(model=2)),
  ],
)
def test_shapes_that_cannot_be_are_refused(shape):
  with pytest.raises(ValueError, match='must'):
    CacheShape(**(dict(batch=2, n_kv_heads=2, head_dim=8, capacity=8) | shape))
