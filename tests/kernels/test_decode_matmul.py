"""Products of a decoded token: against float64, and the layers they make."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import add_norm, decode_matmul, dispatch
from kernels_pallas.append_token import Joint
from kernels_pallas.decode_matmul import MatmulSizes, Scaled, gpu
from lcx.cache.base import CacheShape
from lcx.engine import steps
from lcx.engine.plan import Plan
from lcx.methods import get_method
from lcx.methods.base import Tail
from lcx.models import decode_layer, low_bit, transformer
from lcx.models.presets import preset
from tests import oracle
from tests.kernels import cases

EPS = 1e-5
# Outputs and inputs of SmolLM2's and Qwen2.5's matrices, some of the outputs.
SIZES = {
  'qkv': (40, 896),
  'o': (36, 576),
  'down': (24, 4864),
}


def _norm(x, scale):
  x = oracle.wide(x)
  factor = np.mean(x * x, axis=-1, keepdims=True) + EPS
  return x / np.sqrt(factor) * oracle.wide(scale)


def _operands(inputs, *outputs, dtype=jnp.bfloat16):
  rng = np.random.default_rng(inputs)
  x = cases.floats(rng, (inputs,), dtype)
  w = rng.normal(size=(*outputs, inputs)) * inputs**-0.5
  scale = jnp.asarray(rng.uniform(0.5, 1.5, inputs), dtype)
  return rng, x, jnp.asarray(w, dtype), scale


def _assert_close(got, want, dtype):
  tolerance = oracle.TOLERANCE[jnp.dtype(dtype).name][0]
  size = max(1.0, np.max(np.abs(want)))
  chex.assert_trees_all_close(
    oracle.wide(got), want, rtol=0, atol=tolerance * size
  )


def _matmul(name, dtype, normed, interpret):
  outputs, inputs = SIZES[name]
  rng, x, w, scale = _operands(inputs, outputs, dtype=dtype)
  norm = scale if normed else None
  add = cases.floats(rng, (outputs,), dtype)
  run = jax.jit(
    functools.partial(gpu.matmul, norm=norm, eps=EPS, interpret=interpret)
  )
  y = oracle.wide(x) if norm is None else _norm(x, norm)
  want = oracle.wide(w) @ y
  _assert_close(run(x, w), want, dtype)
  _assert_close(run(x, w, add=add), want + oracle.wide(add), dtype)


def _gated(outputs, inputs, interpret):
  _, x, w, scale = _operands(inputs, outputs, 2)
  got = jax.jit(
    functools.partial(
      gpu.gated_matmul, norm=scale, eps=EPS, interpret=interpret
    )
  )(x, w)
  gate, up = np.einsum('d,fcd->cf', _norm(x, scale), oracle.wide(w))
  _assert_close(got, gate / (1 + np.exp(-gate)) * up, jnp.bfloat16)


@pytest.mark.parametrize('normed', [False, True])
@pytest.mark.parametrize('name', SIZES)
def test_matmul(name, normed):
  dtype = jnp.float16 if name == 'o' else jnp.bfloat16
  _matmul(name, dtype, normed, interpret=True)


@pytest.mark.parametrize(('outputs', 'inputs'), [(26, 896), (32, 576)])
def test_gated_matmul(outputs, inputs):
  _gated(outputs, inputs, interpret=True)


def _rotated(heads, width, dim, inputs, interpret):
  rng, x, w, scale = _operands(inputs, heads, width, dim)
  bias = cases.floats(rng, (heads, width, dim), jnp.bfloat16)
  angle = rng.uniform(0, 7, dim // 2)
  turn = np.array([np.cos(angle), np.sin(angle)], np.float32)
  got = jax.jit(
    functools.partial(
      gpu.rotated_matmul, norm=scale, eps=EPS, interpret=interpret
    )
  )(x, w, turn, add=bias)
  y = oracle.wide(w) @ _norm(x, scale) + oracle.wide(bias)
  a, b = np.split(y, 2, axis=-1)
  turned = np.concatenate(
    [a * turn[0] - b * turn[1], b * turn[0] + a * turn[1]], axis=-1
  )
  want = [turned[:, :-2].reshape(-1, dim), turned[:, -2], y[:, -1]]
  _assert_close(got, np.concatenate(want), jnp.bfloat16)


@pytest.mark.parametrize(
  ('heads', 'width', 'dim', 'inputs'), [(2, 4, 16, 576), (3, 3, 8, 128)]
)
def test_rotated_matmul(heads, width, dim, inputs):
  _rotated(heads, width, dim, inputs, interpret=True)


def _codes(inputs, outputs, interpret):
  """All three of codes: as of the matrix that these stand for."""
  rng, x, _, norm = _operands(inputs, 1)
  run = functools.partial(jax.jit, static_argnames=('eps', 'interpret'))
  more = {'norm': norm, 'eps': EPS, 'interpret': interpret}

  def draw(*shape):
    codes = rng.integers(-127, 128, (*shape, inputs)).astype(np.int8)
    scale = rng.uniform(0.5, 1.5, shape) * inputs**-0.5 / 127
    scale = scale.astype(np.float32)
    w = Scaled(jnp.asarray(codes), jnp.asarray(scale))
    return w, (codes * scale[..., None].astype(float)) @ _norm(x, norm)

  w, want = draw(outputs)
  _assert_close(run(gpu.matmul)(x, w, **more), want, jnp.bfloat16)
  w, want = draw(outputs, 2)
  want = want[:, 0] / (1 + np.exp(-want[:, 0])) * want[:, 1]
  _assert_close(run(gpu.gated_matmul)(x, w, **more), want, jnp.bfloat16)
  w, want = draw(2, 3, 16)
  still = np.stack([np.ones(8), np.zeros(8)]).astype(np.float32)
  want = want.swapaxes(0, 1).reshape(-1, 16)
  got = run(gpu.rotated_matmul)(x, w, still, **more)
  _assert_close(got, want, jnp.bfloat16)


def test_codes():
  _codes(896, 24, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize('name', SIZES)
def test_on_a_gpu(name):
  _codes(SIZES[name][1], SIZES[name][0], interpret=False)
  _rotated(2, 9, 64, SIZES[name][1], interpret=False)
  _matmul(name, jnp.bfloat16, True, interpret=False)
  _gated(*SIZES[name], interpret=False)


def test_sizes():
  assert MatmulSizes().filled(1152, 896, 4, 2) == MatmulSizes(4, 2, 1024)
  assert MatmulSizes(2, 8).filled(1152, 4096, 4, 2) == MatmulSizes(2, 8, 2048)
  assert MatmulSizes(rows=4).filled(6, 64, 1, 1).rows == 2
  # Rows that no power of two above 1 divides.
  assert MatmulSizes().filled(5, 64, 4, 1).rows == 1


def test_codes_take_twice_the_rows():
  w = Scaled(jnp.zeros((64, 64), jnp.int8), jnp.ones(64))
  assert MatmulSizes().filled(64, 64, 2, 1, w).rows == 4
  assert MatmulSizes(rows=2).filled(64, 64, 1, 1, w).rows == 2


@pytest.mark.long
def test_a_layer_of_codes_takes_them(monkeypatch):
  """As the layer's own lines say, which quantise the token, too."""
  pytest.importorskip('qwix')
  for name in ('matmul', 'gated_matmul', 'rotated_matmul'):
    run = functools.partial(getattr(gpu, name), interpret=True)
    monkeypatch.setattr(decode_matmul, name, run)
  monkeypatch.setattr(dispatch, '_order', lambda: ('gpu', 'xla'))
  config = preset('tiny', n_layers=1, dtype='float32')
  weights = transformer.init(config, jax.random.key(0))
  x = jax.random.normal(jax.random.key(1), (1, 1, config.d_model))
  heads = (1, 1, config.n_heads, config.head_dim)
  attention = jax.random.normal(jax.random.key(2), heads)
  served = {'w8a8': True, 'w4a16': False}
  for kind, serves in served.items():
    (layer,) = low_bit.quantise(weights, kind).layers
    assert decode_layer.serves(layer, x) is serves
  (layer,) = low_bit.quantise(weights, 'w8a8').layers
  for name, given in (
    ('attention_inputs', (x,)),
    ('layer_output', (x, attention)),
  ):
    got = getattr(decode_layer, name)(layer, *given, config)
    want = getattr(transformer, name)(layer, *given, config)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      error = jnp.linalg.norm(mine - theirs) / jnp.linalg.norm(theirs)
      assert mine.shape == theirs.shape and 0 < float(error) < 0.015


def test_what_is_not_served(monkeypatch):
  w = jnp.zeros((64, 2, 64), jnp.bfloat16)
  assert not decode_matmul.serves(1, w)  # no GPU here
  monkeypatch.setattr(dispatch, '_order', lambda: ('gpu', 'xla'))
  assert decode_matmul.serves(1, w, w[:, 0])
  assert not decode_matmul.serves(2, w)
  assert not decode_matmul.serves(1, w, w.astype(jnp.float32))
  assert not decode_matmul.serves(1, {'code': w})
  assert not decode_matmul.serves(1, w[:3])
  codes = Scaled(w.astype(jnp.int8), jnp.ones((64, 2)))
  assert decode_matmul.serves(1, codes, w)
  assert not decode_matmul.serves(1, codes._replace(codes=w))


@pytest.mark.parametrize(
  ('bias', 'wide'),
  [
    (True, True),
    pytest.param(True, False, marks=pytest.mark.long),
    pytest.param(False, False, marks=pytest.mark.long),
  ],
)
def test_a_decode_step_takes_them(bias, wide, monkeypatch):
  # No other test's configuration: its programs must not be found again.
  eps = 8e-5 if wide else 7e-5
  config = preset('tiny', norm_eps=eps, qkv_bias=bias, qk_norm=not bias)
  method = get_method('dense')
  axis_names = ('data', 'seq', 'model')
  types = (jax.sharding.AxisType.Auto,) * 3
  mesh = jax.make_mesh(
    (1, 1, 1), axis_names, axis_types=types, devices=jax.devices()[:1]
  )
  weights = transformer.init(config, jax.random.key(0), mesh)
  for layer in weights.layers:  # else biases are 0 and norms 1
    for name in {'qkv_bias', 'attention_norm', 'ff_norm'} & set(layer):
      layer[name] += 0.1 * jax.random.normal(
        jax.random.key(1), layer[name].shape
      )
  shape = CacheShape(1, config.n_kv_heads, config.head_dim, 64, 'float32')
  caches = tuple(method.cache.init(shape) for _ in weights.layers)
  states = tuple(method.decode.init_state(shape) for _ in weights.layers)
  place = jnp.zeros(1, jnp.int32)

  def scores(tokens, **other):
    plan = Plan(config, method, mesh, **other)
    run = functools.partial(steps.few_tokens, plan=plan)
    count = place + tokens.shape[1]
    rest = (place, Tail(place, place), count, jnp.int32(0))
    arrays = (weights, caches, states, tokens, *rest)
    text = str(jax.make_jaxpr(run)(*arrays))
    return run(*arrays)[0], text.count('name=decode_matmul'), text

  want, launches, _ = scores(jnp.array([[3]]))
  assert launches == 0
  for name in ('matmul', 'gated_matmul', 'rotated_matmul'):
    run = functools.partial(getattr(gpu, name), interpret=True)
    monkeypatch.setattr(decode_matmul, name, run)
  monkeypatch.setattr(decode_layer, 'serves', lambda layer, x: x.shape[1] == 1)
  if wide:
    run = functools.partial(add_norm.gpu.add_norm, interpret=True)
    monkeypatch.setattr(add_norm.gpu, 'add_norm', run)
    monkeypatch.setattr(add_norm, 'serves', lambda width: True)
    monkeypatch.setattr(decode_layer, 'WIDE', config.d_model)
  got, launches, text = scores(jnp.array([[3]]), trace=False)
  # Layers are traced once; of two for queries, keys and values one is used.
  assert launches == 4 + bias
  assert text.count('name=add_norm') == wide
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)
  assert scores(jnp.array([[3, 4]]), trace=False)[1] == 0

  x = jax.random.normal(jax.random.key(2), (1, 1, config.d_model))
  at = jnp.array([[5]])
  joint = decode_layer.rotated_inputs(weights.layers[1], x, at, config)
  if not bias:  # queries and keys have norms of their own
    assert joint is None
    return
  q, k, v = transformer.attention_inputs(weights.layers[1], x, config)
  rope = transformer.make_rope(config)
  want = Joint.of(rope(q, at), rope(k, at), v)
  chex.assert_trees_all_close(joint, want, rtol=1e-5, atol=1e-5)
