"""Votes by two launches are `lcx.select.soft_vote`'s; the step compiles."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import selection_cache
from kernels_pallas.best_in_order import gpu as best_in_order
from kernels_pallas.keys import NEVER
from kernels_pallas.selected_token import page_scores, token_scores
from kernels_pallas.selection_cache import votes as votes_file
from kernels_pallas.selection_cache.votes import Source, logits, votes
from lcx.select import soft_vote
from tests.kernels.test_page_choice import lower

PAGE = 8
KINDS = ('keys', 'pages', 'bounds')


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def draw(kind, shape, dtype):
  """(source, candidates of each of its rows, their scores of queries)."""
  b, n, kv, c, h = shape
  rng, seeds = np.random.default_rng(0), itertools.count()

  def normal(*shape):
    return jax.random.normal(jax.random.key(next(seeds)), shape, dtype)

  q, k = normal(b, n, h) / 4, normal(b, kv, c, h)
  tokens = c if kind != 'bounds' else c * PAGE
  # Some, all, none.
  low = jnp.asarray([tokens // 3 + 1, 0, 4], jnp.int32)[:b]
  high = jnp.asarray([tokens - tokens // 4, tokens, 4], jnp.int32)[:b]
  at = jnp.broadcast_to(jnp.arange(c), (b, c))
  ends = low, high
  if kind == 'bounds':
    least = jnp.minimum(k, normal(b, kv, c, h))
    begin, end = jnp.maximum(at * PAGE, low[:, None]), (at + 1) * PAGE
    inside = begin < jnp.minimum(end, high[:, None])
    scores = page_scores(q[:, None], least, k)
    return q, Source(k, least), inside, scores, ends
  source = Source(k)
  if kind == 'pages':
    m = c // PAGE // 2
    pages = np.tile(np.arange(c // PAGE), (b, 1))
    pages = np.sort(rng.permuted(pages, axis=1)[:, :m], axis=1)
    pages[:, -1] = NEVER
    source = Source(k, None, jnp.asarray(pages, jnp.int32))
    safe = np.where(pages == NEVER, 0, pages)[..., None] * PAGE
    at = jnp.asarray((safe + np.arange(PAGE)).reshape(b, -1))
    k = jnp.take_along_axis(k, at[:, None, :, None], axis=2)
  inside = (at >= low[:, None]) & (at < high[:, None])
  if kind == 'pages':
    inside &= jnp.repeat(source.pages < NEVER, PAGE, axis=1)
  return q, source, inside, token_scores(q[:, None], k, scale=1.0), ends


def check(kind, vote, weighted, shape, dtype, tolerance, interpret):
  q, source, inside, scores, ends = draw(kind, shape, dtype)
  scale, how = 0.5, {'interpret': interpret}
  weight = None
  if weighted:
    weight = jnp.arange(q.shape[1], dtype=jnp.float32)[None] % 3
    weight = jnp.broadcast_to(weight, q.shape[:2])
  due = jnp.array([True, True, True])[: shape[0]]

  @jax.jit
  def run(q, source, ends, weight):
    found = logits(q, source, *ends, due, scale=scale, page=PAGE, **how)
    return votes(found, due, kind=vote, weight=weight, **how)

  got = run(q, source, ends, weight)

  @jax.jit
  def definition(scores, inside, weight):
    scores = scores * scale
    stats = soft_vote.head_stats(scores, inside[:, None], vote, 1)
    want = soft_vote.votes(
      scores, stats, vote, None if weight is None else weight[:, None]
    )
    return jnp.where(inside, want[:, 0], -jnp.inf)

  want = np.asarray(definition(scores, inside, weight))
  some = np.isfinite(want)
  np.testing.assert_array_equal(np.isfinite(got[0]), some)
  np.testing.assert_allclose(
    np.asarray(got[0])[some], want[some], rtol=tolerance, atol=tolerance
  )
  for fine, coarse in itertools.pairwise(got):
    fine = np.asarray(fine)
    fine = np.pad(
      fine,
      ((0, 0), (0, -fine.shape[1] % best_in_order.GROUP)),
      constant_values=-np.inf,
    )
    most = fine.reshape(len(fine), -1, best_in_order.GROUP).max(axis=2)
    np.testing.assert_array_equal(coarse, most)
  return len(got)


@pytest.mark.parametrize(
  'kind, vote, weighted',
  (
    ('keys', 'soft', False),
    ('keys', 'top_k', True),
    ('pages', 'soft', True),
    ('bounds', 'soft', False),
    ('bounds', 'top_k', True),
  ),
)
def test_interpreted(kind, vote, weighted, monkeypatch):
  monkeypatch.setattr(best_in_order, 'MOST', 64)
  monkeypatch.setattr(votes_file, '_SCORERS', 7)
  monkeypatch.setattr(votes_file, '_COUNTERS', 7)
  shape = 3, 6, 2, 600, 64
  levels = check(kind, vote, weighted, shape, jnp.float32, 1e-5, True)
  assert levels == (3 if kind != 'pages' else 2)


@pytest.mark.gpu
@pytest.mark.parametrize('vote', ('soft', 'top_k'))
@pytest.mark.parametrize(
  'kind, c', (('keys', 131584), ('pages', 131584), ('bounds', 8224))
)
def test_on_a_gpu(kind, c, vote):
  shape = 2, 32, 8, c, 128
  check(kind, vote, False, shape, jnp.bfloat16, 2e-3, False)


def on_an_h100(length, pages):
  """(a step of Llama 3 8B's heads, shapes of its arguments)."""
  rules = selection_cache.Rules(
    kind='soft', k=2048, scale=1.0, threshold=0.9, reuse=16, sink=128,
    window=497, page=16, pages=pages,
  )  # fmt: skip

  def of(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)

  query, keys = of(1, 32, 128), of(1, 8, length, 128)
  row, working = of(1, dtype=jnp.int32), of(1, 8, 2688, 128)
  bounds = of(1, 8, length // 16, 128)
  starts = of(1, length // 16, dtype=jnp.int32)
  counts = selection_cache.Counts(row, row, row, row)
  shapes = (
    query,
    query,
    None,
    selection_cache.Keys(keys, keys, starts, row, (bounds, bounds)),
    selection_cache.Working(query, working, working, counts),
    selection_cache.Context(
      of(1, 1, dtype=jnp.int32), of(1, 1, dtype=jnp.bool_), row
    ),
  )
  assert selection_cache.refuse(32, shapes[3], 2688, rules, 32) is None
  return functools.partial(selection_cache.step, rules=rules), shapes


@pytest.mark.h100_aot
@pytest.mark.parametrize(
  'length, pages, launches',
  ((131584, 0, 6), (131584, 512, 8), (1 << 20, 512, 9)),
)
def test_it_lowers_through_triton(length, pages, launches):
  step, shapes = on_an_h100(length, pages)
  lowered = lower(step, shapes)
  assert lowered.as_text().count('__gpu$xla.gpu.triton') == launches


@pytest.mark.parametrize(
  'change, reason',
  (
    ({'kind': 'head_vote'}, 'votes of kind'),
    ({'pages': 4096}, 'exceed 32768'),
    ({'k': 5000}, '5000 of 131584 exceed 4096'),
    ({'pages': 100, 'page': 48}, 'power of 2'),
  ),
)
def test_what_cannot_be_served_is_named(change, reason):
  step, shapes = on_an_h100(131584, 0)
  rules = step.keywords['rules']
  rules = type(rules)(**vars(rules) | change)
  assert reason in selection_cache.refuse(32, shapes[3], 2688, rules, 32)
