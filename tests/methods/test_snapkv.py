"""SnapKV's decode: what it reads of a short cache, and what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest

from lcx import methods, policy
from lcx.engine import Engine
from lcx.methods.base import Prompt
from lcx.models import transformer
from lcx.models.presets import preset

CONFIG = preset('tiny')
CAPACITY = 256


def answers(method):
  weights = transformer.init(CONFIG, jax.random.key(0))
  engine = Engine(CONFIG, weights, method, capacity=CAPACITY, room=64)
  tokens = np.arange(180, dtype=np.int32) % CONFIG.vocab_size
  session = engine.prefill([Prompt(tokens[:0], tokens, ())])
  written, _ = engine.decode(session, 6)
  sums = session.sums
  return np.asarray(written), np.asarray(session.scores), sums


def test_a_short_cache_is_read_whole(monkeypatch):
  tokens, scores, _ = answers(methods.get_method('dense'))
  method = methods.get_method('snapkv')
  tight = dataclasses.replace(method.decode, budget=24, window=8)
  made = {}
  for crossover in (0, CAPACITY, -1):
    decode = dataclasses.replace(tight, crossover=crossover)
    made[crossover] = answers(dataclasses.replace(method, decode=decode))
  # Below the crossover exactly what dense answers; -1: nothing was measured.
  np.testing.assert_array_equal(made[CAPACITY][0], tokens)
  np.testing.assert_array_equal(made[CAPACITY][1], scores)
  assert not np.allclose(made[0][1], scores, atol=1e-4)
  np.testing.assert_array_equal(made[-1][1], made[0][1])
  seen = {n: float(np.sum(sums['keys'])) for n, (_, _, sums) in made.items()}
  assert seen[0] < 0.5 * seen[CAPACITY]

  entry = policy.Entry(
    op='layer',
    method='snapkv',
    device=jax.devices()[0].device_kind,
    heads=CONFIG.n_heads,
    kv_heads=CONFIG.n_kv_heads,
    head_dim=CONFIG.head_dim,
    bits=32,
    crossover=CAPACITY + 1,
    evidence=((CAPACITY, 0.5, ''), (CAPACITY + 1, 1.5, '')),
  )
  monkeypatch.setattr(policy, 'load', lambda: policy.Policy((entry,)))
  # Another window: programs of the one above must not be found again.
  decode = dataclasses.replace(tight, window=7, crossover=-1)
  np.testing.assert_array_equal(
    answers(dataclasses.replace(method, decode=decode))[1], scores
  )


@pytest.mark.parametrize(
  ('field', 'number', 'message'),
  [
    ('crossover', -2, 'crossover=-2'),
    ('budget', 8, 'budget=8 must exceed'),
    ('kernel', 4, 'kernel=4 must be odd'),
    ('pool', 'sum', "pool='sum'"),
    ('room', 0, 'room=0'),
  ],
)
def test_what_is_refused(field, number, message):
  decode = methods.get_method('snapkv').decode
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(decode, **{field: number}).check(CONFIG, CAPACITY)
