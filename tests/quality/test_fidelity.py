"""What selections keep of dense attention, by one-hot values.

The query is the last token of a question about a needle; the heads that look
for it are the model's own. Floors are a little below what was measured.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx import methods
from lcx.engine import Engine, fidelity
from lcx.engine.readings import Readings
from tests.quality import measure

LENGTH, BATCH = 2048, 2
CELL = measure.Cell('niah_multikey_1', LENGTH, 1, BATCH)


@functools.cache
def read():
  """(dense plan, layers' weights and inputs, lengths, the needle's tokens)."""
  model, readings = measure.bundled(), Readings(1e9)
  engine = Engine(
    model.config,
    model.weights,
    methods.get_method('dense'),
    capacity=LENGTH + 128,
    batch=BATCH,
    readings=readings,
    trace=False,
  )
  prompts, answers = zip(*measure.drawn(CELL))
  session = engine.prefill(list(prompts), 0)
  lengths = np.asarray(session.lengths)
  inputs = readings.newest.inputs
  marked = np.zeros((BATCH, inputs[0].shape[1]), bool)
  for row, (prompt, (answer,)) in enumerate(zip(prompts, answers)):
    tokens, n = prompt.whole(0), len(answer)
    at = [
      i for i in range(len(tokens)) if tuple(tokens[i : i + n]) == tuple(answer)
    ]
    assert len(at) == 1
    marked[row, at[0] : at[0] + n] = True
  return engine.plan, engine.weights.layers, inputs, lengths, marked


@functools.cache
def weights(method):
  plan, layers, inputs, lengths, marked = read()
  plan = type(plan)(plan.config, method, plan.mesh, trace=False)
  look = jax.jit(functools.partial(fidelity.weights_of, plan))
  return jnp.stack(
    [
      look(layer, x, lengths, marked, jnp.int32(i))
      for i, (layer, x) in enumerate(zip(layers, inputs))
    ]
  )


def found(name):
  return fidelity.compare(
    weights(measure.method(name, LENGTH)),
    weights(methods.get_method('dense')),
  )


def retrieving():
  """Layers whose heads look at the needle: their share of all such weight."""
  dense = weights(methods.get_method('dense'))[..., 0].sum(axis=-1)  # [L B]
  return np.asarray(dense / dense.sum(axis=0))


def test_dense_sees_everything_and_looks_at_the_needle():
  same = found('dense')
  np.testing.assert_allclose(same.mass, 1.0, atol=1e-4)
  np.testing.assert_allclose(same.recall, 1.0, atol=1e-4)
  dense = weights(methods.get_method('dense'))
  assert float(dense[..., 0].max()) > 0.2


def test_weights_are_those_of_softmax():
  """Against scores computed in full, of the first layer."""
  from lcx.models.transformer import attention_inputs, make_rope

  plan, layers, inputs, lengths, marked = read()
  q, k, _ = attention_inputs(layers[0], inputs[0], plan.config)
  rope, n = make_rope(plan.config), int(lengths[0])
  at = jnp.arange(q.shape[1])[None]
  q, k = rope(q[:1], at)[0, n - 1], rope(k[:1], at)[0, :n]
  k = jnp.repeat(k, q.shape[0] // k.shape[1], axis=1)
  p = jax.nn.softmax(jnp.einsum('nh,snh->ns', q, k) * q.shape[1] ** -0.5)
  got = np.asarray(weights(methods.get_method('dense')))[0, 0]
  np.testing.assert_allclose(got[:, 1], p[:, -1], rtol=1e-3, atol=1e-7)
  want = (p * marked[:1, :n]).sum(axis=1)
  np.testing.assert_allclose(got[:, 0], want, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
  ('name', 'mass', 'recall'),
  [
    ('quest', 0.9, 0.99),
    pytest.param('snapkv', 0.9, 0.99, marks=pytest.mark.long),
    pytest.param('tokenselect', 0.98, 0.99, marks=pytest.mark.long),
  ],
)
def test_selections_keep_mass_and_needles(name, mass, recall):
  seen = found(name)
  kept = (retrieving() * np.asarray(seen.recall)).sum(axis=0).mean()
  print(f'{name}: mass {np.mean(seen.mass):.3f}, needle recall {kept:.3f}')
  assert np.mean(seen.mass) >= mass
  assert kept >= recall


def test_a_window_loses_the_needle():
  seen = found('streaming')
  kept = (retrieving() * np.asarray(seen.recall)).sum(axis=0)
  assert kept.min() < 0.5
