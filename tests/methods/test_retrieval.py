"""Retrieval with windows so small that the index is used."""

import dataclasses
import functools
import gc

import chex
import jax
import numpy as np
import pytest

from lcx import methods, sharding
from lcx.cache import host_calls
from lcx.engine import Engine
from lcx.methods.base import Axes, Context, Prompt
from lcx.methods.retrieval import RetrievalDecode
from lcx.models import transformer
from lcx.models.presets import PRESETS
from lcx.select import vector_index, vector_index_split
from lcx.select.vector_index import has_faiss

CONFIG = dataclasses.replace(PRESETS['tiny'], dtype='float32')
CAPACITY = 384
SMALL = {
  'retrieval_cluster': {
    'sink': 16,
    'recent': 32,
    'segment': 64,
    'cluster': 8,
    'top': 24,
    'probe': 64,
    'cache.page': 16,
  },
  'retrieval': {
    'decode.sink': 16,
    'decode.recent': 32,
    'top': 24,
    'mass': 0.0,
    'index': 'graph' if has_faiss() else 'exact',
    'queries': 256,
    'neighbours': 32,
    'degree': 16,
    'cache.sink': 16,
    'cache.recent': 32,
    'cache.page': 16,
  },
}


def prompt(seed, context=300):
  draw = np.random.default_rng(seed)
  sizes = (4, context, 9)
  a, b, c = (
    draw.integers(0, CONFIG.vocab_size, n).astype(np.int32) for n in sizes
  )
  return Prompt(a, b, (c,))


@functools.cache
def weights():
  return transformer.init(CONFIG, jax.random.key(0))


@functools.cache
def make_engine(method, mesh=(1, 1, 1)):
  return Engine(
    CONFIG,
    weights(),
    method,
    capacity=CAPACITY,
    batch=2,  # one size: programs serve several tests
    room=64,
    mesh=sharding.make_mesh(*mesh),
  )


def answer(engine, prompts, steps=60):
  """Enough steps for tokens to leave the recent window."""
  session = engine.prefill(prompts, 0)
  tokens, status = engine.decode(session, steps)
  assert status == ['ok'] * engine.batch
  return tokens, np.asarray(session.scores), session


@pytest.fixture(params=SMALL)
def small(request):
  return methods.get_method(request.param, **SMALL[request.param])


@pytest.fixture
def clusters():
  """The conformance suite's budgets do not reach its index; the host's do."""
  return methods.get_method('retrieval_cluster', **SMALL['retrieval_cluster'])


@pytest.mark.parametrize(
  'small',
  # test_conformance says it of clusters, on one device and on 8.
  ['retrieval', pytest.param('retrieval_cluster', marks=pytest.mark.long)],
  indirect=True,
)
def test_all_tokens_retrieved_is_dense(small):
  method = small.at_full_budget(CAPACITY)
  tokens, scores, session = answer(make_engine(method), [prompt(1)])
  dense = make_engine(methods.get_method('dense'))
  want_tokens, want, _ = answer(dense, [prompt(1)])
  assert tokens == want_tokens
  chex.assert_trees_all_close(scores, want, rtol=2e-3, atol=2e-3)
  keys, pairs = session.sums['keys'], session.sums['pairs']
  np.testing.assert_allclose(keys, pairs, rtol=1e-6)
  n = CONFIG.n_layers * CONFIG.n_heads
  np.testing.assert_allclose(session.sums['mass'], 60 * n, rtol=1e-3)


def test_less_than_all_is_seen(small):
  _, _, session = answer(make_engine(small), [prompt(1)], steps=20)
  assert session.sums['keys'][0] < 0.7 * session.sums['pairs'][0]
  mass = session.sums['mass'][0] / (20 * CONFIG.n_layers * CONFIG.n_heads)
  assert 0.2 < mass < 0.999


@pytest.mark.skipif(not has_faiss(), reason="needs faiss: 'lcx[index]'")
@pytest.mark.parametrize('parts', [1, 2])
def test_a_scan_of_codes_answers_as_exact_search(parts, monkeypatch):
  """Tokens that left the device later are found, too; 16-bit keys differ."""
  monkeypatch.setattr(vector_index_split, 'LEAST', 64)
  want_tokens, want, _ = answer(
    make_engine(host_method(index='exact')), [prompt(1)], 30
  )
  scan = host_method(
    index='fastscan',
    effort=CAPACITY,
    jobs=2 * CONFIG.n_kv_heads * parts,  # of two rows
  )
  tokens, scores, session = answer(make_engine(scan), [prompt(1)], 30)
  assert tokens == want_tokens
  chex.assert_trees_all_close(scores, want, rtol=2e-2, atol=2e-2)
  assert session.sums['keys'][0] < 0.7 * session.sums['pairs'][0]
  indexes = session.caches[0].rows()[0].indexes
  assert [max(1, len(x.parts)) for x in indexes] == [parts] * CONFIG.n_kv_heads


def test_rows_do_not_meet(clusters):
  """Batch order and padding do not matter where the index is used."""
  prompts = [prompt(2), prompt(3, context=190)]
  tokens, scores, _ = answer(make_engine(clusters), prompts, 30)
  for row, one in enumerate(prompts):
    single, single_scores, _ = answer(make_engine(clusters), [one], 30)
    assert single[0] == tokens[row]
    chex.assert_trees_all_close(
      single_scores[0], scores[row], rtol=2e-3, atol=2e-3
    )


def test_rewound_tokens_leave_no_trace(clusters):
  engine = make_engine(clusters)
  draw = np.random.default_rng(5)
  first, other = (draw.integers(0, 256, n).astype(np.int32) for n in (5, 9))
  session = engine.prefill([prompt(4)], 0)
  mark = engine.mark(session)
  engine.extend(session, [first])
  before = np.asarray(session.scores)
  engine.rewind(session, mark)
  engine.extend(session, [other])
  engine.decode(session, 8)
  engine.rewind(session, mark)
  engine.extend(session, [first])
  chex.assert_trees_all_close(
    np.asarray(session.scores), before, rtol=1e-4, atol=1e-4
  )


@pytest.mark.mesh
@pytest.mark.long
def test_sharded_full_budget_is_dense(clusters):
  method = clusters.at_full_budget(CAPACITY)
  prompts = [prompt(8, context=240), prompt(9, context=211)]
  tokens, scores, session = answer(
    make_engine(method, mesh=(2, 2, 2)), prompts, 20
  )
  dense = make_engine(methods.get_method('dense'))
  want, want_scores, _ = answer(dense, prompts, 20)
  assert tokens == want
  chex.assert_trees_all_close(scores, want_scores, rtol=2e-3, atol=2e-3)
  np.testing.assert_allclose(
    session.sums['keys'], session.sums['pairs'], rtol=1e-6
  )


# The host tier alone.


def host_method(**fields):
  return methods.get_method('retrieval', **(SMALL['retrieval'] | fields))


def test_an_index_finds_the_keys_that_queries_want():
  """Of a prompt's own keys, by queries that were held out."""
  session = make_engine(host_method()).prefill([prompt(1)], 0)
  found = wanted = 0
  for cache in session.caches:
    for row in cache.rows():
      row.wait()
      first, stop = row.indexed
      assert (first, stop) == (16, 272)  # of 313 tokens, 32 recent, pages of 16
      assert row.build_s > 0
      draw = np.random.default_rng(0).normal(size=(9, CONFIG.head_dim))
      for index, keys in zip(row.indexes, row.k, strict=True):
        score = draw @ keys[first:stop].T
        want = first + np.argsort(-score, axis=1)[:, :24]
        _, got = index.search(draw.astype('f'), 24, 100)
        found += (want[:, :, None] == got[:, None]).sum()
        wanted += want.size
  assert found > 0.95 * wanted


def test_sampled_queries_say_whose_they_are():
  """`near_of` of each: the nearest keys are those of that head's query."""
  draw = np.random.default_rng(0)
  t, n, kv, h = 40, 6, 2, 8
  q, k = (draw.normal(size=(1, t, x, h)).astype('f') for x in (n, kv))
  at = np.arange(t, dtype=np.int32)[None]
  decode = RetrievalDecode(index='graph', queries=t, neighbours=4, top=4)
  ctx = Context(
    positions=at,
    valid=at >= 0,
    source=at,
    lengths=np.array([t], np.int32),
    layer=np.int32(0),
    key=jax.random.key(0),
    room=t,
    axes=Axes(),
  )
  near = jax.jit(lambda q, k: decode.observe(q, k, k, lambda x, _: x, (), ctx))(
    q, k
  )
  score = np.einsum('tkgh,skh->kgts', q.reshape(t, kv, n // kv, h), k[0])
  best = np.argsort(-score, axis=3)[..., :4]
  asked = 0
  for head, row in np.ndindex(near.held_of.shape[1:]):
    if near.held_near[0, head, row, 0] >= 0:
      mine = best[head, near.held_of[0, head, row]]
      assert (mine == near.held_near[0, head, row]).all(1).any()
      asked += 1
  for head, row in np.ndindex(near.near_of.shape[1:]):
    found = near.near[0, head, row]
    if found[3] < 0:
      continue  # of the first tokens
    mine = score[head, near.near_of[0, head, row]]
    causal = np.where(np.tri(t, dtype=bool), mine, -np.inf)
    assert (np.argsort(-causal, axis=1)[:, :4] == found).all(1).any()
    asked += 1
  assert asked > kv * n // kv * (t - 8)


def test_a_row_whose_search_raises_ends_alone(monkeypatch):
  engine = make_engine(host_method())
  prompts = [prompt(2), prompt(3, context=190)]
  want, _, _ = answer(engine, prompts, 8)
  session = engine.prefill(prompts, 0)
  broken = session.caches[1].rows()[0]

  def search(*args):
    raise RuntimeError('a search thread')

  broken.wait()
  assert broken.indexes
  for name in ('search', 'native'):  # by a thread of its own, or by faiss
    monkeypatch.setattr(broken.indexes[1], name, search)
  tokens, status = engine.decode(session, 8)
  assert status == ['host_failed', 'ok'] and tokens[1] == want[1]
  assert 'a search thread' in host_calls.last_error
  again, _, _ = answer(engine, prompts, 8)
  assert again == want


def test_a_session_that_is_dropped_gives_its_memory_back():
  engine = make_engine(host_method())
  gc.collect()
  before = host_calls.held_bytes()
  session = engine.prefill([prompt(1)], 0)
  mine = sum(sum(c.nbytes('host').values()) for c in session.caches)
  assert mine > 0 and host_calls.held_bytes() == before + mine
  del session
  gc.collect()
  assert host_calls.held_bytes() == before


@pytest.mark.long  # test_host_row says the same of one row
def test_an_index_is_kept_and_a_damaged_one_fails_the_request(tmp_path):
  engine = make_engine(host_method(folder=str(tmp_path)))
  want, _, session = answer(engine, [prompt(1)], 8)
  files = sorted(tmp_path.iterdir())
  # Both rows are the same.
  assert len(files) == CONFIG.n_layers * CONFIG.n_kv_heads
  times = [f.stat().st_mtime_ns for f in files]
  del session
  assert answer(engine, [prompt(1)], 8)[0] == want
  assert [f.stat().st_mtime_ns for f in files] == times
  files[0].write_bytes(files[0].read_bytes()[:-50])
  _, status = engine.decode(engine.prefill([prompt(1)], 0), 8)
  assert status == ['host_failed'] * 2
  assert 'truncated or damaged' in host_calls.last_error
  files[0].unlink()
  assert answer(engine, [prompt(1)], 8)[0] == want


def test_what_cannot_be_served_is_refused_before_prefill(monkeypatch):
  with pytest.raises(ValueError, match='GiB of host memory.*are left'):
    make_engine(host_method(**{'cache.gigabytes': 1e-6}))
  with pytest.raises(ValueError, match='decode keeps sink=16 .* cache sink=4'):
    host_method(**{'cache.sink': 4})
  with pytest.raises(ValueError, match='must be one of'):
    make_engine(host_method(index='tree'))
  with pytest.raises(ValueError, match="'query_head' is of kind 'graph'"):
    make_engine(host_method(index='ivf', graphs='query_head'))
  with pytest.raises(ValueError, match='bits=5 must be 2, 3 or 4'):
    make_engine(host_method(index='fastscan', bits=5))
  with pytest.raises(ValueError, match='jobs=-1 must be at least 0'):
    make_engine(host_method(jobs=-1))
  window = dataclasses.replace(CONFIG, sliding_window=128)
  with pytest.raises(ValueError, match='sliding window of 128'):
    host_method().decode.check(window, CAPACITY)
  monkeypatch.setattr(vector_index, 'has_faiss', lambda: False)
  with pytest.raises(ValueError, match=r"'lcx\[index\]'.*retrieval_cluster"):
    make_engine(host_method(index='graph', top=23))
