"""Votes against their definition; pruned lists against full ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from kernels_pallas.selected_token import token_scores
from lcx import sharding
from lcx.cache import CacheShape, Dense
from lcx.methods.base import Context
from lcx.select import chunk_grid, soft_vote
from lcx.select.chunk_votes import chunk_stats, chunk_votes, votes_at_once
from lcx.select.token_choice import choose_tokens
from lcx.select.token_rules import ReuseRules
from lcx.select.top_tokens import top_tokens, with_ends

HEADS, KV_HEADS, DIM, LENGTH, PAGE = 4, 2, 8, 64, 8
ROWS = 32  # of queries with keys of their own, an example


def draw(seed, length=LENGTH, spread=1.0, batch=1):
  """q [B N H], k [B K S H]; pages of keys are alike where spread is small."""
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(batch, HEADS, DIM))
  k = rng.normal(size=(batch, KV_HEADS, length // PAGE, 1, DIM))
  k = k + spread * rng.normal(size=(batch, KV_HEADS, length // PAGE, PAGE, DIM))
  k = k.reshape(batch, KV_HEADS, length, DIM)
  return jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32)


def expected_votes(q, k, low, high, kind, n_best, scale=1.0, heads='equal'):
  """Of one row, in float64: query head h reads kv head h // G."""
  total = np.zeros(k.shape[1])
  for h in range(HEADS):
    much = 1.0 if heads == 'equal' else np.linalg.norm(q[h])
    scores = scale * np.float64(k[h // (HEADS // KV_HEADS)]) @ np.float64(q[h])
    some = scores[low:high]
    if kind == 'top_k':
      total[low:high] += much * some
    elif kind == 'head_vote':
      total[low + np.argsort(-some, kind='stable')[:n_best]] += much
    else:
      weight = np.exp(some - some.max())
      total[low:high] += much * weight / weight.sum()
  return total


def best(votes, low, high, n):
  order = np.argsort(-votes[low:high], kind='stable')[:n]
  return sorted(int(low + i) for i in order)


def all_votes(
  q, k, low, high, *, kind, n_best, scale=1.0, heads='equal', **axes
):
  return soft_vote.all_votes(
    soft_vote.voters(q, k.shape[1], kind, heads),
    lambda q: token_scores(q, k, scale=scale),
    low,
    high,
    kind=kind,
    k=n_best,
    **axes,
  )


def listed(chosen, count):
  return [int(i) for i in np.asarray(chosen)[: int(count)]]


@pytest.mark.parametrize('heads', soft_vote.HEADS)
@pytest.mark.parametrize('kind', soft_vote.KINDS)
def test_votes_are_the_definition(kind, heads):
  q, k = draw(0)
  low, high = jnp.array([5]), jnp.array([57])
  how = {'kind': kind, 'n_best': 9, 'scale': 0.7}
  votes = all_votes(q, k, low, high, heads=heads, **how)
  want = expected_votes(q[0], k[0], 5, 57, kind, 9, 0.7, heads)
  np.testing.assert_allclose(votes[0, 5:57], want[5:57], rtol=1e-4, atol=1e-5)
  assert np.all(np.isneginf(np.asarray(votes[0, :5])))
  assert np.all(np.isneginf(np.asarray(votes[0, 57:])))
  # The prompt's chunks vote alike, over tiles of keys.
  at = low[:, None], high[:, None]
  stats = chunk_stats(q[:, None], k, k, *at, **how)
  voters = soft_vote.voters(q[:, None], KV_HEADS, kind, heads)
  tiled = chunk_votes(voters, stats, k, at[1], kind=kind, scale=0.7)
  np.testing.assert_allclose(
    tiled[0, 0, 5:57], votes[0, 5:57], rtol=1e-4, atol=1e-5
  )
  once = votes_at_once(voters, k, *at, **how)
  np.testing.assert_allclose(
    once[0, 0, 5:57], votes[0, 5:57], rtol=1e-4, atol=1e-5
  )


@given(
  alike=st.lists(st.booleans(), min_size=7, max_size=7),
  most=st.integers(1, 4),
)
def test_chunks_with_alike_queries_vote_as_one(alike, most):
  """Groups by hand; `alike`: a chunk's query is near the one before it."""
  rng = np.random.default_rng(sum(alike))
  total = [rng.normal(size=(HEADS, DIM))]
  for near in alike:
    step = rng.normal(size=(HEADS, DIM))
    total.append(total[-1] + 1e-3 * step if near else step)
  total, weight = np.stack(total), np.ones((len(total), HEADS, 1))
  groups = [[0]]
  for i, near in enumerate(alike, 1):
    if near and len(groups[-1]) < most:
      groups[-1].append(i)
    else:
      groups.append([i])
  found, weights = jax.jit(chunk_grid.alike_as_one, static_argnums=(2, 3))(
    np.float32(total)[None], np.float32(weight)[None], 0.95, most
  )
  for group in groups:
    for i in group:
      np.testing.assert_allclose(
        found[0, i], total[group].sum(0), rtol=1e-3, atol=1e-4
      )
      assert np.all(np.asarray(weights[0, i]) == len(group))


def test_pooled_queries_are_means():
  q = jax.random.normal(jax.random.key(0), (1, 6, HEADS, DIM))
  valid = jnp.arange(6)[None] < 4
  x = np.asarray(q[0, :4], np.float64)
  mean = soft_vote.pool_queries(q, valid)[0]
  np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5, atol=1e-6)
  norm = np.linalg.norm(x, axis=-1, keepdims=True)
  mean = soft_vote.pool_queries(q, valid, 'l2')[0]
  want = (x * norm).sum(0) / norm.sum(0)
  np.testing.assert_allclose(mean, want, rtol=1e-5, atol=1e-6)
  none = soft_vote.pool_queries(q, valid & False)
  assert not np.any(np.asarray(none))


def test_max_pool_stays_among_candidates():
  votes = jnp.array([[9.0, 1.0, 5.0, 2.0, 0.0, 7.0]])
  mask = jnp.array([[False, True, True, True, True, False]])
  pooled = soft_vote.max_pool(votes, mask, 3)
  inf = -np.inf
  np.testing.assert_array_equal(pooled, [[inf, 5, 5, 5, 2, inf]])


@given(
  low=st.integers(0, 6),
  middle=st.integers(0, 9),
  tail=st.integers(0, 5),
  seed=st.integers(0, 99),
)
def test_lists_ascend_without_a_gap(low, middle, tail, seed):
  high, stop = low + middle, low + middle + tail
  votes = np.random.default_rng(seed).integers(0, 4, 20).astype(np.float32)
  votes[:low] = votes[high:] = -np.inf
  chosen, count = top_tokens(jnp.asarray(votes)[None], 4)
  found, total = with_ends(
    chosen,
    count,
    low=jnp.array([low]),
    high=jnp.array([high]),
    stop=jnp.array([stop]),
    width=15,
  )
  want = [*range(low), *best(votes, low, high, 4), *range(high, stop)]
  assert listed(found[0], total[0]) == want


def choose_one(q, k, low, high, rules):
  """What `choose_tokens` says of a batch of one row, by its scoring."""
  q, k = q[None], k[None]
  shape = CacheShape(1, KV_HEADS, DIM, LENGTH, 'float32')
  place = jnp.arange(LENGTH, dtype=jnp.int32)[None]
  tokens = k.swapaxes(1, 2)
  cache = Dense(page=PAGE, stats=True).init(shape)
  cache = cache.append(tokens, tokens, place)
  ctx = Context(
    positions=place[:, -1:],
    valid=jnp.ones((1, 1), bool),
    source=place[:, -1:],
    lengths=jnp.array([LENGTH]),
    layer=jnp.int32(0),
    key=jax.random.key(0),
    trace=True,
  )

  def by(scoring):
    how = dataclasses.replace(rules, scoring=scoring)
    return choose_tokens(q, cache, None, low, high, how, ctx)

  return {scoring: by(scoring) for scoring in ('full', 'pruned', 'budget')}


@functools.lru_cache
def program(rules):
  """`choose_one` for many rows, each with a fallback of its own."""
  one = functools.partial(choose_one, rules=rules)
  return jax.jit(
    jax.shard_map(
      jax.vmap(one, in_axes=(0, 0, None, None)),
      mesh=sharding.make_mesh(1, 1, 1),
      in_specs=P(),
      out_specs=P(),
      check_vma=False,
    )
  )


def choose(q, k, low, high, kind, scored, heads='equal'):
  """(where pruning fell back, votes that 'budget' loses, each a row's).

  What holds in every case: a pruned list is the full list, by its certificate
  or by its fallback; and where it has a certificate, so is the pages' own list.
  """
  rules = ReuseRules(k=6, vote=kind, heads=heads, scored=scored)
  ends = np.array([low], np.int32), np.array([high], np.int32)
  found = jax.device_get(program(rules)(q, k, *ends))
  fell_back = found['pruned'].fell_back[:, 0]
  assert set(fell_back) <= {0, 1}
  lost = found['budget'].lost[:, 0]
  assert np.all((lost >= -1e-5) & (lost <= 1 + 1e-5))
  lists = [
    {s: listed(c.chosen[row, 0], c.count[row, 0]) for s, c in found.items()}
    for row in range(len(q))
  ]
  for row, by in enumerate(lists):
    assert by['pruned'] == by['full']
    assert len(by['full']) == min(6, high - low)
    if not fell_back[row]:
      assert by['budget'] == by['full']
  return fell_back == 1, lost


@given(
  seed=st.integers(0, 10**6),
  kind=st.sampled_from(
    [('top_k', 'equal'), ('soft', 'equal'), ('soft', 'energy')]
  ),
  scored=st.sampled_from([8, 32, 64]),
  low=st.integers(0, 10),
  high=st.integers(12, LENGTH),
)
def test_a_pruned_list_is_the_full_list(seed, kind, scored, low, high):
  spread = np.resize([0.0, 0.02, 0.1, 0.3, 1.0], (ROWS, 1, 1, 1, 1))
  q, k = draw(seed, spread=spread, batch=ROWS)
  vote, heads = kind
  fell_back, lost = choose(6 * q, k, low, high, vote, scored, heads)
  if scored == LENGTH:  # every page was scored
    assert not np.any(fell_back) and np.all(lost < 1e-5)


@pytest.mark.parametrize('kind', ['top_k', 'soft'])
def test_certificates_are_given_where_pages_are_alike(kind):
  """Else the test above would say nothing of them."""
  q, k = draw(0, spread=0.02, batch=ROWS)
  fell_back, _ = choose(6 * q, k, 0, LENGTH, kind, 32)
  assert np.mean(fell_back) <= 0.75


@pytest.mark.parametrize('kind', ['top_k', 'soft'])
def test_keys_that_bounds_hide_fall_back(kind):
  """The best tokens stand in pages that were not scored: no certificate."""
  q, k = draw(3, spread=1.0, batch=ROWS)
  fell_back, lost = choose(q, k, 0, LENGTH, kind, 8)
  assert np.all(fell_back) and np.mean(lost > 0.1) > 0.5


@pytest.mark.xdist_group('mesh')
@pytest.mark.parametrize('kind', soft_vote.KINDS)
def test_shards_choose_what_one_device_chooses(kind):
  q, k = draw(5, batch=2)
  mesh = jax.make_mesh(
    (2, 2), ('seq', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  low, high = jnp.array([3, 0]), jnp.array([60, 50])
  half = LENGTH // 2

  def choose(q, k):
    first = jax.lax.axis_index('seq') * half
    votes = all_votes(
      q,
      k,
      jnp.clip(low - first, 0, half),
      jnp.clip(high - first, 0, half),
      kind=kind,
      n_best=40,
      model='model',
      seq='seq',
    )
    chosen, _ = top_tokens(votes, 40, 'seq')
    return jnp.where(chosen < half, chosen + first, chosen)

  sharded = jax.shard_map(
    choose,
    mesh=mesh,
    in_specs=(P(None, 'model'), P(None, 'model', 'seq')),
    out_specs=P(None, 'seq'),
    check_vma=False,
  )
  got = np.sort(np.asarray(jax.jit(sharded)(q, k)), axis=1)[:, :40]
  votes = all_votes(q, k, low, high, kind=kind, n_best=40)
  np.testing.assert_array_equal(got, top_tokens(votes, 40)[0])
