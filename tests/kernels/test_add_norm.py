"""A residual sum and its norm in one launch: what the transformer's are."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import add_norm
from lcx.cache.base import CacheShape
from lcx.engine import steps
from lcx.engine.plan import Plan
from lcx.methods import get_method
from lcx.methods.base import Tail
from lcx.models import transformer
from lcx.models.presets import preset

SHAPES = [(1, 1, 896), (3, 2, 100), (2, 1, 4096)]


def check(shape, dtype, **how):
  rng = np.random.default_rng(0)
  x, delta = jnp.asarray(rng.normal(size=(2, *shape)), dtype)
  scale = jnp.asarray(1 + rng.normal(size=shape[-1]), dtype)
  got = add_norm.gpu.add_norm(x, delta, scale, 1e-6, **how)
  want = transformer.add_norm(x, delta, scale, 1e-6)
  # The same rounding; a sum in another order moves a few values by one step.
  step = float(jnp.finfo(dtype).eps)
  np.testing.assert_array_equal(got[0], want[0])
  chex.assert_trees_all_close(got[1], want[1], rtol=4 * step, atol=4 * step)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('shape', SHAPES)
def test_interpreted(shape, dtype):
  check(shape, dtype, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('shape', SHAPES)
def test_on_a_gpu(shape, dtype):
  check(shape, dtype)


@pytest.mark.parametrize('axes', [(1, 1, 1), (2, 1, 2)])
def test_a_decode_step_takes_it_on_any_mesh(axes, monkeypatch):
  # No other test's configuration: its programs must not be found again.
  config, method = preset('tiny', norm_eps=3e-5), get_method('dense')
  axis_names = ('data', 'seq', 'model')
  types = (jax.sharding.AxisType.Auto,) * 3
  devices = jax.devices()[: np.prod(axes)]
  mesh = jax.make_mesh(axes, axis_names, axis_types=types, devices=devices)
  weights = transformer.init(config, jax.random.key(0), mesh)
  shape = CacheShape(2, config.n_kv_heads, config.head_dim, 64, 'float32')
  caches = tuple(method.cache.init(shape) for _ in weights.layers)
  states = tuple(method.decode.init_state(shape) for _ in weights.layers)
  place = jnp.zeros(2, jnp.int32)
  arrays = (weights, caches, states, jnp.array([[3], [5]]), place)
  arrays += (Tail(place, place), place + 1, jnp.int32(0))

  def scores(**other):
    plan = Plan(config, method, mesh, **other)
    run = functools.partial(steps.few_tokens, plan=plan)
    text = str(jax.make_jaxpr(run)(*arrays))
    return run(*arrays)[0], text.count('name=add_norm')

  want, launches = scores()
  assert launches == 0
  run = functools.partial(add_norm.gpu.add_norm, interpret=True)
  monkeypatch.setattr(add_norm.gpu, 'add_norm', run)
  monkeypatch.setattr(add_norm, 'serves', lambda width: True)
  got, launches = scores(trace=False)
  # Layers are traced once, so that both sums of a layer stand there once.
  assert launches == 2
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
