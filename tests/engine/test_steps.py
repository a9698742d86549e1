"""Steps that the host does not decide on change nothing where none is asked."""

import jax
import numpy as np
import pytest

from lcx import methods
from lcx.engine import Engine
from lcx.engine.plan import Plan
from lcx.methods.base import Prompt
from lcx.models import transformer
from lcx.models.presets import PRESETS

CONFIG = PRESETS['tiny'].replace(dtype='float32')


@pytest.mark.parametrize(
  'name',
  ['lserve']
  + [
    pytest.param(name, marks=pytest.mark.long)
    for name in ('dense', 'quest', 'snapkv', 'streaming', 'tokenselect')
  ],
)
def test_tokens_one_at_a_time_are_tokens_at_once(name, monkeypatch):
  """Whose state counts steps: one that is not asked for must not count."""
  monkeypatch.setattr(Plan, 'steps_a_check', 4)  # as on a GPU
  method = methods.get_method(name).at_tight_budget(150)
  weights = transformer.init(CONFIG, jax.random.key(0))
  engine = Engine(CONFIG, weights, method, capacity=256, room=64)
  draw = np.random.default_rng(0)
  prompt = draw.integers(0, CONFIG.vocab_size, 150).astype(np.int32)
  together, apart = (
    engine.prefill([Prompt(prompt[:0], prompt, ())]) for _ in range(2)
  )
  (want,), _ = engine.decode(together, 7)
  got = [engine.decode(apart, 1)[0][0][0] for _ in range(7)]
  assert got == want
  assert (together.steps, apart.steps) == (8, 28)
  for a, b in zip(
    jax.tree.leaves((together.caches, together.states, together.scores)),
    jax.tree.leaves((apart.caches, apart.states, apart.scores)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  assert jax.tree.all(jax.tree.map(np.array_equal, together.sums, apart.sums))
