"""The host tier: what both tiers hold, what is given back, how rows fail."""

import concurrent.futures
import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import environment
from kernels_pallas.partial import Partial, merge
from lcx import cores
from lcx.cache import (
  CacheShape,
  Host,
  Shards,
  Status,
  host,
  host_calls,
  host_row,
)
from lcx.cache.host_calls import Fault
from lcx.cache.host_row import Near, Search
from lcx.select.vector_index import Numbers, has_faiss
from lcx.sharding import make_mesh, named
from tests.cache import reading
from tests.cache.reading import DIM, HEADS, KEYS, VALUES, empty, feed

CONFIG = Host(page=8, sink=5, recent=9, slack=4)
SEARCH = Search(top=10**6, effort=50, first=8, recent=9, page=8)
ROWS = [list(range(45)), list(range(100, 117)), [], list(range(200, 264))]
WIDE, NARROW = 23, 4


@pytest.fixture(autouse=True)
def nothing_is_left():
  """Every test gives back what it took."""
  before = host_calls.held_bytes()
  yield
  host_calls.release(list(host_calls._rows))
  assert host_calls.held_bytes() == 0 == before


def grow(rows, config=CONFIG):
  cache = empty(config, len(rows))
  for width, stop in ((WIDE, WIDE), (WIDE, 2 * WIDE), (WIDE, 3 * WIDE)):
    cache = feed(cache, [r[stop - WIDE : stop] for r in rows], width)
  return cache


def check_rows(cache, rows):
  """Both tiers hold the rows' tokens: the host all, the device its part."""
  np.testing.assert_array_equal(cache.used, [len(r) for r in rows])
  held = reading.read(cache.ring)
  for b, tokens in enumerate(rows):
    handle = int(cache.handles[b])
    if tokens:
      row = host_calls.row_of(handle)
      n = len(tokens)
      assert row.used >= n  # cut at the next call
      index = np.asarray(tokens, int)
      for mine, want in ((row.k, KEYS), (row.v, VALUES)):
        np.testing.assert_array_equal(mine[:, :n], want[index].swapaxes(0, 1))
      np.testing.assert_array_equal(row.at[:n], np.arange(n))
    for keys, _ in held[b]:
      seen = {s for s in range(len(tokens)) if s < 5 or s > len(tokens) - 9}
      assert seen <= set(keys)


def test_rows_hold_what_each_was_given():
  cache = grow(ROWS)
  check_rows(cache, ROWS)
  assert not np.asarray(cache.status).any()
  size = cache.nbytes('host')
  assert size['keys_and_values'] >= 2 * 126 * HEADS * DIM * 4
  assert sum(size.values()) == host_calls.held_bytes()
  with pytest.raises(ValueError, match='tier='):
    cache.nbytes('disk')
  cache.owned()()
  assert host_calls.held_bytes() == 0


@pytest.mark.parametrize('cut', [4, 1])
def test_append_truncate_append_equals_fresh(cut):
  rows = [r[: max(0, len(r) - cut)] for r in ROWS]
  cache = reading.truncate(grow(ROWS), np.array([len(r) for r in rows]))
  check_rows(cache, rows)
  new = [[300 + row] * cut for row in range(4)]
  cache = feed(cache, new, NARROW)
  check_rows(cache, [r + n for r, n in zip(rows, new)])
  assert not np.asarray(cache.status).any()


def test_fork_then_diverge_then_empty():
  cache = reading.fork(grow(ROWS), np.array([0, 0, 0, 1]))
  rows = [ROWS[0], ROWS[0], ROWS[0], ROWS[1]]
  new = [[300 + row] * (row + 1) for row in range(4)]
  rows = [r + n for r, n in zip(rows, new)]
  cache = feed(cache, new, NARROW)
  check_rows(cache, rows)
  before = host_calls.held_bytes()
  cache = reading.reset(cache, np.array([True, False, False, False]))
  cache = reading.free(cache, np.array([False, False, True, False]))
  rows[0] = rows[2] = []
  check_rows(cache, rows)
  assert host_calls.held_bytes() < 0.7 * before
  cache = feed(cache, [[1, 2], [3], [4], []], NARROW)
  check_rows(cache, [[1, 2], rows[1] + [3], [4], rows[3]])


def test_insert_replaces_one_row():
  other = feed(empty(CONFIG, 1), [list(range(300, 320))], WIDE)
  cache = reading.insert(grow(ROWS), np.int32(1), other)
  rows = [ROWS[0], list(range(300, 320)), ROWS[2], ROWS[3]]
  check_rows(cache, rows)
  new = [[7], [8, 9], [], []]
  check_rows(feed(cache, new, NARROW), [r + n for r, n in zip(rows, new)])


def test_a_gap_in_positions_drops_the_row_alone():
  cache = feed(empty(CONFIG, 4), [[1, 2, 3], [4], [], []], NARROW)
  cache = feed(cache, [[5], [6], [7], []], NARROW, [4, 1, 0, 0])
  np.testing.assert_array_equal(cache.status, [Status.POSITION_GAP, 0, 0, 0])
  check_rows(cache, [[1, 2, 3], [4, 6], [7], []])


def test_memory_is_bounded_and_others_keep_theirs():
  """A kilotoken of two heads is 128 KiB: two rows fit, the third does not."""
  config = Host(page=8, sink=5, recent=9, slack=4, gigabytes=0.3 / 1024)
  cache = feed(empty(config, 4), [[1], [2], [3], []], NARROW)
  np.testing.assert_array_equal(cache.status, [0, 0, Fault.FULL, 0])
  assert host_calls.held_bytes() <= config.bound()
  assert 'MemoryError' in host_calls.last_error
  cache = feed(cache, [[4], [], [], []], NARROW)
  kept = host_calls.row_of(int(cache.handles[0]))
  np.testing.assert_array_equal(kept.k[:, :2], KEYS[[1, 4]].swapaxes(0, 1))


def test_a_copy_without_room_ends_and_its_source_goes_on():
  cache = grow([ROWS[0], [], [], ROWS[3]])
  room = host_calls.held_bytes() + 1000
  config = dataclasses.replace(CONFIG, gigabytes=room / 2**30)
  handles = np.asarray(cache.handles)
  forked, fault = host_calls.fork(
    handles, cache.used, np.array([0, 0, 2, 3]), host=config
  )
  np.testing.assert_array_equal(fault, [0, Fault.FULL, 0, 0])
  np.testing.assert_array_equal(forked, [handles[0], 0, -1, handles[3]])
  assert host_calls.held_bytes() <= config.bound()


def test_an_index_counts_before_it_is_built():
  """A row that has no room for its index ends; it does not answer without."""
  rule = dataclasses.replace(SEARCH, top=4)
  cache = grow([ROWS[0], [], [], ROWS[3]])
  room = host_calls.held_bytes() + 30 * HEADS * (2 * DIM + 8)
  config = dataclasses.replace(CONFIG, gigabytes=room / 2**30)
  numbers = Numbers(kind='flat')
  one = jax.tree.map(np.asarray, near(4))
  fault = host_calls.index(
    cache.handles, cache.used, one, numbers=numbers, search=rule, folder='',
    host=config,
  )  # fmt: skip
  np.testing.assert_array_equal(fault.max(1), [0, 0, 0, Fault.FULL])
  assert host_calls.held_bytes() <= config.bound()


def test_threads_are_as_many_as_the_cores_that_the_process_is_bound_to():
  """`taskset -c 0-15` on a machine of 32 made 32, which waited for 16."""
  if not hasattr(os, 'sched_setaffinity'):
    pytest.skip('no binding on this platform')
  mine = os.sched_getaffinity(0)
  assert cores.available() == len(mine)
  try:
    os.sched_setaffinity(0, {min(mine)})
    assert cores.available() == 1
    assert environment.describe()['cores'] == 1
    assert host_calls.pool.__wrapped__()._max_workers == 1
  finally:
    os.sched_setaffinity(0, mine)


def test_a_thread_that_is_bound_counts_the_cores_of_its_process():
  """The pool is made by the thread of the first callback."""
  if not hasattr(os, 'sched_setaffinity'):
    pytest.skip('no binding on this platform')
  mine = os.sched_getaffinity(0)
  if len(mine) < 2:
    pytest.skip('needs two cores')

  def asked():
    os.sched_setaffinity(0, {min(mine)})  # this thread alone
    return len(os.sched_getaffinity(0)), cores.available()

  with concurrent.futures.ThreadPoolExecutor(1) as threads:
    assert threads.submit(asked).result() == (1, len(mine))


@pytest.mark.skipif(not has_faiss(), reason="needs faiss: 'lcx[index]'")
def test_tokens_that_join_count_and_a_row_without_room_ends_alone(monkeypatch):
  """Both want to join tokens; there is room for those of one."""
  monkeypatch.setattr(host_row, '_JOIN', 16)
  monkeypatch.setattr(host_row, '_WIDE', 16)
  rule = dataclasses.replace(SEARCH, top=4, mass=0.0)
  rows = [ROWS[0], [], [], ROWS[3]]
  cache = grow(rows)
  one = jax.tree.map(np.asarray, near(4))
  host_calls.index(
    cache.handles, cache.used, one, numbers=Numbers(kind='flat'), search=rule,
    folder='', host=CONFIG,
  )  # fmt: skip
  held = host_calls.known(np.asarray(cache.handles))
  for row in held:
    row.wait()
  new = np.zeros((4, 20, HEADS, DIM), np.float32)
  joins = HEADS * 16 * (2 * DIM + 8) + HEADS * 16 * DIM * 4  # and fresh ones
  room = host_calls.held_bytes() + int(1.5 * joins)
  config = dataclasses.replace(CONFIG, gigabytes=room / 2**30)
  used = np.asarray(cache.used)
  at = used[:, None] + np.arange(20)
  count = np.where(used > 0, 20, 0)
  numbers = np.concatenate(
    [np.stack([cache.handles, used, count], 1), at, np.zeros((4, HEADS))], 1
  ).astype(np.int32)
  asked = np.zeros((4, 20, HEADS, DIM + 1), np.float32)
  found = host_calls.attend(
    numbers, np.concatenate([new, new], 2), asked, search=rule, host=config
  )
  assert sorted(found[[0, 3], 1]) == [0, Fault.FULL]
  assert 'the bound is' in host_calls.last_error
  assert host_calls.held_bytes() <= config.bound()
  assert not any(row.growing for row in held)


def test_too_little_memory_is_refused_with_the_figure():
  class Model:
    dtype, head_dim, n_layers, n_kv_heads = 'bfloat16', 128, 32, 8

  # 2 * 128 * 2 B * 32 * 8 = 128 KiB a token, and a sixteenth of room.
  with pytest.raises(ValueError, match='take 17 GiB .* but 1 GiB'):
    Host(gigabytes=1.0).check(Model, 1 << 17, 1, None)
  Host(gigabytes=18.0).check(Model, 1 << 17, 1, None)
  with pytest.raises(ValueError, match='gigabytes=-1'):
    Host(gigabytes=-1)


def near(batch):
  shape = (batch, HEADS)
  return Near(
    None,
    None,
    None,
    None,
    np.zeros((*shape, 2, DIM), np.float32),
    np.zeros((*shape, 2, 3), np.int32),
    np.zeros((*shape, 2), np.int32),
    np.zeros((*shape, DIM), np.float32),
    np.full((*shape, DIM), 10.0, np.float32),
  )


def check_attention(cache, rows, new):
  """Feeds `new` and compares both tiers' attention with dense; the cache."""
  batch, t = len(rows), NARROW
  q = np.random.default_rng(1).normal(size=(batch, t, 2 * HEADS, DIM))
  count = np.array([len(n) for n in new], np.int32)
  tokens = np.array([n + [0] * (t - len(n)) for n in new])
  at = np.array([len(r) for r in rows])[:, None] + np.arange(t)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(cache, q, k, v, at, count):
    used = cache.used
    ready = cache.index(near(batch), Numbers(kind='exact'), SEARCH, '')
    cache = cache.append_device(k, v, at, count)
    lse = jnp.zeros(q.shape[:3])
    cache, found = cache.attend_host(used, q, k, v, at, lse, SEARCH, ready)
    return cache, found

  args = (q.astype('f'), KEYS[tokens], VALUES[tokens], at.astype('i'), count)
  cache, found = step(cache, *args)
  for b, (old, fresh) in enumerate(zip(rows, new, strict=True)):
    tokens = np.array(old + fresh, int)
    until = SEARCH.until(len(tokens))
    if cache.fault[b]:
      assert np.all(np.isneginf(found.lse[b]))
      continue
    seen = tokens[8:until] if until > 8 else tokens[:0]
    for i, n in np.ndindex(t, 2 * HEADS):
      if i >= len(fresh) or not len(seen):
        assert np.isneginf(found.lse[b, i, n])
        assert not np.any(found.out[b, i, n])
        continue
      score = KEYS[seen, n // 2] @ q[b, i, n] / DIM**0.5
      weight = np.exp(score)
      want = weight @ VALUES[seen, n // 2] / weight.sum()
      np.testing.assert_allclose(found.out[b, i, n], want, rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(
        found.lse[b, i, n], np.log(weight.sum()), rtol=1e-4, atol=1e-4
      )
  return cache, found


def test_the_host_attends_all_that_the_device_does_not():
  check_attention(grow(ROWS), ROWS, [[300, 301], [302], [303], [4, 5, 6, 7]])


def test_a_row_that_fails_is_said_and_the_others_answer(monkeypatch):
  cache = grow(ROWS)
  broken, gone = (host_calls.row_of(int(cache.handles[b])) for b in (0, 1))

  def search(*args):
    raise RuntimeError('a thread that searches')

  monkeypatch.setattr(broken, 'attend', search)
  host_calls.release([int(cache.handles[1])])
  assert gone.used == len(ROWS[1])
  cache, found = check_attention(cache, ROWS, [[1], [2], [3], [4]])
  np.testing.assert_array_equal(cache.fault, [Fault.FAILED, Fault.GONE, 0, 0])
  assert 'a thread that searches' in host_calls.last_error
  said = dict(zip(host_calls.STATS, np.asarray(found.stats[3]), strict=True))
  assert said['attended'] > 0 and 0 < said['python_us'] < said['host_us']
  assert host_calls.host_fault(Fault.FAILED) == 'host_failed'
  assert host_calls.host_fault(Status.OUT_OF_PAGES) == ''


@given(
  parts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
  seed=st.integers(0, 9),
)
def test_merged_parts_equal_the_whole(parts, seed):
  """Disjoint sets of keys, any of them empty, as device and host merge them."""
  from lcx.cache.host_row import Row

  draw = np.random.default_rng(seed)
  total = sum(parts)
  k, v = draw.normal(size=(2, total, 1, DIM)).astype(np.float32)
  q = (3 * draw.normal(size=(5, DIM))).astype(np.float32)
  nothing = jnp.zeros((5, 1, DIM)), jnp.full((5, 1), -jnp.inf)
  device = Partial(*nothing)
  first = 0
  for n in parts:
    row = Row(1, DIM, np.float32)
    row.write(0, k[first : first + n], v[first : first + n], np.arange(n))
    rule = Search(top=100, effort=1, first=0, recent=0, page=1)
    part = row.attend(q[None], np.zeros((1, 5), 'f'), rule, host_calls.pool())
    more = Partial(
      jnp.asarray(part.out[0][:, None]), jnp.asarray(part.lse[0])[:, None]
    )
    device = merge(device, more)
    first += n
  with np.errstate(divide='ignore'):
    weight = np.exp(q @ k[:, 0].T)
    want = weight @ v[:, 0] / np.maximum(weight.sum(1), 1e-30)[:, None]
    lse = np.log(weight.sum(1))
  np.testing.assert_allclose(device.lse[:, 0], lse, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(device.out[:, 0], want, rtol=1e-4, atol=1e-5)


def test_a_sharded_sequence_is_refused():
  shape = CacheShape(2, HEADS, DIM, 64, jnp.float32, shards=Shards(1, 2, 1))
  with pytest.raises(ValueError, match='mesh axis seq=2 must be 1'):
    CONFIG.init(shape)


@pytest.mark.mesh
def test_shards_of_rows_and_heads_keep_their_own():
  mesh = make_mesh(2, 1, 2)
  shape = CacheShape(4, HEADS, DIM, 64, jnp.float32, shards=Shards(2, 1, 2))
  specs = CONFIG.specs()
  cache = jax.device_put(CONFIG.init(shape), named(mesh, specs))
  tokens = jax.sharding.PartitionSpec('data', 'seq', 'model')
  rows = jax.sharding.PartitionSpec('data', 'seq')
  append = jax.jit(
    jax.shard_map(
      lambda c, k, v, p: c.append(k, v, p),
      mesh=mesh,
      in_specs=(specs, tokens, tokens, rows),
      out_specs=specs,
      check_vma=False,
    ),
    donate_argnums=0,
  )
  index = np.arange(4)[:, None] * 50 + np.arange(20)
  at = np.broadcast_to(np.arange(20, dtype=np.int32), (4, 20))
  cache = append(cache, KEYS[index], VALUES[index], at)
  assert not np.asarray(cache.fault).any()
  assert len(set(np.asarray(cache.handles).tolist())) == 8
  handles = np.asarray(cache.handles).reshape(2, 2, 2)  # data, model, row
  for d, m, b in np.ndindex(2, 2, 2):
    row = host_calls.row_of(int(handles[d, m, b]))
    want = KEYS[index[2 * d + b], m]
    np.testing.assert_array_equal(row.k[0, :20], want)


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_one_array_holds_all_that_a_call_takes(monkeypatch, dtype):
  draw = np.random.default_rng(0)
  b, t, n, kv, h = 2, 3, 4, 2, 6
  numbers = draw.integers(-9, 9, (b, 3 + t + kv)).astype(np.int32)
  asked = draw.normal(size=(b, t, n, h + 1)).astype(np.float32)
  asked[0, 0, 0] = -np.inf
  new = draw.normal(size=(b, t, 2 * kv, h)).astype(dtype)
  found = draw.integers(-9, 9, (b, 5)).astype(np.int32)

  def attend(*got, search, host):
    assert (search, host) == ('how', 'cache')
    for x, want in zip(got, (numbers, new, asked), strict=True):
      assert x.dtype == want.dtype
      np.testing.assert_array_equal(x, want)
    return found

  monkeypatch.setattr(host_calls, 'attend', attend)
  bits = [host._bits(jnp.asarray(x)) for x in (numbers, asked, new)]
  got = host_calls.attend_bits(
    np.concatenate(bits, 1), shape=(t, n, kv, h), dtype=new.dtype,
    search='how', host='cache',
  )  # fmt: skip
  assert got is found
