"""The tail of a prompt over sequence shards: as on one device."""

import numpy as np
import pytest

from lcx import methods
from tests.methods.test_lserve import answer


@pytest.mark.mesh
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(x, marks=pytest.mark.long)
    for x in ('xattention', 'tokenselect')
  ],
)
def test_sharded_equals_unsharded(name):
  # Its rows lie on two shards of four in one prompt, on one in the other.
  fields = {'prefill.tail': 70}
  if name == 'xattention':
    fields |= {'threshold': None, 'density': 0.2, 'dense_below': 0}
  else:
    small = {'k': 40, 'sink': 4, 'local': 32}
    fields |= {f'prefill.{k}': v for k, v in small.items()}
    fields |= {f'decode.{k}': v for k, v in small.items()}
    fields |= {'chunk': 32, 'decode.reuse': 4}
  method = methods.get_method(name, **fields)
  without = methods.get_method(name, **{**fields, 'prefill.tail': 0})
  contexts = (300, 115)
  tokens, scores = answer(method, (1, 1, 1), contexts, 4)
  _, plain = answer(without, (1, 1, 1), contexts, 4)
  assert np.max(np.abs(np.asarray(scores) - np.asarray(plain))) > 1e-3
  got, got_scores = answer(method, (2, 4, 1), contexts, 4)
  assert got == tokens
  np.testing.assert_allclose(got_scores, scores, rtol=2e-3, atol=2e-3)
