"""Activations of a prefill spread over the model axis: same answers, less."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.collectives import collective_bytes
from lcx import methods, sharding
from lcx.cache import CacheShape, Shards
from lcx.engine import Engine, steps
from lcx.engine.plan import Plan, Residual
from lcx.engine.readings import Readings
from lcx.models import transformer
from tests.methods.test_conformance import (
  CAPACITY,
  CONFIG,
  answer_scores,
  make_engine,
  prompt,
)

pytestmark = pytest.mark.mesh
PROMPTS = [prompt(1), prompt(2, context=170)]


def make(method, mesh, residual: Residual = 'spread', readings=None):
  return Engine(
    CONFIG,
    make_engine(method, mesh).weights,
    method,
    capacity=CAPACITY,
    batch=2,
    room=64,
    mesh=sharding.make_mesh(*mesh),
    residual=residual,
    readings=readings,
  )


def test_spread_activations_answer_alike():
  method, mesh = methods.get_method('apb', hosts=2), (1, 2, 2)
  tokens, scores = answer_scores(make(method, mesh), PROMPTS)
  want_tokens, want = answer_scores(make_engine(method, mesh), PROMPTS)
  assert tokens == want_tokens
  chex.assert_trees_all_close(scores, want, rtol=1e-4, atol=1e-4)


def layer(residual, dims=(1, 2, 4), batch=1, length=4096):
  """A compiled layer of dense prefill, and its input's bytes a device."""
  config = dataclasses.replace(
    CONFIG, d_model=512, d_ff=4096, n_heads=4, n_kv_heads=4, head_dim=128
  )
  mesh, method = sharding.make_mesh(*dims), methods.get_method('dense')
  plan = Plan(config, method, mesh, False, residual)
  shape = CacheShape(batch, 4, 128, length, 'float32', shards=Shards(*dims))

  def at(x, spec):
    where = jax.sharding.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  def of(shape, dtype, *spec):
    return at(jax.ShapeDtypeStruct(shape, dtype), P(*spec))

  x = of((batch, length, 512), 'float32', 'data', plan.token_axes)
  kinds = ('int32', 'int32', bool)
  prompt = [of((batch, length), kind, 'data', 'seq') for kind in kinds]
  found = transformer.abstract(config).layers[0]
  weights = jax.tree.map(at, found, transformer.weight_specs(config).layers[0])
  cache = jax.eval_shape(lambda: method.cache.init(shape))
  cache = jax.tree.map(at, cache, plan.cache_specs())
  run = functools.partial(steps.prefill_layer, plan=plan, room=length)
  args = (weights, x, cache, method.decode.init_state(shape), *prompt)
  args += (of((batch,), 'int32', 'data'), of((), 'int32'), of((), 'int32'))
  program = jax.jit(run, donate_argnums=(1, 2)).lower(*args).compile()
  return program, int(np.prod(x.sharding.shard_shape(x.shape))) * 4


def test_spread_activations_take_less_memory():
  def memory(residual):
    program, entering = layer(residual)
    analysis = program.memory_analysis()
    assert analysis is not None
    return entering, entering + analysis.temp_size_in_bytes

  whole, spread = memory('whole'), memory('spread')
  assert whole[0] == 4 * spread[0]
  assert spread[1] < 0.75 * whole[1]


def test_rows_of_a_batch_stay_on_their_shard():
  """Two rows a device: keys and values travel, activations do not."""
  text = layer('whole', (1, 2, 1), batch=2)[0].as_text() or ''
  want = {'all-gather': 2 * 4096 / 2 * 2 * 4 * 128 * 4}
  assert collective_bytes(text, 2) == want


@pytest.mark.long
def test_a_shared_dense_prefill_may_be_spread():
  readings, mesh = Readings(1e9), (1, 1, 2)
  dense, quest = (
    methods.get_method(n).at_tight_budget(300) for n in ('dense', 'quest')
  )
  make(dense, mesh, readings=readings).prefill(PROMPTS, 0)
  engine = make(quest, mesh, readings=readings)
  got = np.asarray(engine.prefill(PROMPTS, 0).scores)
  assert not {key[0] for key in engine._programs} & {'prefill kept', 'embed'}
  want = np.asarray(make_engine(quest, mesh).prefill(PROMPTS, 0).scores)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)
  # One that keeps activations whole reads by itself.
  other = make(quest, mesh, 'whole', readings)
  other.prefill(PROMPTS, 0)
  assert 'prefill kept' in {key[0] for key in other._programs}


def test_refusals():
  method = methods.get_method('apb', hosts=2, anchor=33)
  with pytest.raises(ValueError, match="residual='split' must be one of"):
    make(method, (1, 2, 2), 'split')  # pyrefly: ignore
  with pytest.raises(ValueError, match='4 equal pieces') as error:
    make(method, (1, 2, 2)).prefill(PROMPTS, 0)
  assert '\n' not in str(error.value)
