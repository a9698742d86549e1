"""A method says on the accelerator what it says on the CPU.

The kernels have oracle tests of their own; here the whole engine runs: pages
that are handed out, rings, selected lists, the device loop of decode. The
bundled model reads text and is asked for a needle in it: attention that was
trained has few near ties. Attention of random weights is nearly flat: there
rounding alone, bfloat16 beside float32 on one CPU, changes what TokenSelect
picks (correlation of logits 0.94, dense 0.9999); here both keep 0.9995.
"""

import functools
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from kernels_pallas import dispatch
from lcx import methods, sharding
from lcx.engine import Engine
from lcx.methods.base import Prompt
from lcx.models import needle

LENGTH, CAPACITY, NEW = 1000, 1088, 12
KEY = 'The special magic number for wandering-age is'


def one_device(device) -> Mesh:
  return Mesh(
    np.array([device]).reshape(1, 1, 1),
    sharding.MESH_AXES,
    axis_types=(AxisType.Auto,) * 3,
  )


@functools.cache
def model():
  """The bundled model, its weights in bfloat16 in the host's memory."""
  with jax.default_device(jax.devices('cpu')[0]):
    found = needle.load('bfloat16')
  return found.config, jax.device_get(found.weights), found.tokenizer


def make_engine(method, device) -> Engine:
  config, weights, _ = model()
  with jax.default_device(device):
    return Engine(
      config, weights, method, capacity=CAPACITY, mesh=one_device(device)
    )


def prompt() -> Prompt:
  """A needle a third into Python's documentation, and its question."""
  tokenizer = model()[2]
  words = ' '.join(pydoc_data.topics.topics.values()).split()[2000:2700]
  words.insert(len(words) // 3, f'{KEY}: 7461823.')
  question = np.asarray(tokenizer.encode(f' {KEY}'), np.int32)
  text = np.asarray(tokenizer.encode(' '.join(words)), np.int32)
  text = text[: LENGTH - len(question)]
  return Prompt(text[:8], text[8:], (question,))


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
