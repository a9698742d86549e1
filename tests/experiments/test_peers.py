"""What ours are compared with computes the same thing."""

import dataclasses

import jax
import numpy as np

from experiments import peers
from lcx import methods
from lcx.engine import Engine
from lcx.methods.base import Prompt
from lcx.models import transformer
from lcx.models.presets import PRESETS


def test_dense_attention_that_is_not_fused_is_dense(monkeypatch):
  monkeypatch.setattr(peers, '_SCORE_BYTES', 4 * 4 * 256 * 64)  # 64 rows
  config = dataclasses.replace(PRESETS['tiny'], dtype='float32')
  weights = transformer.init(config, jax.random.key(0))
  tokens = np.arange(200, dtype=np.int32) * 7 % config.vocab_size
  prompt = Prompt(tokens[:0], tokens, ())

  def scores(method):
    engine = Engine(config, weights, method, capacity=320, room=64)
    return np.asarray(engine.prefill([prompt]).scores)

  want = scores(methods.get_method('dense'))
  got = scores(peers.METHODS['unfused'])
  np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)
