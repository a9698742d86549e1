"""Products of a decoded token: against float64, and the layers they make."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from kernels_pallas import add_norm, decode_matmul, dispatch
from kernels_pallas.append_token import Joint
from kernels_pallas.decode_matmul import MatmulSizes, gpu
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


def _coded(w):
  """The matrix in int8, and what its codes stand for, in float64."""
  step = np.abs(oracle.wide(w)).max(axis=-1, keepdims=True) / 127.5
  codes = np.clip(np.round(oracle.wide(w) / step), -128, 127)
  step = step.astype(np.float32)
  matrix = decode_matmul.Codes(jnp.asarray(codes, jnp.int8), jnp.asarray(step))
  return matrix, codes * oracle.wide(step)


def _quantised(y, dtype):
  """What the codes of a token stand for, which come of it in its own dtype."""

  def rounded(x):
    return oracle.wide(jnp.asarray(x, dtype))

  y = rounded(y)
  step = rounded(np.abs(y).max() / 127.5)
  return np.clip(np.round(y / step), -128, 127) * step


def _both(w, y, coded):
  """A matrix and a vector as a kernel takes them, and in float64."""
  if not coded:
    return w, oracle.wide(w), y
  y = _quantised(y, w.dtype)
  return *_coded(w), y


def _assert_close(got, want, dtype):
  tolerance = oracle.TOLERANCE[jnp.dtype(dtype).name][0]
  size = max(1.0, np.max(np.abs(want)))
  chex.assert_trees_all_close(
    oracle.wide(got), want, rtol=0, atol=tolerance * size
  )


def _matmul(name, dtype, normed, interpret, coded=False):
  outputs, inputs = SIZES[name]
  rng, x, w, scale = _operands(inputs, outputs, dtype=dtype)
  norm = scale if normed else None
  add = cases.floats(rng, (outputs,), dtype)
  run = jax.jit(
    functools.partial(gpu.matmul, norm=norm, eps=EPS, interpret=interpret)
  )
  y = oracle.wide(x) if norm is None else _norm(x, norm)
  w, wide, y = _both(w, y, coded)
  want = wide @ y
  _assert_close(run(x, w), want, dtype)
  _assert_close(run(x, w, add=add), want + oracle.wide(add), dtype)


def _gated(outputs, inputs, interpret, coded=False):
  _, x, w, scale = _operands(inputs, outputs, 2)
  w, wide, y = _both(w, _norm(x, scale), coded)
  got = jax.jit(
    functools.partial(
      gpu.gated_matmul, norm=scale, eps=EPS, interpret=interpret
    )
  )(x, w)
  gate, up = np.einsum('d,fcd->cf', y, wide)
  _assert_close(got, gate / (1 + np.exp(-gate)) * up, jnp.bfloat16)


@pytest.mark.parametrize('normed', [False, True])
@pytest.mark.parametrize('name', SIZES)
def test_matmul(name, normed):
  dtype = jnp.float16 if name == 'o' else jnp.bfloat16
  _matmul(name, dtype, normed, interpret=True)


@pytest.mark.parametrize(('outputs', 'inputs'), [(26, 896), (32, 576)])
def test_gated_matmul(outputs, inputs):
  _gated(outputs, inputs, interpret=True)


def test_codes():
  _matmul('down', jnp.float16, False, interpret=True, coded=True)
  _gated(6, 576, interpret=True, coded=True)
  _rotated(1, 3, 8, 576, interpret=True, coded=True)


def test_a_token_of_zeros_has_codes():
  w = decode_matmul.Codes(jnp.ones((2, 512), jnp.int8), jnp.ones((2, 1)))
  zeros = jnp.zeros(512, jnp.bfloat16)
  got = gpu.matmul(zeros, w, add=jnp.ones(2), interpret=True)
  chex.assert_trees_all_equal(got, jnp.ones(2, jnp.bfloat16))


def _rotated(heads, width, dim, inputs, interpret, coded=False):
  rng, x, w, scale = _operands(inputs, heads, width, dim)
  bias = cases.floats(rng, (heads, width, dim), jnp.bfloat16)
  angle = rng.uniform(0, 7, dim // 2)
  turn = np.array([np.cos(angle), np.sin(angle)], np.float32)
  w, wide, y = _both(w, _norm(x, scale), coded)
  got = jax.jit(
    functools.partial(
      gpu.rotated_matmul, norm=scale, eps=EPS, interpret=interpret
    )
  )(x, w, turn, add=bias)
  y = wide @ y + oracle.wide(bias)
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


@pytest.mark.gpu
@pytest.mark.parametrize('coded', [False, True])
@pytest.mark.parametrize('name', SIZES)
def test_on_a_gpu(name, coded):
  _rotated(2, 9, 64, SIZES[name][1], interpret=False, coded=coded)
  for normed in (False, True):
    _matmul(name, jnp.bfloat16, normed, interpret=False, coded=coded)
  _gated(*SIZES[name], interpret=False, coded=coded)


@pytest.mark.gpu
@pytest.mark.parametrize(
  ('outputs', 'inputs'), [(6, 512), (64, 4096), (16, 14336)]
)
def test_codes_are_multiplied_without_error_on_a_gpu(outputs, inputs):
  _whole(outputs, inputs, interpret=False)


def test_codes_are_multiplied_without_error():
  _whole(2, 512, interpret=True)


def _whole(outputs, inputs, interpret):
  """Products of whole numbers, of which a GPU takes four an instruction."""
  rng = np.random.default_rng(0)
  codes = rng.integers(-128, 128, (outputs, inputs)).astype(np.int8)
  x = rng.integers(-127, 128, inputs).astype(np.float32)
  w = decode_matmul.Codes(jnp.asarray(codes), jnp.ones((outputs, 1)))
  x[0] = 127.5  # a code stands for 1 then, and the largest for this
  got = gpu.matmul(jnp.asarray(x), w, interpret=interpret)
  want = codes.astype(np.float64) @ np.minimum(x, 127)
  chex.assert_trees_all_close(oracle.wide(got), want, rtol=1e-6)


@pytest.mark.h100_aot
@pytest.mark.parametrize('coded', [False, True])
def test_a_wide_layers_products_lower(coded):
  device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('one',), abstract_device=device)

  def of(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)

  def matrix(*shape):
    if not coded:
      return of(*shape)
    steps = of(*shape[:-1], 1, dtype=jnp.float32)
    return decode_matmul.Codes(of(*shape, dtype=jnp.int8), steps)

  def run(x, y, norm, qkv, turn, o, gate_up, down):
    return (
      gpu.rotated_matmul(x, qkv, turn, norm=norm, eps=EPS),
      gpu.matmul(x, o, add=x),
      gpu.gated_matmul(x, gate_up),
      gpu.matmul(y, down, add=x),
    )

  x, y, turn = of(4096), of(14336), of(2, 64, dtype=jnp.float32)
  matrices = matrix(8, 6, 128, 4096), turn, matrix(4096, 4096)
  wide = matrix(14336, 2, 4096), matrix(4096, 14336)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(run).trace(x, y, x, *matrices, *wide)
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('__gpu$xla.gpu.triton') == 4


def test_sizes():
  assert MatmulSizes().filled(1152, 896, 4, 2) == MatmulSizes(4, 2, 1024)
  assert MatmulSizes(2, 8).filled(1152, 4096, 4, 2) == MatmulSizes(2, 8, 2048)
  assert MatmulSizes(rows=4).filled(6, 64, 1, 1).rows == 2
  # As many bytes of smaller numbers.
  assert MatmulSizes().filled(64, 64, 2, 1, itemsize=1).rows == 4
  assert MatmulSizes().filled(64, 64, 1, 1, itemsize=4).rows == 1
  # Rows that no power of two above 1 divides.
  assert MatmulSizes().filled(5, 64, 4, 1).rows == 1


def test_what_is_not_served(monkeypatch):
  w = jnp.zeros((64, 2, 64), jnp.bfloat16)
  assert not decode_matmul.serves(1, w)  # no GPU here
  monkeypatch.setattr(dispatch, '_order', lambda: ('gpu', 'xla'))
  assert decode_matmul.serves(1, w, w[:, 0])
  assert not decode_matmul.serves(2, w)
  assert not decode_matmul.serves(1, w, w.astype(jnp.float32))
  assert not decode_matmul.serves(1, {'code': w})
  assert not decode_matmul.serves(1, w[:3])
  # Codes, of which a thread must find four beside each other in a row.
  codes = decode_matmul.Codes(jnp.zeros((64, 520), jnp.int8), jnp.ones((64, 1)))
  assert not decode_matmul.serves(1, codes)
  assert decode_matmul.serves(1, codes._replace(codes=codes.codes[:, :512]))
  assert not decode_matmul.serves(1, codes._replace(codes=codes.codes[:, :496]))


@pytest.mark.parametrize('kind', low_bit.KINDS)
def test_which_low_bits_a_layer_takes(kind, monkeypatch):
  pytest.importorskip('qwix')
  monkeypatch.setattr(dispatch, '_order', lambda: ('gpu', 'xla'))
  config = preset('tiny', d_model=512, d_ff=512, n_heads=8, head_dim=64)
  config = config.replace(dtype='bfloat16')
  layer = jax.eval_shape(
    lambda: transformer.init(config, jax.random.key(0)).layers[0]
  )
  few = jax.eval_shape(lambda x: _few_bits(x, kind), layer)
  seen = []

  def note(layer, x):
    seen.append(decode_layer.serves(layer, x))

  x = jax.ShapeDtypeStruct((1, 1, 512), jnp.bfloat16)
  jax.eval_shape(note, layer, x)
  jax.eval_shape(note, few, x)
  assert seen == [True, kind == 'w8a8']


def _few_bits(layer, kind='w8a8'):
  return {
    name: low_bit.matrix(w, kind, low_bit._INPUTS[name])
    if name in low_bit._INPUTS
    else w
    for name, w in layer.items()
  }


def test_a_layer_of_codes_is_the_transformers(monkeypatch):
  pytest.importorskip('qwix')
  config = preset('tiny')
  rng = np.random.default_rng(0)
  shapes = transformer.abstract(config).layers[0].items()
  layer = {n: cases.floats(rng, w.shape, jnp.float32) for n, w in shapes}
  layer = jax.jit(_few_bits)(layer)
  x = cases.floats(rng, (1, 1, config.d_model), jnp.float32)
  heads = (1, 1, config.n_heads, config.head_dim)
  attention = cases.floats(rng, heads, jnp.float32)
  _interpret(monkeypatch)
  want, got = (
    jax.jit(functools.partial(where.layer_output, config=config))(
      layer, x, attention
    )
    for where in (transformer, decode_layer)
  )
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def _interpret(monkeypatch):
  for name in ('matmul', 'gated_matmul', 'rotated_matmul'):
    run = functools.partial(getattr(gpu, name), interpret=True)
    monkeypatch.setattr(decode_matmul, name, run)


def assert_alike(gots, wants, tolerance, coded):
  """All within the tolerance; of codes, most are.

  A number of a token that stands between two codes may round to either, and a
  step is 1/127 of the token's largest: that may err by four of them.
  """
  errors, steps = [], []
  for got, want in zip(gots, wants, strict=True):
    got, want = ravel_pytree(got)[0], ravel_pytree(want)[0]
    errors.append(float(jnp.max(jnp.abs(got - want))))
    steps.append(float(jnp.max(jnp.abs(want))) / 127)
  assert np.median(errors) < tolerance, errors
  assert max(errors) < (4 * max(steps) if coded else tolerance), errors


@pytest.mark.parametrize(
  ('bias', 'wide', 'coded'),
  [
    (True, True, False),
    pytest.param(True, True, True, marks=pytest.mark.long),
    pytest.param(True, False, False, marks=pytest.mark.long),
    pytest.param(False, False, False, marks=pytest.mark.long),
    pytest.param(False, False, True, marks=pytest.mark.long),
  ],
)
def test_a_decode_step_takes_them(bias, wide, coded, monkeypatch):
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
  if coded:
    pytest.importorskip('qwix')
    weights = low_bit.quantise(weights, 'w8a8')
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

  tokens = [jnp.array([[token]]) for token in range(3, 8 if coded else 4)]
  wants = [scores(token)[0] for token in tokens]
  assert scores(tokens[0])[1] == 0
  _interpret(monkeypatch)
  monkeypatch.setattr(decode_layer, 'serves', lambda layer, x: x.shape[1] == 1)
  if wide:
    run = functools.partial(add_norm.gpu.add_norm, interpret=True)
    monkeypatch.setattr(add_norm.gpu, 'add_norm', run)
    monkeypatch.setattr(add_norm, 'serves', lambda width: True)
    monkeypatch.setattr(decode_layer, 'WIDE', config.d_model)
  gots = [scores(token, trace=False)[0] for token in tokens]
  _, launches, text = scores(tokens[0], trace=False)
  # Layers are traced once; of two for queries, keys and values one is used.
  assert launches == 4 + bias
  assert text.count('name=add_norm') == wide
  assert_alike(gots, wants, 1e-4, coded)
  assert scores(jnp.array([[3, 4]]), trace=False)[1] == 0

  at = jnp.array([[5]])
  inputs = jax.random.normal(jax.random.key(2), (5, 1, 1, config.d_model))
  layer, rope = weights.layers[1], transformer.make_rope(config)
  joints = [decode_layer.rotated_inputs(layer, x, at, config) for x in inputs]
  if not bias:  # queries and keys have norms of their own
    assert joints == [None] * 5
    return
  wants = [transformer.attention_inputs(layer, x, config) for x in inputs]
  wants = [Joint.of(rope(q, at), rope(k, at), v) for q, k, v in wants]
  assert_alike(joints, wants, 1e-5, coded)
