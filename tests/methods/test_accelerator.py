"""A method says on the accelerator what it says on the CPU.

The kernels have oracle tests of their own; here the whole engine runs: pages
that are handed out, rings, selected lists, the device loop of decode. The
bundled model reads text and is asked for a needle in it: attention that was
trained has few near ties, as flat attention of random weights has. A choice
between what is nearly equal may still fall the other way: where logits differ
by more than 1 in 100, they must differ by no more than the CPU's own do when
its weights are rounded otherwise.
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


def make_engine(method, device, weights=None) -> Engine:
  config, own, _ = model()
  weights = own if weights is None else weights
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


def rounded_otherwise(seed: int):
  """The model's weights, each moved by up to a unit in its last place."""
  generator = np.random.default_rng(seed)

  def moved(leaf):
    factor = 1 + generator.uniform(-1, 1, leaf.shape) * 2.0**-7
    return (np.float32(leaf) * factor).astype(leaf.dtype)

  return jax.tree.map(moved, model()[1])


def read_on_cpu(method, weights=None):
  """A session of the CPU's reference that has read the prompt, its engine."""
  cpu = jax.devices('cpu')[0]
  with jax.default_device(cpu):
    engine = make_engine(method, cpu, weights)
    return engine, engine.prefill([prompt()], 0)


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
  engine, session = read_on_cpu(method)
  want = np.asarray(session.scores)
  with jax.default_device(jax.devices('cpu')[0]):
    for token in tokens[0]:
      engine.extend(session, [jnp.asarray([token], jnp.int32)])
  got = min(closeness(first, want), closeness(last, session.scores))
  if got <= 0.99:
    others = (read_on_cpu(method, rounded_otherwise(s))[1] for s in range(4))
    assert got >= min(closeness(x.scores, want) for x in others)
