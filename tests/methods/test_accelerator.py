"""A method says on the accelerator what it says on the CPU.

The kernels have oracle tests of their own; here the whole engine runs: pages
that are handed out, rings, selected lists, the device loop of decode. Heads as
in SmolLM2: 9 queries over 3 keys, head dim 64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from kernels_pallas import dispatch
from lcx import methods, sharding
from lcx.engine import Engine
from lcx.methods.base import Prompt
from lcx.models import transformer
from lcx.models.presets import PRESETS

LENGTH, CAPACITY, NEW = 1000, 1088, 12
CONFIG = PRESETS['smollm2_135m'].replace(
  n_layers=4, vocab_size=1024, dtype='bfloat16'
)


def one_device(device) -> Mesh:
  return Mesh(
    np.array([device]).reshape(1, 1, 1),
    sharding.MESH_AXES,
    axis_types=(AxisType.Auto,) * 3,
  )


@functools.cache
def weights():
  with jax.default_device(jax.devices('cpu')[0]):
    return jax.device_get(transformer.init(CONFIG, jax.random.key(0)))


def make_engine(method, device) -> Engine:
  with jax.default_device(device):
    return Engine(
      CONFIG, weights(), method, capacity=CAPACITY, mesh=one_device(device)
    )


def prompt() -> Prompt:
  draw = np.random.default_rng(0)

  def tokens(n):
    return draw.integers(0, CONFIG.vocab_size, n).astype(np.int32)

  return Prompt(tokens(8), tokens(LENGTH - 24), (tokens(16),))


def closeness(got, want) -> float:
  """Correlation of two rows of logits: 1 but for rounding and rare ties."""
  return float(
    np.corrcoef(np.float64(got).ravel(), np.float64(want).ravel())[0, 1]
  )


@pytest.mark.gpu
@pytest.mark.parametrize('name', methods.names())
def test_says_what_the_cpu_says(name, monkeypatch):
  method = methods.get_method(name).at_tight_budget(LENGTH)
  engine = make_engine(method, jax.devices()[0])
  session = engine.prefill([prompt()], 0)
  first = np.asarray(session.scores)
  tokens, status = engine.decode(session, NEW)
  assert status == ['ok']
  last = np.asarray(session.scores)

  monkeypatch.setattr(dispatch, '_order', lambda: ('xla',))
  jax.clear_caches()
  with jax.default_device(jax.devices('cpu')[0]):
    engine = make_engine(method, jax.devices('cpu')[0])
    session = engine.prefill([prompt()], 0)
    assert closeness(first, session.scores) > 0.99
    for token in tokens[0]:
      engine.extend(session, [jnp.asarray([token], jnp.int32)])
    assert closeness(last, session.scores) > 0.99
