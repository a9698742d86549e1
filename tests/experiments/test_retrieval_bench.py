"""The retrieval benchmark: what its numbers mean, what it refuses."""

import numpy as np
import pytest

from experiments import measure_retrieval, retrieval_bench
from lcx.models.presets import PRESETS


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


def test_what_cannot_be_measured_is_refused():
  numbers = {'model': 'preset:tiny', 'ops': ('recall',)}
  with pytest.raises(ValueError, match="kinds: 'tree' is not one of"):
    measure_retrieval.Config(length=9, kinds=('tree',), **numbers)
  with pytest.raises(ValueError, match='length=0: at least 1'):
    measure_retrieval.Config(length=0, kinds=('exact',), **numbers)
  short = measure_retrieval.Config(length=700, kinds=('exact',), **numbers)
  with pytest.raises(ValueError, match='leaves 0 tokens to an index'):
    next(measure_retrieval.recall(short))
