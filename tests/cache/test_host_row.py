"""One row in host memory: indexed search, when it is widened, what is kept."""

import concurrent.futures
import pathlib

import numpy as np
import pytest

from lcx.cache import host_row, host_step
from lcx.cache.host_row import Near, Row, Search
from lcx.cache.host_step import COUNTERS
from lcx.select import vector_index as vi

DIM, N, FIRST = 16, 1500, 64
SEARCH = Search(top=40, effort=80, first=FIRST, recent=32, page=16)
KIND = 'graph' if vi.has_faiss() else 'exact'
ROWS = ['kv_head', 'query_head', 'fastscan'] if vi.has_faiss() else ['kv_head']
POOL = concurrent.futures.ThreadPoolExecutor(2)


def drawn(n, seed=0, far=0.0):
  """Scaled-up queries of one distribution, keys of another; values."""
  draw = np.random.default_rng(seed)
  mix = np.random.default_rng(99).normal(size=(DIM, DIM)) / 2
  q = (draw.normal(size=(n, DIM)) @ mix + 1.5 + far).astype(np.float32)
  return q, *draw.normal(size=(2, n, 1, DIM)).astype(np.float32)


def exact(q, keys, c):
  return np.argsort(-(q @ keys.T), axis=1)[:, :c]


def sampled(keys):
  """What prefill says: positions are numbers."""
  q, _, _ = drawn(400, seed=1)
  score = keys @ keys.T
  np.fill_diagonal(score, -np.inf)
  return Near(
    exact(q[40:], keys, 32),
    np.arange(360) % 2,
    np.argsort(-score, axis=1)[:, :12],
    np.arange(len(keys)),
    q[:40],
    exact(q[:40], keys, 40),
    np.arange(40) % 2,
    q.mean(0),
    q.std(0),
  )


def make(kind=KIND, folder='', n=N, graphs='kv_head', **other):
  """A row whose tokens up to its recent ones are indexed.

  `other`: another `degree`, or other fields of `sampled`.
  """
  _, k, v = drawn(n)
  row = Row(1, DIM, np.float32)
  row.write(0, k, v, np.arange(n, dtype=np.int32))
  degree = other.pop('degree', 24)
  numbers = vi.Numbers(kind=kind, degree=degree, graphs=graphs)
  near = sampled(k[:, 0])._replace(**other)
  row.build(numbers, FIRST, SEARCH.until(n), [near], POOL, str(folder))
  return row


@pytest.fixture(scope='module')
def built():
  row = make()
  row.wait()
  return row


@pytest.fixture(scope='module', params=ROWS)
def one_or_two(request, built):
  """A row with a graph of both query heads, with one of each, with codes."""
  if request.param == 'kv_head':
    return built
  if request.param == 'fastscan':
    row = make('fastscan')
    row.wait()
    return row
  row = make(graphs='query_head')
  row.wait()
  assert row.indexes[0].graphs == 2 and row.nbytes > built.nbytes
  return row


def ask(row, q, device=-100.0, **rule):
  rule = Search(**(vars(SEARCH) | rule))
  device = np.full((1, len(q)), device, np.float32)
  part = row.attend(q[None] * DIM**-0.5, device, rule, POOL)
  part = part._replace(out=part.out[0], lse=part.lse[0], rest=part.rest[0])
  return part, dict(zip(COUNTERS, part.counts, strict=True))


def attended(row, q, tokens):
  """Attention over listed tokens [M c], as dense."""
  score = np.einsum('mh,mch->mc', q, row.k[0, tokens]) / DIM**0.5
  weight = np.exp(score)
  out = np.einsum('mc,mch->mh', weight, row.v[0, tokens])
  return out / weight.sum(1)[:, None], np.log(weight.sum(1))


def test_a_search_attends_the_best_tokens(one_or_two):
  built = one_or_two
  q, _, _ = drawn(8, seed=2)
  part, counts = ask(built, q, effort=300)
  stop = SEARCH.until(N)
  best = exact(q, built.k[0, FIRST:stop], 40) + FIRST
  out, lse = attended(built, q, best)
  assert np.abs(part.lse - lse).max() < 0.02
  assert np.abs(part.out - out).max() < 0.05
  assert counts['attended'] == 8 * 40 and counts['exact'] == 0
  _, whole = attended(built, q, np.tile(np.arange(FIRST, stop), (8, 1)))
  left = whole + np.log1p(-np.exp(lse - whole))
  assert np.abs(part.rest - left).max() < 0.6  # from 256 of 1400 keys


@pytest.mark.parametrize('top', [N, SEARCH.until(N) - FIRST - 1])
def test_all_keys_are_dense(one_or_two, top):
  """By a scan, and by a search of the graph for all but one."""
  q, _, _ = drawn(8, seed=2)
  part, counts = ask(one_or_two, q, top=top, effort=N)
  stop = SEARCH.until(N)
  tokens = np.tile(np.arange(FIRST, stop), (8, 1))
  out, lse = attended(one_or_two, q, tokens)
  np.testing.assert_allclose(part.lse, lse, rtol=1e-3, atol=3e-3)
  np.testing.assert_allclose(part.out, out, rtol=1e-2, atol=1e-2)
  assert counts['exact'] == (8 if top == N else 0)


class Marked:
  """An index of two graphs; a query's first element says whose it is."""

  graphs, nbytes, parts = 2, 0, ()

  def native(self, k, effort, graph):
    return None

  def search(self, q, k, effort, graph):
    np.testing.assert_allclose(q[:, 0], graph, atol=1e-6)
    tokens = np.tile(FIRST + np.arange(k), (len(q), 1))
    return np.zeros(tokens.shape, np.float32), tokens


def test_every_query_is_asked_of_its_own_heads_graph():
  row = make('exact')
  row.wait()
  row.calibration, row.indexes = None, [Marked()]
  q = np.zeros((7 * 2, DIM), np.float32)
  q[:, 0] = np.tile([0, 1], 7) * DIM**0.5  # [T G] -> [T * G]
  part, counts = ask(row, q)
  assert counts['attended'] >= 14 * 40 and np.all(np.isfinite(part.lse))


def test_too_small_a_share_takes_more_keys(built):
  """By the host's tokens alone; where the device's weigh more, it is enough."""
  q, _, _ = drawn(8, seed=2)
  little, _ = ask(built, q)
  share = np.exp(little.lse) / (np.exp(little.lse) + np.exp(little.rest))
  assert share.max() < 0.9
  part, counts = ask(built, q, mass=0.9, most=600)
  assert counts['more_keys'] >= 8 and counts['attended'] > 8 * 150
  assert np.all(part.lse > little.lse)
  _, counts = ask(built, q, mass=0.9, device=100.0)
  assert counts['more_keys'] == 0


def test_queries_unlike_the_prompts_search_wider(built):
  like, _, _ = drawn(6, seed=3)
  unlike, _, _ = drawn(2, seed=3, far=-30.0)
  _, counts = ask(built, like)
  assert counts['far'] == 0
  _, counts = ask(built, np.concatenate([like, unlike]))
  assert counts['far'] == 2
  assert counts['attended'] >= 6 * 40 + 2 * 80


class Stuck:
  """An index that finds the worst tokens, until it is asked for very many."""

  def __init__(self, row):
    self.row, self.asked = row, []
    self.nbytes, self.graphs, self.parts = 0, 1, ()

  def native(self, k, effort, graph):
    return None

  def search(self, q, k, effort, graph):
    del graph
    self.asked.append((k, effort))
    stop = self.row.indexed[1]
    score = q @ self.row.k[0, FIRST:stop].T
    worst = np.argsort(score, axis=1)[:, :k][:, ::-1]
    return np.take_along_axis(score, worst, 1), worst + FIRST


def test_a_search_that_fails_goes_on_to_all_keys():
  row = make('exact')
  row.wait()
  stuck = row.indexes[0] = Stuck(row)
  q, _, _ = drawn(4, seed=4)
  part, counts = ask(row, q)
  asked = list(dict.fromkeys(stuck.asked))  # queries go in several jobs
  assert asked == [(40, 80), (40, 160), (80, 320)]
  assert counts['exact'] == 4 and counts['more_effort'] == 12
  stop = SEARCH.until(N)
  out, lse = attended(row, q, np.tile(np.arange(FIRST, stop), (4, 1)))
  np.testing.assert_allclose(part.lse, lse, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(part.out, out, rtol=1e-3, atol=1e-4)


def test_new_tokens_are_seen_then_join_in_blocks():
  row = make(n=1000)
  row.wait()
  q, k, v = drawn(1100, seed=5)
  k[7] = q[0]  # what q[0] wants most
  row.write(1000, k, v, np.arange(1000, 2100, dtype=np.int32))
  until = SEARCH.until(2100)
  best = exact(q[:1], row.k[0, FIRST:until], 40) + FIRST
  assert best[0, 0] == 1007
  for joined in (False, True):
    if joined:
      row.join(until, POOL)
      assert row.indexed[1] == SEARCH.until(1000) + 1088  # and 16 fresh ones
    part, _ = ask(row, q[:1], effort=400)
    out, lse = attended(row, q[:1], best)
    assert np.abs(part.lse - lse).max() < 0.05
    assert np.abs(part.out - out).max() < 0.05
  row.truncate(1005)  # cut again, into what has joined
  assert row.indexed[1] == 1005
  part, _ = ask(row, q[:1], effort=400)
  best = exact(q[:1], row.k[0, FIRST : SEARCH.until(1005)], 40) + FIRST
  assert np.abs(part.lse - attended(row, q[:1], best)[1]).max() < 0.05


def test_tokens_behind_a_prompt_find_room():
  """A copy of all that a row holds would be a token's, and a layer's."""
  row = make(n=1000)
  row.wait()
  _, k, v = drawn(600, seed=5)
  at, keys = np.arange(1000, 1600, dtype=np.int32), row.k
  told = row.bytes_to_grow(30), row.nbytes
  row.write(1000, k[:30], v[:30], at[:30])
  assert row.k is keys and told == (0, row.nbytes)
  row.write(1030, k[30:], v[30:], at[30:])
  np.testing.assert_array_equal(row.k[0, 1000:1600], k[:, 0])
  np.testing.assert_array_equal(row.at[:1600], np.arange(1600))


@pytest.mark.skipif(not vi.has_faiss(), reason="needs faiss: 'lcx[index]'")
@pytest.mark.parametrize('kind', ['graph', 'fastscan', 'flat', 'hnsw'])
def test_keys_that_join_an_index_find_room(kind):
  row = make(kind, n=4400)
  row.wait()
  index = row.indexes[0]
  store = index.store if kind == 'fastscan' else index.index
  if kind == 'hnsw':
    from lcx.select.vector_index_native import faiss

    store = faiss.downcast_index(store.storage)
  before = int(store.codes.data())
  _, k, _ = drawn(64, seed=5)
  index.add(k[:, 0], np.arange(4400, 4464))
  assert int(store.codes.data()) == before


def test_rewinds_leave_an_index_as_large_and_as_good():
  """Each joins 512 tokens and takes them back; the last ones stay."""
  row = make(n=1000)
  row.wait()
  tokens = len(row.indexes[0].tokens)
  q, k, v = drawn(600, seed=5)
  for i in range(5):
    row.write(1000, k, v + i, np.arange(1000, 1600, dtype=np.int32))
    row.join(SEARCH.until(1600), POOL)
    assert row.indexed[1] >= SEARCH.until(1000) + 512
    assert len(row.indexes[0].tokens) <= 8 / 7 * tokens + 2 * 512
  part, _ = ask(row, q[:16], effort=200)
  best = exact(q[:16], row.k[0, FIRST : SEARCH.until(1600)], 40) + FIRST
  _, lse = attended(row, q[:16], best)
  assert np.abs(part.lse - lse).max() < 0.05


def test_bytes_of_tokens_that_join_are_told_before():
  row = make(n=1000)
  row.wait()
  _, k, v = drawn(1100, seed=5)
  row.write(1000, k, v, np.arange(1000, 2100, dtype=np.int32))
  for until in (SEARCH.until(1000) + 40, SEARCH.until(2100)):
    before, need = row.nbytes, row.bytes_to_join(until)
    row.join(until, POOL)
    assert need * 0.95 <= row.nbytes - before <= need * 1.05
    assert row.bytes_to_join(until) == 0


def test_a_cut_before_the_index_is_there_waits_for_it():
  row = make('exact', n=400)
  row.truncate(150)
  assert row.indexed == (FIRST, 150)
  part, counts = ask(row, drawn(2, seed=6)[0], recent=16, page=1)
  assert counts['attended'] == 2 * 40 and np.all(np.isfinite(part.lse))


def test_a_context_is_indexed_once(tmp_path):
  first = make(folder=tmp_path)
  first.wait()
  (path,) = tmp_path.iterdir()
  again = make(folder=tmp_path)
  again.wait()
  q, _, _ = drawn(3, seed=7)
  np.testing.assert_array_equal(ask(first, q)[0].out, ask(again, q)[0].out)
  assert len(list(tmp_path.iterdir())) == 1
  data = path.read_bytes()
  check_refused(tmp_path, path, data[:-100], 'truncated or damaged')
  other = make(folder=tmp_path / 'other', n=500)
  other.wait()
  (stranger,) = pathlib.Path(tmp_path / 'other').iterdir()
  check_refused(tmp_path, path, stranger.read_bytes(), 'of another context')


@pytest.mark.skipif(not vi.has_faiss(), reason="needs faiss: 'lcx[index]'")
def test_another_configuration_has_an_index_of_its_own(tmp_path):
  """Of the same keys; none serves another's request, none is in its way."""
  n = 256
  near = sampled(drawn(n)[1][:, 0])
  others = [
    {},
    {'degree': 16},
    {'graphs': 'query_head'},
    {'kind': 'hnsw'},
    {'kind': 'flat'},
    {'kind': 'fastscan'},
    {'kind': 'fastscan', 'held_out': near.held_out[::-1] + 1},
    {'near': near.near[:200], 'near_of': near.near_of[:200]},  # queries
    {'near': near.near[:, :16]},  # neighbours
    {'key_near': near.key_near[:, :6]},
  ]
  for i, other in enumerate(others):
    make(folder=tmp_path, n=n, **other).wait()
    assert len(list(tmp_path.iterdir())) == i + 1
  q, _, _ = drawn(8, seed=2)
  for other in others:
    saved, fresh = make(folder=tmp_path, n=n, **other), make(n=n, **other)
    for row in (saved, fresh):
      row.wait()
    for mine, want in zip(
      *(r.indexes[0].search(q, 20, 40) for r in (saved, fresh)), strict=True
    ):
      np.testing.assert_array_equal(mine, want)
  assert len(list(tmp_path.iterdir())) == len(others)
  # Keys alone make an IVF, flat or HNSW index: what queries said is no matter.
  make(folder=tmp_path, n=n, kind='flat', near=near.near[:200]).wait()
  assert len(list(tmp_path.iterdir())) == len(others)


def check_refused(folder, path, data, reason):
  """The request fails, every time; it does not answer without its index."""
  path.write_bytes(data)
  row = make(folder=folder)
  for _ in range(2):
    with pytest.raises(ValueError, match=reason):
      row.wait()


def test_values_of_16_bits_are_mixed_as_they_are():
  """Every finite one, in a float32's place; alone it is itself."""
  value = np.arange(65536, dtype=np.uint16).view(np.float16)
  value = value[np.isfinite(value)].reshape(-1, 1, 4)
  one = np.ones((len(value), 1), np.float32)
  got = host_step.mixed(one, value)
  np.testing.assert_array_equal(got, value[:, 0].astype(np.float32))
  draw = np.random.default_rng(0)
  value = draw.normal(size=(3, 50, 8)).astype(np.float16)
  weight = draw.random((3, 50)).astype(np.float32)
  for x in (value, value.astype(np.float32)):
    want = np.einsum('mc,mch->mh', weight.astype(float), value.astype(float))
    np.testing.assert_allclose(host_step.mixed(weight, x), want, rtol=1e-5)


@pytest.mark.parametrize('dtype', [np.float16, np.float32])
def test_a_scan_of_all_tokens_is_what_numpy_says(dtype):
  draw = np.random.default_rng(0)
  q = draw.normal(size=(3, 8)).astype(np.float32)
  for n in (0, 5, 256, 700):
    x = draw.normal(size=(n, 8)) * 10.0 ** draw.integers(-6, 4, n)[:, None]
    x = x.astype(dtype)  # 16-bit floats below 2^-14, too
    weight = draw.random((3, n)).astype(np.float32)
    for got, want in (
      (host_step.scanned(q, x), q.astype(float) @ x.T.astype(float)),
      (
        host_step.weighted_sum(weight, x),
        weight.astype(float) @ x.astype(float),
      ),
    ):
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('top', [40, N])
def test_an_exact_search_has_few_scores_at_once(monkeypatch, top):
  """Of many queries: 64 of 131,072 tokens would be 32 MiB a head, thrice."""
  _, k, v = drawn(N)
  row = Row(1, DIM, np.float32)
  row.write(0, k, v, np.arange(N, dtype=np.int32))
  q = drawn(8, seed=2)[0]
  want, _ = ask(row, q, top=top)
  seen, scanned = [], host_row.scanned

  def note(q, keys):
    seen.append(len(q) * len(keys))
    return scanned(q, keys)

  monkeypatch.setattr(host_row, 'scanned', note)
  monkeypatch.setattr(host_row, '_SCORES', 3 * N)
  got, counts = ask(row, q, top=top)
  assert len(seen) == 3 and max(seen) <= 3 * N
  assert counts['exact'] == 8
  np.testing.assert_allclose(got.lse, want.lse, rtol=1e-5)
  np.testing.assert_allclose(got.out, want.out, rtol=1e-5, atol=1e-6)


def test_products_with_many_keys_are_those_of_all():
  draw = np.random.default_rng(0)
  q = draw.normal(size=(2, 3, 8)).astype(np.float32)
  for n in (0, 5, 256, 700):
    keys = draw.normal(size=(2, n, 8)).astype(np.float32)
    want = np.einsum('kmh,knh->kmn', q, keys)
    got = host_step.products(q, keys)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
