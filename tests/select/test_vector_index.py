"""Indexes of keys: what they find, lose, save, and refuse."""

import dataclasses
import functools
import unittest.mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from lcx.select import vector_index as vi
from lcx.select import vector_index_cluster as vc
from lcx.select import vector_index_graph as vg
from lcx.select import vector_index_nearest as vn

N, DIM, C = 1500, 16, 20
FOUND = {
  'exact': 1.0,
  'flat': 0.99,
  'ivf': 0.8,
  'hnsw': 0.8,
  'graph': 0.9,
  'graph/query_head': 0.9,
  'fastscan': 0.98,
}
needs_faiss = pytest.mark.skipif(
  not vi.has_faiss(), reason="needs faiss: pip install 'lcx[index]'"
)
KINDS = [
  'exact', *(pytest.param(k, marks=needs_faiss) for k in list(FOUND)[1:])
]  # fmt: skip


def vectors(n=N, queries=600, seed=0):
  """Keys in clumps; queries of another distribution, far from them."""
  draw = np.random.default_rng(seed)
  centres = draw.normal(size=(24, DIM))
  x = centres[draw.integers(0, 24, n)] + 0.5 * draw.normal(size=(n, DIM))
  q = draw.normal(size=(queries, DIM)) @ draw.normal(size=(DIM, DIM)) / 2
  q += 2.0 * draw.normal(size=DIM)
  return x.astype(np.float32), q.astype(np.float32)


def exact(q, x, c=C):
  return np.argsort(-(q @ x.T), axis=1)[:, :c]


class Queries:
  def __init__(self, x, q):
    self.near = exact(q[100:], x)
    score = x @ x.T
    np.fill_diagonal(score, -np.inf)
    self.key_near = np.argsort(-score, axis=1)[:, :12]
    self.held_out, self.held_near = q[50:100], exact(q[50:100], x)
    self.near_of, self.held_of = np.arange(500) % 2, np.arange(50) % 2


@functools.cache
def said():
  x, q = vectors()
  return x, q, Queries(x, q)


def make(kind, first=7):
  x, q, queries = said()
  kind, _, graphs = kind.partition('/')
  numbers = vi.Numbers(kind=kind, lists=20, graphs=graphs or 'kv_head')
  return vi.build(numbers, x, first, queries), x, q[:50], numbers


def recall(found, wanted, first=7):
  hit = (wanted[:, :, None] == found[:, None] - first).any(2)
  return hit.mean()


@pytest.mark.parametrize('kind', KINDS)
def test_an_index_finds_the_largest_products(kind):
  index, x, q, _ = make(kind)
  score, found = index.search(q, C, effort=20 if kind == 'ivf' else 64)
  assert recall(found, exact(q, x)) >= FOUND[kind]
  there = np.take_along_axis(q @ x.T, found - 7, 1)
  np.testing.assert_allclose(score, there, rtol=2e-2, atol=2e-2)
  assert np.all(np.diff(score, axis=1) <= 1e-5)
  assert index.nbytes > 0


@pytest.mark.parametrize('kind', KINDS)
def test_keys_are_added_removed_and_replaced(kind):
  index, x, q, _ = make(kind)
  best = 3 * q[:1]  # no key's product with q[0] is larger
  index.add(best, np.array([7 + N]))
  effort = 20 if kind == 'ivf' else 300
  assert index.search(q[:1], 5, effort)[1][0, 0] == 7 + N
  index.remove(np.array([7 + N]))
  assert index.search(q[:1], 5, effort)[1][0, 0] == 7 + exact(q[:1], x)[0, 0]
  index.remove(np.arange(7 + N // 2, 7 + N))
  _, found = index.search(q, C, 400)
  assert found.max() < 7 + N // 2
  index.add(best, np.array([7 + N // 2]))
  assert index.search(q[:1], 5, effort)[1][0, 0] == 7 + N // 2


@pytest.mark.parametrize('kind', KINDS)
def test_chosen_tokens_are_removed_and_others_found(kind):
  """Here and there: a few are passed over, many give their memory back."""
  index, x, q, _ = make(kind)
  draw = np.random.default_rng(4)
  # All that some queries want, and others at random.
  gone = np.unique(exact(q[:3], x))
  before, n = index.nbytes, len(index.tokens)
  for share in (0.0, 0.6):
    more = np.flatnonzero(draw.random(N) < share)
    gone = np.union1d(gone, more)
    index.remove(7 + gone)
    left = np.setdiff1d(np.arange(N), gone)
    for graph in range(index.graphs):
      score, found = index.search(q, C, 20 if kind == 'ivf' else 64, graph)
      assert not np.isin(found - 7, gone).any() and found.min() >= 0
      assert recall(found, left[exact(q, x[left])]) >= FOUND[kind] - 0.02
      there = np.take_along_axis(q @ x.T, found - 7, 1)
      np.testing.assert_allclose(score, there, rtol=2e-2, atol=2e-2)
  assert len(index.tokens) <= 8 / 7 * len(left)
  assert index.nbytes < 1.2 * before * len(left) / n + 4096
  assert index.search(q, N, 64)[1].shape[1] == len(left)  # asked for more
  index.remove(7 + np.arange(N))
  assert index.search(q, C, 64)[1].shape == (50, 0)
  index.add(x[:100], 7 + np.arange(100))  # and from nothing again
  assert recall(index.search(q, C, 64)[1], exact(q, x[:100])) > 0.9


@pytest.mark.parametrize('kind', KINDS)
def test_a_saved_index_has_what_joined_and_grows_alike(kind):
  index, x, q, numbers = make(kind)
  draw = np.random.default_rng(3)
  more = x[draw.permutation(N)[:300]] + 0.1
  index.add(more[:200], 7 + N + np.arange(200))
  index.remove(7 + np.arange(N - 50, N + 20))
  again = vi.from_bytes(vi.to_bytes(index, numbers, ''), numbers, '')
  for grown in (False, True):
    if grown:
      for each in (index, again):
        each.add(more[200:], 7 + N + 200 + np.arange(100))
        each.remove(7 + np.arange(200, 500))
    np.testing.assert_array_equal(index.tokens, again.tokens)
    for graph in range(index.graphs):
      for mine, want in zip(
        *(i.search(q, C, 50, graph) for i in (again, index)), strict=True
      ):
        np.testing.assert_array_equal(mine, want)


@pytest.mark.parametrize('kind', KINDS)
def test_a_saved_index_is_the_same(kind):
  index, x, q, numbers = make(kind)
  of = vi.fingerprint(numbers, x, 7)
  data = vi.to_bytes(index, numbers, of)
  again = vi.from_bytes(data, numbers, of)
  for a, b in zip(index.search(q, C, 50), again.search(q, C, 50), strict=True):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(ValueError, match='truncated or damaged'):
    vi.from_bytes(data[:-9], numbers, of)
  with pytest.raises(ValueError, match='another context'):
    vi.from_bytes(data, numbers, vi.fingerprint(numbers, x + 1, 7))
  with pytest.raises(ValueError, match='built otherwise'):
    vi.from_bytes(data, dataclasses.replace(numbers, seed=1), of)


@needs_faiss
def test_a_graph_a_query_head_is_made_of_its_own_queries():
  """Two heads whose queries point opposite ways, over one store of keys.

  By one graph, made of both heads' queries, the same is found at equal effort;
  links are half as many then, keys alike.
  """
  x, q = vectors()
  q[1::2] *= -1
  both = make_of(x, q, 'query_head')
  one = make_of(x, q, 'kv_head')
  assert (both.graphs, one.graphs) == (2, 1)
  links = N * (4 * 32 + 12)
  assert both.nbytes == one.nbytes + links
  # Of the keys, and of the tokens' numbers, there is one copy.
  assert one.nbytes == links + N * (2 * DIM + 8)
  for index, graphs in ((both, 'query_head'), (one, 'kv_head')):
    numbers = vi.Numbers(graphs=graphs)
    assert index.nbytes == N * numbers.bytes_per_key(DIM, 2)
    for head in (0, 1):
      mine = q[head:50:2]
      _, found = index.search(mine, C, 64, head % index.graphs)
      assert recall(found, exact(mine, x)) > 0.9


@needs_faiss
def test_graphs_that_share_keys_grow_together():
  index, x, q, _ = make('graph/query_head')
  draw = np.random.default_rng(3)
  more = x[draw.permutation(N)[:300]] + 0.1
  index.add(more, 7 + N + np.arange(300))
  assert index.index.ntotal == N + 300
  want = exact(q, np.concatenate([x, more]))
  for graph in (0, 1):
    assert index.hnsw[graph].ntotal == N + 300
    score, found = index.search(q, C, 300, graph)
    assert recall(found, want) > 0.85
    there = np.take_along_axis(q @ np.concatenate([x, more]).T, found - 7, 1)
    np.testing.assert_allclose(score, there, rtol=2e-2, atol=2e-2)
  again = vi.from_bytes(vi.to_bytes(index, vi.Numbers(), ''), vi.Numbers(), '')
  for graph in (0, 1):  # upper levels that came with new keys, too
    np.testing.assert_array_equal(
      again.search(q, C, 50, graph)[1], index.search(q, C, 50, graph)[1]
    )


@needs_faiss
def test_a_scan_of_codes_is_ranked_by_exact_products():
  """With all keys ranked it is a scan of the keys, a removed one is gone."""
  index, x, q, numbers = make('fastscan')
  x = x.astype(np.float16).astype(np.float32)
  found = index.search(q, C, N)[1]
  np.testing.assert_array_equal(found - 7, exact(q, x))
  few = [recall(index.search(q, C, e)[1], exact(q, x)) for e in (C, 2 * C)]
  assert few[0] < few[1] < 1
  # 4 bits and 16 of each element, and the tokens' numbers; codes by 32 keys.
  assert 0 <= index.nbytes - N * numbers.bytes_per_key(DIM, 1) < 32 * DIM
  index.remove(found[0])
  assert index.search(q, N, 0)[1].shape == (50, N - C)
  assert index.index.ntotal == index.store.ntotal == N - C


@needs_faiss
def test_keys_are_coded_for_the_queries_that_ask():
  """Products are kept, errors even; what no query asks for takes no levels."""
  from lcx.select import vector_index_scan as vs

  x, q = vectors()
  x[:, :4] *= 30.0
  q[:, :4] /= 100.0
  a, b, fine = vs.balanced(x - x.mean(0), q, 0)
  assert fine == DIM
  np.testing.assert_allclose(a @ b.T, np.eye(DIM), atol=1e-3)
  error = np.var(x @ a, axis=0) @ np.mean((q @ b) ** 2, axis=0)
  both = np.linalg.eigvals(np.cov(x.T) @ (q.T @ q) / len(q)).real
  best = np.sqrt(np.maximum(both, 0)).sum() ** 2 / DIM
  assert 0.7 * best < error < 1.5 * best  # by chance, and by those to come
  assert error < np.var(x, axis=0) @ np.mean(q**2, axis=0)
  assert error < 0.3 * np.var(x, axis=0).sum() * np.mean(q**2)
  numbers = vi.Numbers(kind='fastscan')
  found = [
    recall(vi.build(numbers, x, 0, said).search(q[:50], C, 2 * C)[1],
           exact(q[:50], x), 0)
    for said in (Queries(x, q), None)
  ]  # fmt: skip
  assert found[0] > found[1] and found[0] > 0.95


@needs_faiss
def test_few_bits_go_to_elements_that_products_are_made_of():
  """As many in all; by them, half of the bits find about as much."""
  from lcx.select import vector_index_scan as vs

  assert vs.shared_out(np.ones(8), 4) == (8, 8)
  assert vs.shared_out(np.ones(8), 2) == (8, 0)
  assert vs.shared_out(10.0 ** -np.arange(8), 2) == (4, 4)
  assert vs.shared_out(0.7 ** np.arange(8), 3) == (8, 4)
  x, q = vectors(queries=1100)
  for i in range(DIM):  # variances of products fall by 0.6 an element
    x[:, i] *= 0.88**i
    q[:, i] *= 0.88**i
  a, b, fine = vs.balanced(x - x.mean(0), q, 0, 2)
  assert 0 < fine < a.shape[1] < DIM
  assert 2 * fine + a.shape[1] - fine == DIM
  error, left = (x - x.mean(0)) @ (a @ b.T - np.eye(DIM)), x - x.mean(0)
  error = np.mean((error @ q.T) ** 2) / np.mean((left @ q.T) ** 2)
  assert error < 0.01
  found = {}
  for bits in (2, 3, 4):
    index = vi.build(vi.Numbers('fastscan', bits=bits), x, 0, Queries(x, q))
    found[bits] = recall(index.search(q[:50], C, 2 * C)[1], exact(q[:50], x), 0)
    codes = index.nbytes - index.tokens.nbytes - index.store.code_size * N
    assert 0 <= codes - N * DIM * bits // 8 < 32 * DIM
  assert found[2] > 0.95 and found[3] > 0.97
  # 2 bits of each element find 0.77.


@needs_faiss
@pytest.mark.parametrize('dim', [2, 6, 80, 128])
@pytest.mark.parametrize('bits', [2, 3, 4])
def test_keys_of_any_width_are_scanned(dim, bits):
  draw = np.random.default_rng(0)
  x, q = (draw.normal(size=(n, dim)).astype(np.float32) for n in (333, 20))
  numbers = vi.Numbers(kind='fastscan', bits=bits)
  index = vi.build(numbers, x, 0)
  found = index.search(q, 10, 100)[1]
  assert recall(found, exact(q, x, 10), 0) > 0.95
  again = vi.from_bytes(vi.to_bytes(index, numbers, ''), numbers, '')
  np.testing.assert_array_equal(again.search(q, 10, 100)[1], found)


@needs_faiss
def test_elements_that_do_not_vary_are_scanned():
  x, q = vectors()
  x[:, 3], x[:, 4:] = 100.0, 0.0
  index = vi.build(vi.Numbers(kind='fastscan'), x, 0)
  assert recall(index.search(q, C, 4 * C)[1], exact(q, x), 0) > 0.95
  index = vi.build(vi.Numbers(kind='fastscan'), 0 * x[:1], 0)
  assert index.search(q[:1], C, 9)[1].tolist() == [[0]]


def apart(found, asked):
  """What `together` found, by what was asked."""
  cuts = np.cumsum([len(q) for _, _, q in asked])
  return list(zip(*(np.split(x, cuts[:-1]) for x in found), strict=True))


@needs_faiss
@pytest.mark.parametrize('jobs', [1, 4, 9])
@pytest.mark.parametrize('kind', list(FOUND)[1:])
def test_several_indexes_are_searched_in_one_call(kind, jobs):
  """Each its own queries, more and fewer; as it is by itself."""
  (one, _, q, _), (other, *_) = make(kind), make(kind, first=70)
  other.add(3 * q[:1], np.array([70 + N]))
  last = one.graphs - 1
  asked = [(one, last, q[:5]), (other, 0, q[5:6]), (other, last, q[:3])]
  for k, effort in ((C, 50), (5, 8)):
    got = apart(vi.together(asked, k, effort, jobs), asked)
    for (index, graph, some), mine in zip(asked, got, strict=True):
      want = index.search(some, k, effort, graph)
      for a, b in zip(mine, want, strict=True):
        np.testing.assert_array_equal(a, b)
  assert got[2][1][0, 0] == 70 + N
  assert vi.together(asked, N + 1, 50, jobs) is None
  other.remove(np.arange(70 + N - 5, 70 + N + 1))
  if kind == 'fastscan':  # what is removed is not there
    found = apart(vi.together(asked, C, 50, jobs), asked)
    assert found[2][1].max() < 70 + N - 5
  else:
    assert vi.together(asked, C, 50, jobs) is None


@needs_faiss
def test_a_native_call_that_fails_raises_and_the_next_one_answers():
  from lcx.select import vector_index_native as native

  index, _, q, _ = make('flat')
  untrained = native.faiss.index_factory(DIM, 'IVF4,Flat')
  with pytest.raises(RuntimeError, match='is_trained'):
    native.search([index.native(C, 0), untrained], [q[:3], q[:2]], C, 4)
  both = [index.native(C, 0)] * 2
  _, found, first = native.search(both, [q[:3], q[:2]], C, 4)
  assert first == [0, 3, 5]
  np.testing.assert_array_equal(found[3:] + 7, index.search(q[:2], C, 0)[1])


@needs_faiss
@pytest.mark.parametrize('parts', [2, 3])
def test_parts_of_a_heads_keys_find_what_one_index_does(parts, monkeypatch):
  """At once, by search, after keys joined and left, and loaded again."""
  from lcx.select import vector_index_split as splits

  monkeypatch.setattr(splits, 'LEAST', 100)
  x, q = vectors()
  numbers = vi.Numbers(kind='fastscan', bits=2, parts=parts)
  one = vi.build(dataclasses.replace(numbers, parts=1), x, 7, Queries(x, q))
  some = vi.build(numbers, x, 7, Queries(x, q))
  assert len(some.parts) == parts and one.parts == ()
  assert vi.build(numbers, x[:199], 7).parts == ()  # too few
  assert [p.step for p in some.parts] == [parts] * parts and one.step == 1

  def check(jobs):
    for effort in (len(one.tokens), 3 * C):
      asked = [(some, 0, q[:5]), (some, 0, q[5:9]), (some, 0, q[:2])]
      got = apart(vi.together(asked, C, effort, jobs), asked)
      for (_, _, ask), mine in zip(asked, got, strict=True):
        by_itself = some.search(ask, C, effort)
        for a, b in zip(mine, by_itself, strict=True):
          np.testing.assert_array_equal(a, b)
        want = one.search(ask, C, effort)
        if effort >= len(one.tokens):  # all keys are ranked
          np.testing.assert_allclose(mine[0], want[0], rtol=1e-5)
          same = np.mean(mine[1] == want[1])
          assert same == 1 or len(set(want[0].ravel())) < want[0].size
        else:
          assert recall(mine[1], want[1], 0) > 0.9

  def alike(work):
    for index in (one, some):
      work(index)

  check(8)
  more, _ = vectors(65, seed=1)
  alike(lambda i: i.add(more, 7 + N + np.arange(65)))
  assert [p.step for p in some.parts] == [parts] * parts
  check(2 * parts)
  alike(lambda i: i.remove(np.arange(7 + N - 10, 7 + N + 65)))
  assert all(p.step for p in some.parts)
  check(40)
  alike(lambda i: i.remove(np.array([100, 300, 305])))
  assert not all(p.step for p in some.parts)  # a hole
  check(8)
  found = some.search(q, C, 3 * C)
  some = vi.from_bytes(vi.to_bytes(some, numbers, 'x'), numbers, 'x')
  for a, b in zip(found, some.search(q, C, 3 * C), strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(np.sort(some.tokens), np.sort(one.tokens))
  asked = [(some, 0, q[:5]), (one, 0, q[:2])]
  assert vi.together(asked, C, 50, 4) is None  # another number of parts
  with pytest.raises(ValueError, match='parts=2'):
    vi.Numbers(kind='flat', parts=2)


def make_of(x, q, graphs):
  numbers = vi.Numbers(graphs=graphs)
  return vi.build(numbers, x, 7, Queries(x, q))


def test_numbers_that_make_no_index_are_refused():
  with pytest.raises(ValueError, match="graphs='head' must be 'kv_head' or"):
    vi.Numbers(graphs='head')
  with pytest.raises(ValueError, match="'query_head' is of kind 'graph', not"):
    vi.Numbers(kind='ivf', graphs='query_head')
  with pytest.raises(ValueError, match='must be one of'):
    vi.Numbers(kind='tree')
  with pytest.raises(ValueError, match='degree=5 must be even'):
    vi.Numbers(degree=5)
  with pytest.raises(ValueError, match="projection='star' must be"):
    vi.Numbers(projection='star')


def test_without_faiss_a_line_names_the_extra(monkeypatch):
  monkeypatch.setattr(vi, 'has_faiss', lambda: False)
  with pytest.raises(ValueError, match=r'lcx\[index\].*retrieval_cluster'):
    vi.require('graph')
  vi.require('exact')


@pytest.mark.parametrize('projection', ['pivot', 'clique'])
@pytest.mark.parametrize('by_key', [True, False])
def test_every_key_can_be_reached(projection, by_key):
  x, q = vectors(400, 160)
  queries = Queries(x, q)
  links, entry = vg.graph(
    queries.near,
    vg.between_keys(queries.key_near, 400, 8) if by_key else None,
    400,
    degree=16,
    projection=projection,
  )
  assert links.shape == (400, 16) and links.max() < 400
  for node, row in enumerate(links):
    kept = row[row >= 0]
    assert node not in kept and len(set(kept)) == len(kept)
    assert np.all(row[len(kept) :] == -1)
  seen, front = {entry}, [entry]
  while front:
    front = {int(b) for a in front for b in links[a] if b >= 0} - seen
    seen |= front
  assert len(seen) > 390


@needs_faiss
def test_queries_that_want_no_indexed_key_leave_a_graph_by_keys():
  x, q = vectors(400, 160)
  queries = Queries(x, q)
  queries.near = queries.near[:0]
  queries.near_of = queries.near_of[:0]
  index = vi.build(vi.Numbers(), x, 0, queries)
  _, found = index.search(x[:20], 5, 64)
  assert recall(found, exact(x[:20], x, 5), 0) > 0.8


def test_nearest_keys_are_exact_and_causal(monkeypatch):
  monkeypatch.setattr(vn, '_SCORES', 4 * 45)
  monkeypatch.setattr(vn, '_ROWS', 4)
  monkeypatch.setattr(vn, '_GROUP', 2)
  draw = np.random.default_rng(0)
  q = draw.normal(size=(2, 2, 7, DIM)).astype(np.float32)
  k = draw.normal(size=(2, 45, 2, DIM)).astype(np.float32)
  at = np.broadcast_to(np.arange(45), (2, 45)).astype(np.int32)
  q_at = draw.integers(0, 45, (2, 2, 7)).astype(np.int32)
  q_at[0, 0, 0] = 3
  got = np.asarray(vn.nearest(q, q_at, k, at, 6))
  for b, h, m in np.ndindex(2, 2, 7):
    p = q_at[b, h, m]
    want = np.argsort(-(k[b, : p + 1, h] @ q[b, h, m]))[:6]
    np.testing.assert_array_equal(got[b, h, m, : len(want)], want)
    assert np.all(got[b, h, m, len(want) :] == -1)
  own = np.asarray(
    vn.nearest(k.swapaxes(1, 2), at[:, None].repeat(2, 1), k, at, 6, False)
  )
  assert not np.any(own == np.arange(45)[:, None])


@hypothesis.given(
  rows=st.lists(st.integers(-3, 3), min_size=1, max_size=60),
  count=st.integers(1, 5),
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_the_best_of_groups_are_the_best(rows, count):
  """Ties and rows without a value included; no place twice."""
  x = jnp.array([rows, rows[::-1]], jnp.float32)
  x = jnp.where(x == -3, -jnp.inf, x)
  count = min(count, len(rows))
  with unittest.mock.patch.object(vn, '_GROUP', 2):
    value, index = vn.top_of_groups(x, count)
  np.testing.assert_array_equal(value, jax.lax.top_k(x, count)[0])
  for row, v, i in zip(np.asarray(x), *map(np.asarray, (value, index))):
    some = v > -np.inf
    np.testing.assert_array_equal(row[i[some]], v[some])
    assert len(set(i[some])) == some.sum()


def test_sampled_tokens_are_valid_and_spread():
  valid = jnp.arange(40) < jnp.array([[40], [17], [3], [0]])
  index, new = vn.sampled(valid, 8)
  for row, count in enumerate((40, 17, 3)):
    kept = np.asarray(index[row])[np.asarray(new[row])]
    assert len(set(kept)) == len(kept) == min(8, count)
    assert kept.max() < count
  assert not np.any(new[3])


def test_clusters_partition_their_keys():
  x, _ = vectors(256)
  means, size, order = vc.kmeans(jnp.asarray(x), 16)
  assert int(size.sum()) == 256
  np.testing.assert_array_equal(np.sort(order), np.arange(256))
  first = 0
  for mean, n in zip(means, np.asarray(size), strict=True):
    if n:
      own = x[np.asarray(order)[first : first + n]]
      np.testing.assert_allclose(mean, own.mean(0), atol=1e-4)
    first += n


def test_probed_clusters_find_the_best_tokens():
  """All probed: exactly the best by votes; a third probed: most of them."""
  x, q = vectors(512)
  mesh = jax.make_mesh((1,), ('seq',), axis_types=(jax.sharding.AxisType.Auto,))
  index = vc.Clusters.empty(1, 1, DIM, 2, 256, 16)
  for part in (x[:256], x[256:]):
    index = index.join(jnp.asarray(part)[None, None], jnp.array([True]), 16)
  grouped = jnp.asarray(q[:30]).reshape(1, 1, 15, 2, DIM)

  def run(probe):
    spec = jax.sharding.PartitionSpec()
    search = jax.shard_map(
      lambda g: vc.search(
        index,
        g,
        lambda tokens: jnp.asarray(x)[tokens],
        probe=probe,
        top=C,
        axis='seq',
      ),
      mesh=mesh,
      in_specs=spec,
      out_specs=spec,
      check_vma=False,
    )
    return jax.jit(search)(grouped)

  logits = np.einsum('tgh,sh->tgs', grouped[0, 0], x) / DIM**0.5
  weight = np.exp(logits - logits.max(-1, keepdims=True))
  votes = (weight / weight.sum(-1, keepdims=True)).sum(1)
  want = np.argsort(-votes, axis=1)[:, :C]
  everything = np.asarray(run(512).tokens)[0, 0]
  np.testing.assert_array_equal(np.sort(everything), np.sort(want))
  some = run(170)
  assert recall(np.asarray(some.tokens)[0, 0], want, 0) > 0.85
  # Clusters count by their means: what is left is estimated from below.
  left = np.log(
    np.exp(logits).sum(-1)
    - np.take_along_axis(
      np.exp(logits), np.asarray(some.tokens)[0, 0][:, None], 2
    ).sum(-1)
  )
  below = left - np.asarray(some.rest)[0, 0]
  assert below.min() > -1e-3 and below.max() < 1.0
