"""The tokens with most votes: every implementation makes the definition's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from experiments import gpu_schedule
from kernels_pallas import token_votes
from kernels_pallas.best_in_order import gpu as best_in_order
from kernels_pallas.keys import NEVER
from kernels_pallas.token_votes import gpu, reference, xla
from lcx.select import soft_vote
from tests.kernels.test_page_choice import lower

IMPLEMENTATIONS = {
  'xla': xla.best_voted,
  'gpu': functools.partial(gpu.best_voted, interpret=True),
}


@functools.partial(jax.jit, static_argnums=range(7), static_argnames='weighted')
def draw(b, rows, heads, kv, length, h, dtype=jnp.float32, weighted=False):
  """Arguments; candidates are some, all, none, the first, the last.

  Every fifth key is its neighbour's: of equal votes the earlier wins.
  """
  keys = jax.random.split(jax.random.key(length), 3)
  q = jax.random.normal(keys[0], (b, rows, heads, h), dtype) / 4
  k = jax.random.normal(keys[1], (b, kv, length, h), dtype)
  k = k.at[:, :, 1::5].set(k[:, :, 0::5][:, :, : len(range(1, length, 5))])
  ends = (
    (length // 3 + 1, length - length // 4),
    (0, length),
    (4, 4),
    (0, 17),
    (length - 9, length),
  )
  ends = [ends[i % len(ends)] for i in range(b * rows)]
  low, high = jnp.array(ends, jnp.int32).T.reshape(2, b, rows)
  weight = None
  if weighted:
    weight = jax.random.uniform(keys[2], (b, rows, heads), jnp.float32) + 0.1
  return (q, k, low, high), weight


@functools.cache
def shrunk():
  """Numbers of the kernels for which short rows are long."""
  return {'_SCORERS': (14, 14), '_COUNTERS': 7, '_TILE': 2**12}


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
@pytest.mark.parametrize(
  'rows, heads, length, kind, weighted',
  (
    pytest.param(1, 6, 600, 'soft', False, marks=pytest.mark.long),
    (3, 6, 333, 'soft', True),  # no whole number of tiles
    (5, 4, 256, 'top_k', True),
    (25, 6, 130, 'soft', False),  # more than a program holds
  ),
)
def test_it_equals_the_definition(
  name, rows, heads, length, kind, weighted, monkeypatch
):
  monkeypatch.setattr(best_in_order, 'MOST', 128)
  for field, number in shrunk().items():
    monkeypatch.setattr(gpu, field, number)
  args, weight = draw(2, rows, heads, 2, length, 64, weighted=weighted)
  how = {'kind': kind, 'scale': 0.5, 'weight': weight}
  n = 11
  run = jax.jit(functools.partial(IMPLEMENTATIONS[name], n=n, **how))
  index, count = run(*args)
  definition = functools.partial(reference.best_voted, n=n, **how)
  want, wanted = jax.jit(definition)(*args)
  np.testing.assert_array_equal(count, wanted)
  low, high = args[2:]
  np.testing.assert_array_equal(
    count, np.minimum(n, np.maximum(np.asarray(high) - low, 0))
  )
  np.testing.assert_array_equal(index, want)
  assert np.all((np.asarray(index) < length).sum(-1) == count)


def test_votes_are_those_of_the_definition(monkeypatch):
  """The heads' votes and their maxima, not only which are best."""
  monkeypatch.setattr(best_in_order, 'MOST', 64)
  for field, number in shrunk().items():
    monkeypatch.setattr(gpu, field, number)
  args, weight = draw(2, 3, 4, 2, 700, 64, weighted=True)

  @jax.jit
  def run(q, k, low, high):
    how = {'kind': 'soft', 'interpret': True}
    found = gpu.logits(q, k, low, high, scale=0.7, **how)
    return gpu.votes(found, low, high, weight=weight, **how)

  levels = run(*args)
  definition = functools.partial(
    reference.votes, kind='soft', scale=0.7, weight=weight
  )
  want = np.asarray(jax.jit(definition)(*args)).reshape(6, -1)
  assert [x.shape[1] for x in levels] == [700, 88, 11]
  for level in levels:
    np.testing.assert_allclose(level, want, rtol=1e-5, atol=1e-6)
    want = np.pad(
      want,
      ((0, 0), (0, -want.shape[1] % best_in_order.GROUP)),
      constant_values=-np.inf,
    )
    want = want.reshape(len(want), -1, best_in_order.GROUP).max(axis=2)


def test_the_definition_is_the_selectors():
  """`lcx.select.soft_vote` says the same in its own words."""
  (q, k, low, high), weight = draw(1, 2, 4, 2, 90, 64, weighted=True)
  scores = np.einsum('brkgh,bksh->brkgs', np.reshape(q, (1, 2, 2, 2, 64)), k)
  scores = jnp.asarray(0.5 * scores.reshape(1, 2, 4, 90))
  mask = soft_vote.candidates(low, high, 90)

  @functools.partial(jax.jit, static_argnums=0)
  def both(kind):
    stats = soft_vote.head_stats(scores, mask, kind, 9)
    how = {'kind': kind, 'scale': 0.5, 'weight': weight}
    return (
      reference.votes(q, k, low, high, **how),
      soft_vote.votes(scores, stats, kind, weight),
    )

  for kind in token_votes.KINDS:
    got, want = both(kind)
    np.testing.assert_allclose(
      np.where(mask, got, 0), np.where(mask, want, 0), rtol=1e-3, atol=1e-4
    )


@pytest.mark.gpu
@pytest.mark.parametrize('kind', token_votes.KINDS)
@pytest.mark.parametrize(
  'rows, length', ((1, 131072), (1, 2**20), (2, 131584), (5, 70001), (20, 9000))
)
def test_on_a_gpu(rows, length, kind):
  """Compiled, in bfloat16: votes near the definition's, and the best of them.

  Few of the best may differ, where votes are as good as equal.
  """
  args, _ = draw(1, rows, 28, 4, length, 128, jnp.bfloat16)
  q, k, low, high = args
  how = {'kind': kind, 'scale': 0.5}

  @jax.jit
  def levels(q, k, low, high):
    found = gpu.logits(q, k, low, high, **how)
    return gpu.votes(found, low, high, kind=kind)

  got = np.asarray(levels(*args)[0])
  for row in range(rows):
    one = q[:, row : row + 1], k, low[:, row : row + 1], high[:, row : row + 1]
    want = np.asarray(jax.jit(functools.partial(reference.votes, **how))(*one))
    some = np.isfinite(want[0, 0])
    np.testing.assert_array_equal(np.isfinite(got[row]), some)
    np.testing.assert_allclose(
      got[row][some], want[0, 0][some], rtol=1e-3, atol=1e-3 * (kind == 'top_k')
    )
  n = 2048
  index, count = token_votes.best_voted(*args, n, **how, implementation='gpu')
  index, count = np.asarray(index)[0], np.asarray(count)[0]
  for row in range(rows):
    want = np.argsort(-got[row], kind='stable')[:n]
    want = np.sort(want[got[row][want] > -np.inf])
    assert count[row] == len(want)
    np.testing.assert_array_equal(index[row, : len(want)], want)
    assert np.all(index[row, len(want) :] == NEVER)


@pytest.mark.parametrize(
  'change, message',
  (
    ({'n': 0}, 'n=0'),
    ({'n': 91}, 'within 1 and S=90'),
    ({'kind': 'head_vote'}, "kind='head_vote'"),
    ({'low': jnp.zeros((1, 3), jnp.int32)}, r'low is int32\[1, 3\]'),
    ({'high': jnp.zeros((1, 2))}, r'high is float32\[1, 2\]'),
    ({'weight': jnp.zeros((1, 2))}, r'weight is float32\[1, 2\]'),
    ({'k': jnp.zeros((1, 3, 90, 64))}, 'K dividing N = 4'),
    ({'implementation': 'tpu'}, 'cannot be loaded'),
  ),
)
def test_bad_arguments_are_refused(change, message):
  args, _ = draw(1, 2, 4, 2, 90, 64)
  named = dict(zip(('q', 'k', 'low', 'high'), args))
  named |= {'n': 5, 'kind': 'soft', 'scale': 1.0} | change
  with pytest.raises(ValueError, match=message):
    token_votes.best_voted(**named)


@pytest.mark.parametrize(
  'change, reason',
  (
    ({'h': 32}, 'head dim 32'),
    ({'heads': 280, 'kv': 2}, 'too many for a program'),
    ({'length': 2**22}, 'offsets'),
    ({'n': 5000}, 'n=5000 of 131072 exceeds 4096'),
    ({}, ''),
  ),
)
def test_the_gpu_names_what_it_cannot_take(change, reason):
  size = {'heads': 28, 'kv': 4, 'length': 131072, 'h': 128, 'n': 2048} | change
  q = jax.ShapeDtypeStruct((1, 1, size['heads'], size['h']), jnp.bfloat16)
  k = (1, size['kv'], size['length'], size['h'])
  k = jax.ShapeDtypeStruct(k, jnp.bfloat16)
  ends = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  found = gpu.refuse('best_voted', q, k, ends, ends, size['n'])
  assert reason in (found or '') and bool(found) == bool(reason)


def on_an_h100(rows, length, **how):
  """(function, shapes) of Qwen2-7B's heads."""
  q = ((1, rows, 28, 128), jnp.bfloat16)
  k = ((1, 4, length, 128), jnp.bfloat16)
  ends = ((1, rows), jnp.int32)
  run = functools.partial(
    gpu.best_voted, n=2048, kind='soft', scale=1.0, weight=None
  )
  return run, [jax.ShapeDtypeStruct(*x, **how) for x in (q, k, ends, ends)]


@pytest.mark.h100_aot
@pytest.mark.parametrize(
  'rows, length, launches', ((1, 131072, 4), (9, 131072, 4), (1, 2**20, 5))
)
def test_it_lowers_through_triton(rows, length, launches):
  lowered = lower(*on_an_h100(rows, length))
  assert lowered.as_text().count('__gpu$xla.gpu.triton') == launches


@pytest.mark.h100_aot
@pytest.mark.skipif(
  gpu_schedule.missing() is not None,
  reason='jax-cuda13-plugin, which compiles for CUDA, is not installed',
)
@pytest.mark.parametrize('rows', (1, 9))
def test_it_compiles_for_an_h100(rows):
  """Registers and shared memory suffice; nothing but the kernels runs."""
  topology = topologies.get_topology_desc(
    platform='cuda',
    topology_name='h100',
    topology='1x1x1',
    target_config=gpu_schedule.H100,
  )
  chip = jax.sharding.SingleDeviceSharding(topology.devices[0])
  lowered = lower(*on_an_h100(rows, 131072, sharding=chip))
  text = lowered.compile().as_text() or ''
  entry = text[text.index('ENTRY') :]
  assert entry.count(' custom-call(') == 4
  assert ' copy(' not in entry and ' fusion(' not in entry
