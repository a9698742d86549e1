"""Low-bit weights: close to the matrices, and never turned back into them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx import sharding
from lcx.engine import Engine
from lcx.methods.base import Prompt
from lcx.methods.compose import get_method
from lcx.models import low_bit, transformer
from lcx.models.presets import PRESETS

pytest.importorskip('qwix')
CONFIG = dataclasses.replace(
  PRESETS['tiny'], d_model=256, d_ff=1024, tie_embeddings=False, dtype='float32'
)
# Relative error of a product of random numbers, about 0.6 of a step's share.
ERROR = {'w8a8': 0.015, 'fp8': 0.05, 'w4a16': 0.13}
SHAPES = {
  'qkv': ('btd,kchd->btkch', (2, 4, 16, 256)),
  'o': ('btnh,dnh->btd', (256, 4, 64)),
  'gate_up': ('btd,fcd->btfc', (256, 2, 256)),
  'down': ('btf,df->btd', (256, 512)),
}


@pytest.mark.parametrize('kind', low_bit.KINDS)
@pytest.mark.parametrize(
  ('name', 'tokens'),
  [(name, 2) for name in SHAPES]  # few tokens are multiplied otherwise
  + [
    pytest.param(name, 100, marks=[pytest.mark.long] * (name != 'qkv'))
    for name in SHAPES
  ],
)
def test_products_are_close(kind, name, tokens, monkeypatch):
  monkeypatch.setattr(low_bit, '_TILE', 2**14)
  equation, shape = SHAPES[name]
  inputs = low_bit._INPUTS[name]
  draw = np.random.default_rng(0)
  w = jnp.asarray(draw.normal(size=shape), jnp.float32)
  x = draw.normal(size=(1, tokens, *(shape[i] for i in inputs)))
  x = jnp.asarray(x, jnp.float32)
  found = low_bit.matrix(w, kind, inputs).einsum(equation, x)
  want = jnp.einsum(equation, x, w, precision='highest')
  assert found.shape == want.shape and found.dtype == x.dtype
  error = jnp.linalg.norm(found - want) / jnp.linalg.norm(want)
  assert 1e-4 < float(error) < ERROR[kind]
  wide = low_bit.matrix(w, kind, inputs).einsum(
    equation, x.astype(jnp.bfloat16), jnp.float32
  )
  assert wide.dtype == jnp.float32


@pytest.mark.parametrize('kind', low_bit.KINDS)
def test_a_model_answers_nearly_alike(kind):
  weights = transformer.init(CONFIG, jax.random.key(0))
  few = low_bit.quantise(weights, kind)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 80)))
  forward = jax.jit(lambda w: transformer.forward(w, tokens, CONFIG))
  want, found = forward(weights), forward(few)
  error = jnp.linalg.norm(found - want) / jnp.linalg.norm(want)
  assert float(error) < 4 * ERROR[kind]
  assert jax.tree.leaves(few.embed)[0] is jax.tree.leaves(weights.embed)[0]


@pytest.mark.mesh
@pytest.mark.parametrize(
  ('kind', 'model'),
  [
    ('w4a16', 2),
    pytest.param('w8a8', 1, marks=pytest.mark.long),
    pytest.param('w8a8', 2, marks=pytest.mark.long),
    pytest.param('fp8', 2, marks=pytest.mark.long),
  ],
)
def test_an_engine_takes_them(kind, model):
  """What it says next is what `forward` says, on one device and on two."""
  config = CONFIG.replace(n_layers=1)
  few = low_bit.quantise(transformer.init(config, jax.random.key(0)), kind)
  tokens = np.random.default_rng(0).integers(0, 256, 80).astype(np.int32)
  forward = jax.jit(lambda w: transformer.forward(w, tokens[None], config))
  want = np.asarray(forward(few))[0, -1]
  engine = Engine(
    config,
    few,
    get_method('dense'),
    capacity=128,
    mesh=sharding.make_mesh(model=model),
    trace=False,
  )
  nothing = np.zeros((0,), np.int32)
  session = engine.prefill([Prompt(nothing, tokens, ())])
  got = np.asarray(session.scores)[0]
  error = np.linalg.norm(got - want) / np.linalg.norm(want)
  # One token's logits do not quantise the activations, all tokens' do.
  assert error < 2 * ERROR[kind]
  assert len(engine.decode(session, 2)[0][0]) == 2
  matrix = engine.weights.layers[0]['qkv'].array.qvalue
  kv_heads = matrix.sharding.shard_shape(matrix.shape)[0]
  assert kv_heads == config.n_kv_heads // model


MADE = [(kind, n) for kind in ('w8a8', 'w4a16') for n in (1, 512)]


@pytest.mark.gpu
@pytest.mark.parametrize(('kind', 'tokens'), [*MADE, ('fp8', 1), ('fp8', 512)])
def test_no_matrix_is_made_on_a_gpu(kind, tokens):
  test_no_matrix_is_made_in_the_activations_dtype(kind, tokens)


@pytest.mark.parametrize(('kind', 'tokens'), MADE)
def test_no_matrix_is_made_in_the_activations_dtype(kind, tokens):
  """Temporaries, the result apart, are smaller than the matrix in bfloat16.

  (fp8 is left to the chip: the CPU has none and widens the matrix to float16.)
  """
  shape = (16384, 1024)  # 16M weights, four tiles
  w = low_bit.matrix(jnp.zeros(shape, jnp.bfloat16), kind, (1,))
  x = jnp.zeros((1, tokens, 1024), jnp.bfloat16)
  run = jax.jit(lambda w, x: w.einsum('btd,fd->btf', x))
  temporary = run.lower(w, x).compile().memory_analysis().temp_size_in_bytes
  products = 4 * tokens * 16384
  assert temporary - products < 2 * np.prod(shape)


@pytest.mark.parametrize('kind', low_bit.KINDS)
def test_input_axes_can_be_merged(kind):
  draw = np.random.default_rng(0)
  w = low_bit.matrix(jnp.asarray(draw.normal(size=(32, 4, 64))), kind, (1, 2))
  x = jnp.asarray(draw.normal(size=(1, 5, 4, 64)), jnp.float32)
  apart = w.einsum('btnh,dnh->btd', x)
  merged = w.reshape(32, -1).einsum('btf,df->btd', x.reshape(1, 5, -1))
  np.testing.assert_allclose(apart, merged, rtol=1e-4, atol=1e-3)


def test_unknown_kinds_are_refused():
  with pytest.raises(ValueError, match="weights='w2' must be one of"):
    low_bit.quantise(transformer.abstract(CONFIG), 'w2')
