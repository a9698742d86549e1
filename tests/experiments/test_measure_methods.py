"""Times of prompts and answers, by a clock that an engine moves."""

import types

import numpy as np
import pytest

from experiments import measure_methods
from experiments.measure_methods import Bench, Config


class Engine:
  """Takes 1 s a token, and 100 s to compile a length."""

  def __init__(self):
    self.now = self.compile_s = 0.0
    self.read: list[int] = []

  def prefill(self, prompts):
    (prompt,) = prompts
    length = len(prompt.context)
    if length not in self.read:
      self.now += 100
      self.compile_s += 100
    self.read.append(length)
    self.now += length
    cache = types.SimpleNamespace(nbytes=lambda: {'keys': length})
    return types.SimpleNamespace(caches=(cache,), scores=np.zeros(1))

  def decode(self, session, steps):
    del session
    self.now += steps
    return None, ['ok']


@pytest.mark.parametrize(('warm', 'first'), [(0, 64), (16, 16)])
def test_compilation_and_the_first_prompt_are_not_timed(
  warm, first, monkeypatch
):
  engine = Engine()
  clock = types.SimpleNamespace(perf_counter=lambda: engine.now)
  monkeypatch.setattr(measure_methods, 'time', clock)
  bench = object.__new__(Bench)
  bench.config = Config(
    'tiny', {'dense': {}}, (64,), steps=5, repeats=2, warm=warm
  )
  bench.model = types.SimpleNamespace(vocab_size=9)
  bench._engine = lambda *_: engine
  row = bench.answer(None, 64)
  assert engine.read == [first, 64, 64]
  assert row['repeats_ms'] == [69e3] * 2
  assert row['prefill_repeats_ms'] == [64e3] * 2
  assert (row['compile_s'], row['kv_bytes']) == (200 if warm else 100, 64)
  assert bench.prefill(None, 64)['repeats_ms'] == [64e3] * 2


@pytest.mark.parametrize('warm', [-1, 65])
def test_a_first_prompt_longer_than_the_others_is_refused(warm):
  with pytest.raises(ValueError, match=f'config.warm={warm} must be within'):
    Config('tiny', {'dense': {}}, (64, 128), warm=warm)
