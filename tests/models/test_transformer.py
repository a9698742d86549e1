"""The transformer's pure functions, and where their weights live."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx import sharding
from lcx.models import transformer
from lcx.models.config import ModelConfig, RopeConfig
from lcx.models.presets import PRESETS, preset

TINY = preset('tiny')


def _tokens(config, batch=2, length=24):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.integers(0, config.vocab_size, (batch, length)))


@pytest.mark.parametrize('name', sorted(PRESETS))
def test_shapes_and_specs_of_presets(name):
  config = preset(name)
  shapes, specs = (
    transformer.abstract(config),
    transformer.weight_specs(config),
  )
  assert len(shapes.layers) == config.n_layers
  jax.tree.map(
    lambda a, s: chex.assert_equal(len(a.shape), len(s)), shapes, specs
  )


def test_functions_compose_to_forward():
  config = preset('tiny', qkv_bias=True, qk_norm=True, tie_embeddings=False)
  weights = transformer.init(config, jax.random.key(0))
  tokens = _tokens(config)
  want = transformer.forward(weights, tokens, config)
  assert want.dtype == jnp.float32 and want.shape == (2, 24, 256)
  attend = transformer.dense_attention(config)

  @chex.assert_max_traces(1)
  def layer(state, x):
    q, k, v = transformer.attention_inputs(state, x, config)
    chex.assert_shape(q, (2, 24, 4, 16))
    chex.assert_shape([k, v], (2, 24, 2, 16))
    # 24 positions in pieces of 10, 10 and 4.
    return transformer.layer_output(state, x, attend(q, k, v, 0), config, 10)

  layer = jax.jit(layer)
  x = transformer.embed(weights.embed, tokens, config)
  for state in weights.layers:
    x = layer(state, x)
  got = transformer.logits(weights, x[:, -1:], config)
  chex.assert_trees_all_close(got, want[:, -1:], rtol=1e-4, atol=1e-5)


def test_query_head_reads_its_kv_head():
  q = jnp.arange(2 * 6 * 4.0).reshape(2, 6, 4)
  k, v = -q[:, :3], -10 * q[:, :3]
  joint = transformer.merge_qkv(q, k, v)
  chex.assert_shape(joint, (2, 3, 4, 4))
  chex.assert_trees_all_equal(transformer.split_qkv(joint), (q, k, v))
  chex.assert_trees_all_equal(joint[:, 1, :2], q[:, 2:4])


def test_no_future_and_sliding_window():
  config = preset('tiny', sliding_window=5, n_layers=1)
  weights = transformer.init(config, jax.random.key(1))
  tokens = _tokens(config, 1)
  run = jax.jit(lambda t: transformer.forward(weights, t, config))
  base, changed = run(tokens), run(tokens.at[0, 9].add(1))
  moved = np.abs(np.asarray(base - changed)).max(axis=(0, 2)) > 0
  assert np.flatnonzero(moved).tolist() == [9, 10, 11, 12, 13]


def test_gradient_with_remat():
  weights = transformer.init(TINY, jax.random.key(0))
  tokens = _tokens(TINY, 1, 12)

  def loss(weights, remat):
    out = transformer.forward(weights, tokens, TINY, remat=remat)
    return jnp.mean(out**2)

  plain = jax.jit(jax.grad(loss), static_argnums=1)(weights, False)
  again = jax.jit(jax.grad(loss), static_argnums=1)(weights, True)
  chex.assert_trees_all_close(plain, again, rtol=1e-4, atol=1e-6)


def test_weights_on_a_mesh():
  mesh = sharding.make_mesh()
  weights = transformer.init(TINY, jax.random.key(0), mesh)
  chex.assert_trees_all_close(
    weights, transformer.init(TINY, jax.random.key(0))
  )


def test_refusals():
  with pytest.raises(ValueError, match='n_kv_heads=3 must divide n_heads=4'):
    preset('tiny', n_kv_heads=3)
  with pytest.raises(ValueError, match='is unknown'):
    preset('gpt5')
  with pytest.raises(ValueError, match='needs original_max'):
    RopeConfig(kind='yarn', factor=4.0)
  with pytest.raises(ValueError, match='dtype'):
    ModelConfig(8, 8, 1, 1, 1, 8, 8, dtype='int8')
  with pytest.raises(ValueError, match='needs 64 devices'):
    sharding.make_mesh(model=64)
  with pytest.raises(ValueError, match='logical axis'):
    sharding.spec('heds')
