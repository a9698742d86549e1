"""Products of a decoded token: against float64, and the layers they make."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import decode_matmul, dispatch
from kernels_pallas.decode_matmul import gpu
from lcx import sharding
from lcx.models import low_bit, transformer
from lcx.models.presets import preset
from tests import oracle
from tests.kernels import cases

EPS = 1e-5
# SmolLM2's and Qwen2.5's: no power of two divides them far.
SIZES = {
  'qkv': (896, 1152),
  'o': (576, 576),
  'down': (4864, 896),
  'long': (2048, 64),  # several rounds
}


def _norm(x, scale):
  x = oracle.wide(x)
  factor = np.mean(x * x, axis=-1, keepdims=True) + EPS
  return x / np.sqrt(factor) * oracle.wide(scale)


def _operands(rows, inputs, *outputs, dtype=jnp.bfloat16):
  rng = np.random.default_rng(inputs)
  x = cases.floats(rng, (rows, inputs), dtype)
  w = jnp.asarray(rng.normal(size=(inputs, *outputs)) * inputs**-0.5, dtype)
  scale = jnp.asarray(rng.uniform(0.5, 1.5, inputs), dtype)
  return rng, x, w, scale


def _assert_close(got, want, dtype):
  tolerance = oracle.TOLERANCE[jnp.dtype(dtype).name][0]
  size = max(1.0, np.max(np.abs(want)))
  chex.assert_trees_all_close(
    oracle.wide(got), want, rtol=0, atol=tolerance * size
  )


@pytest.mark.parametrize(
  ('name', 'rows'),
  [('qkv', 1), ('o', 4), ('down', 1), ('down', 2), ('long', 3)],
)
def test_matmul(name, rows):
  inputs, outputs = SIZES[name]
  dtype = jnp.float16 if name == 'o' else jnp.bfloat16
  rng, x, w, scale = _operands(rows, inputs, outputs, dtype=dtype)
  norm = scale if name in ('qkv', 'long') else None
  add = cases.floats(rng, (rows if name == 'down' else 1, outputs), dtype)
  run = jax.jit(
    functools.partial(gpu.matmul, norm=norm, eps=EPS, interpret=True)
  )
  y = oracle.wide(x) if norm is None else _norm(x, norm)
  want = y @ oracle.wide(w)
  if name == 'long':
    _assert_close(run(x, w), want, dtype)
  _assert_close(run(x, w, add=add), want + oracle.wide(add), dtype)


@pytest.mark.parametrize(('inputs', 'outputs'), [(896, 4864), (576, 1536)])
def test_gated_matmul(inputs, outputs):
  _, x, w, scale = _operands(2, inputs, 2, outputs)
  got = jax.jit(
    functools.partial(gpu.gated_matmul, norm=scale, eps=EPS, interpret=True)
  )(x, w)
  gate, up = np.einsum('rd,dcf->crf', _norm(x, scale), oracle.wide(w))
  _assert_close(got, gate / (1 + np.exp(-gate)) * up, jnp.bfloat16)


def test_sizes_that_do_not_divide_are_refused():
  _, x, w, _ = _operands(1, 96, 64)
  with pytest.raises(ValueError, match='tiles of 256 rows'):
    gpu.matmul(x, w, block_sizes={'columns': 8, 'warps': 8}, interpret=True)


def _layer():
  config = preset('tiny', dtype='bfloat16', n_layers=1, qkv_bias=True)
  layer = transformer.init(config, jax.random.key(0)).layers[0]
  draw = np.random.default_rng(0).normal(size=(2, 1, 1, 64))
  return config, layer, *jnp.asarray(draw, jnp.bfloat16)


def _both(config, layer, x, attention, mesh):
  heads = attention.reshape(1, 1, config.n_heads, config.head_dim)
  return (
    transformer.attention_inputs(layer, x, config, mesh),
    transformer.layer_output(layer, x, heads, config, mesh=mesh),
  )


def test_layers_on_one_gpu_equal_the_plain_ones(monkeypatch):
  config, layer, x, attention = _layer()
  layer['qkv_bias'] = jnp.ones_like(layer['qkv_bias'])
  want = _both(config, layer, x, attention, None)
  calls = []
  for name in ('matmul', 'gated_matmul'):
    monkeypatch.setattr(
      decode_matmul,
      name,
      lambda *args, name=name, **kwargs: (
        calls.append(name)
        or getattr(gpu, name)(*args, **kwargs, interpret=True)
      ),
    )
  monkeypatch.setattr(dispatch, '_order', lambda: ('gpu', 'xla'))
  got = _both(config, layer, x, attention, sharding.make_mesh())
  assert calls == ['matmul', 'matmul', 'gated_matmul', 'matmul']
  # Weights that a mesh splits, more tokens: plain products.
  split = jax.sharding.AbstractMesh((2,), ('model',))
  transformer.attention_inputs(layer, x, config, split)
  many = jnp.tile(x, (1, decode_matmul.MAX_ROWS + 1, 1))
  transformer.attention_inputs(layer, many, config, sharding.make_mesh())
  assert len(calls) == 4
  jax.tree.map(
    lambda a, b: _assert_close(a, oracle.wide(b), jnp.bfloat16), got, want
  )


def test_what_is_not_served(monkeypatch):
  w = jnp.zeros((64, 2, 64), jnp.bfloat16)
  assert not decode_matmul.serves(1, (w, 1))  # no GPU here
  monkeypatch.setattr(dispatch, '_order', lambda: ('gpu', 'xla'))
  assert decode_matmul.serves(1, (w, 1), (w, 2))
  for rows, matrix in (
    (decode_matmul.MAX_ROWS + 1, w),
    (1, w.astype(jnp.float32)),
    (1, low_bit.matrix(w, 'w8a8', (0,))),
    (1, w[:48]),
    (1, w[..., :60]),
  ):
    assert not decode_matmul.serves(rows, (matrix, 1))


@pytest.mark.h100_aot
@pytest.mark.parametrize('name', ['smollm2_135m', 'qwen2_5_0_5b', 'llama3_8b'])
def test_a_layer_lowers_for_a_gpu(name, monkeypatch):
  monkeypatch.setattr(dispatch, '_order', lambda: ('gpu', 'xla'))
  config = preset(name, dtype='bfloat16')
  layer = transformer.abstract(config).layers[0]
  x, attention = (
    jax.ShapeDtypeStruct((1, 1, width), jnp.bfloat16)
    for width in (config.d_model, config.n_heads * config.head_dim)
  )
  h100 = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=h100)
  with jax.sharding.use_abstract_mesh(mesh):
    exported = jax.export.export(
      jax.jit(lambda *args: _both(config, *args, mesh)),
      platforms=['cuda'],
      disabled_checks=[
        jax.export.DisabledSafetyCheck.custom_call('__gpu$xla.gpu.triton')
      ],
    )(layer, x, attention)
  assert exported.mlir_module().count('@__gpu$xla.gpu.triton') == 4
