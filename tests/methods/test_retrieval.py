"""Retrieval with windows so small that the index is used."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest

from lcx import methods, sharding
from lcx.engine import Engine
from lcx.methods.base import Prompt
from lcx.models import transformer
from lcx.models.presets import PRESETS

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
}


def prompt(seed, context=300):
  draw = np.random.default_rng(seed)
  sizes = (4, context, 9)
  a, b, c = (draw.integers(0, CONFIG.vocab_size, n) for n in sizes)
  return Prompt(*(x.astype(np.int32) for x in (a, b)), (c.astype(np.int32),))


@functools.cache
def make_engine(method, batch=1, mesh=(1, 1, 1)):
  return Engine(
    CONFIG,
    transformer.init(CONFIG, jax.random.key(0)),
    method,
    capacity=CAPACITY,
    batch=batch,
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


def test_rows_do_not_meet(small):
  """Batch order and padding do not matter where the index is used."""
  prompts = [prompt(2), prompt(3, context=190)]
  tokens, scores, _ = answer(make_engine(small, batch=2), prompts, 30)
  for row, one in enumerate(prompts):
    single, single_scores, _ = answer(make_engine(small), [one], 30)
    assert single[0] == tokens[row]
    chex.assert_trees_all_close(
      single_scores[0], scores[row], rtol=2e-3, atol=2e-3
    )


def test_rewound_tokens_leave_no_trace(small):
  engine = make_engine(small)
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
def test_sharded_full_budget_is_dense(small):
  method = small.at_full_budget(CAPACITY)
  prompts = [prompt(8, context=240), prompt(9, context=211)]
  tokens, scores, session = answer(
    make_engine(method, batch=2, mesh=(2, 2, 2)), prompts, 20
  )
  dense = make_engine(methods.get_method('dense'), batch=2)
  want, want_scores, _ = answer(dense, prompts, 20)
  assert tokens == want
  chex.assert_trees_all_close(scores, want_scores, rtol=2e-3, atol=2e-3)
  np.testing.assert_allclose(
    session.sums['keys'], session.sums['pairs'], rtol=1e-6
  )
