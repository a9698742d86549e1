"""The retrieval benchmark: what its numbers mean, what it refuses."""

import collections

import jax
import numpy as np
import pytest

from experiments import measure_retrieval, retrieval_bench
from lcx.cache import host_calls
from lcx.cache.host_row import Row
from lcx.methods import retrieval
from lcx.models.presets import PRESETS
from lcx.select.vector_index import has_faiss


@pytest.mark.parametrize(
  ('recall', 'scanned', 'at'),
  [
    ([0.5, 0.9, 1.0], [0.1, 0.2, 0.4], 0.3),
    ([0.97, 1.0], [0.1, 0.4], 0.1),
    ([0.5, 0.95], [0.1, 0.2], 0.2),
    ([0.5, 0.6], [0.1, 0.2], None),
  ],
)
def test_share_scanned_at_a_recall(recall, scanned, at):
  got = measure_retrieval.at_95(recall, scanned)
  assert got == at if at is None else got == pytest.approx(at)


def test_drawn_tokens_do_not_depend_on_other_draws():
  drawn = retrieval_bench.Drawn(PRESETS['tiny'], 'float32', 3)
  k, v = drawn.tokens(5, 64)
  again = retrieval_bench.Drawn(PRESETS['tiny'], 'float32', 3).tokens(5, 64)[0]
  np.testing.assert_array_equal(k, again)
  assert not np.array_equal(k, drawn.tokens(6, 64)[0])
  assert k.shape == v.shape == (1, 64, 2, PRESETS['tiny'].head_dim)
  # Queries lie farther from the keys' mean than keys do.
  q = drawn.queries(0, 64)[0].reshape(-1, k.shape[-1])
  k = k[0].reshape(-1, k.shape[-1])
  far = [np.linalg.norm(x - k.mean(0), axis=1).mean() for x in (q, k)]
  assert far[0] > 1.3 * far[1]


@pytest.mark.parametrize(
  ('of', 'efforts', 'least', 'want'),
  [
    (lambda e: (e / 1000, e / 4000), (100, 200, 400), 1, (900, 960, True)),
    (lambda e: (1.0, e / 4000), (100, 200), 100, (100, 100, True)),
    (lambda e: (e / 1000, e / 4000), (950,), 900, (900, 950, True)),
    (lambda e: (0.6, e / 1000), (100, 200), 1, (800, 800, False)),
    (lambda e: (0.99, 1.0), (0,), 1, (0, 0, True)),
    (lambda e: (0.5, 1.0), (0,), 1, (0, 0, False)),
  ],
)
def test_the_smallest_effort_of_a_recall(of, efforts, least, want):
  asked = []

  def measure(effort):
    asked.append(effort)
    return of(effort)

  effort, reached = retrieval_bench.smallest_effort(
    measure, 0.9, efforts, least
  )
  assert want[0] <= effort <= want[1] and reached == want[2]
  assert min(asked) >= min(least, *efforts) and len(set(asked)) < 12


@pytest.mark.skipif(not has_faiss(), reason="needs faiss: 'lcx[index]'")
def test_a_pass_a_kind_over_caches_that_are_filled_once(monkeypatch):
  """IVF, flat and codes: no nearest keys of the prompt.

  The step is left out: a config's smoke has it.
  """
  calls = collections.Counter()

  def counted(owner, name):
    whole = getattr(owner, name)

    def call(*args, **kw):
      calls[name] += 1
      return whole(*args, **kw)

    monkeypatch.setattr(owner, name, call)

  counted(retrieval_bench.Drawn, 'layer')
  counted(retrieval, 'nearest')
  counted(Row, 'build')
  monkeypatch.setattr(
    retrieval_bench, '_timed', lambda config, part, caches, *_: ({}, caches)
  )
  held = host_calls.held_bytes()
  jax.config.update('jax_disable_most_optimizations', True)
  config = measure_retrieval.Config(
    'preset:tiny', 1024, ('ivf', 'flat', 'fastscan'), ('build', 'decode'),
    layers=(0,), efforts={'ivf': (1, 2), 'flat': (0,)}, recall=0.95, top=20,
    queries=64, repeats=1, dtype='float32', more_jobs=(3,),
  )  # fmt: skip
  rows = list(retrieval_bench.speed(config))
  again, rows = rows[2::3], [r for i, r in enumerate(rows) if i % 3 < 2]
  assert [(op, r['kind']) for op, r in rows] == [
    ('build', 'ivf'), ('decode', 'ivf'), ('build', 'flat'), ('decode', 'flat'),
    ('build', 'fastscan'), ('decode', 'fastscan'),
  ]  # fmt: skip
  assert calls == {'layer': 1, 'nearest': 1, 'build': 3}  # held-out ones' only
  ivf, flat = rows[1][1], rows[3][1]
  assert ivf['reached'] and ivf['recall'] >= 0.95
  assert [ivf['effort'], ivf['recall'], ivf['scanned']] in ivf['curve']
  assert ivf['curve'] == sorted(ivf['curve']) and ivf['effort'] > 2
  assert flat['scanned'] == 1.0 and flat['recall'] > 0.95
  for (_, first), (op, other) in zip(rows[1::2], again, strict=True):
    assert op == 'decode' and (first['jobs'], other['jobs']) == (0, 3)
    assert first['kind'] == other['kind']
    assert first['effort'] == other['effort']
  codes = rows[5][1]
  assert codes['reached'] and codes['effort'] >= 20 and codes['codes'] == 1 / 4
  assert codes['scanned'] == codes['effort'] / (1024 - 128 - 512)
  for _, row in rows:
    assert row['host_bytes'] > 2 * 1024 * 2 * 4 and row['kv_bytes'] > 0
  assert host_calls.held_bytes() == held


def test_what_cannot_be_measured_is_refused():
  numbers = {'model': 'preset:tiny', 'ops': ('recall',)}
  with pytest.raises(ValueError, match="kinds: 'tree' is not one of"):
    measure_retrieval.Config(length=9, kinds=('tree',), **numbers)
  with pytest.raises(ValueError, match='length=0: at least 1'):
    measure_retrieval.Config(length=0, kinds=('exact',), **numbers)
  short = measure_retrieval.Config(length=700, kinds=('exact',), **numbers)
  with pytest.raises(ValueError, match='leaves 0 tokens to an index'):
    next(measure_retrieval.recall(short))
