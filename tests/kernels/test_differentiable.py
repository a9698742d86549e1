"""Gradients of the differentiable path against those of the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import block_sparse, differentiable, selected_token
from kernels_pallas.passing_block import passing_block

CASES = {
  'dense': {},
  'window': {'window': 33},
  'streaming': {'sink': 7, 'window': 21},
  'sink_over_window': {'sink': 60, 'window': 21},
}


def _inputs(t, s, n=4, kv=2, h=16, batch=2):
  rng = np.random.default_rng(0)
  queries, keys = (batch, t, n, h), (batch, kv, s, h)
  return tuple(
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in (queries, keys, keys, queries)
  )


def _reference(q, k, v, sink=0, window=None, lengths=None):
  blocks = block_sparse.streaming_blocks(
    *(q.shape[0], q.shape[2], q.shape[1]),
    sink,
    block_sparse.EVERYTHING if window is None else window,
  )
  return block_sparse.block_sparse(
    q, k, v, blocks, lengths=lengths, implementation='reference'
  ).out


@pytest.mark.parametrize(
  ('name', 'ragged'),
  [
    ('dense', False),
    ('window', True),
    ('streaming', False),
    ('sink_over_window', True),
  ],
)
def test_gradients_equal_the_reference(name, ragged, monkeypatch):
  monkeypatch.setattr(differentiable, '_TILE', 32)
  monkeypatch.setattr(differentiable, '_CHUNK', 48)
  q, k, v, weight = _inputs(70, 70 if not ragged else 100)
  lengths = jnp.asarray([100, 61], jnp.int32) if ragged else None

  def loss(attend):
    def f(q, k, v):
      return jnp.sum(attend(q, k, v, lengths=lengths, **CASES[name]) * weight)

    return jax.value_and_grad(f, argnums=(0, 1, 2))

  value, grads = jax.jit(loss(differentiable.attention))(q, k, v)
  want, want_grads = jax.jit(loss(_reference))(q, k, v)
  np.testing.assert_allclose(value, want, rtol=2e-5, atol=2e-4)
  for got, wanted in zip(grads, want_grads):
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5)


def test_lse_carries_gradients_too():
  q, k, v, _ = _inputs(20, 50)
  start = jnp.broadcast_to(jnp.arange(20, dtype=jnp.int32), (2, 20))
  stop = start + 15

  def loss(attend):
    f = jax.grad(lambda q, k: jnp.sum(jnp.sin(attend(q, k).lse)), (0, 1))
    return jax.jit(f)

  got = loss(lambda q, k: differentiable.intervals(q, k, v, start, stop, 0.3))
  want = loss(
    lambda q, k: passing_block(
      q, k, v, start, stop, scale=0.3, implementation='reference'
    )
  )
  for a, b in zip(got(q, k), want(q, k)):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_memory_is_not_quadratic():
  t = 4096
  shape = jax.ShapeDtypeStruct((1, t, 1, 16), jnp.float32)
  keys = jax.ShapeDtypeStruct((1, 1, t, 16), jnp.float32)
  f = jax.grad(
    lambda q, k, v: jnp.sum(differentiable.attention(q, k, v)), (0, 1, 2)
  )
  memory = jax.jit(f).lower(shape, keys, keys).compile().memory_analysis()
  assert memory.temp_size_in_bytes < t * t  # a float32 T x T takes 4 t**2


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'sink': 4}, 'sink=4 needs a window'),
    ({'window': 0}, 'window=0'),
    ({'implementation': 'nope'}, 'implementation='),
    ({'implementation': 'cudnn'}, 'dtype'),
    ({'implementation': 'splash'}, 'T=20 must be a multiple'),
  ],
)
def test_bad_arguments_are_named(kwargs, message):
  q, k, v, _ = _inputs(20, 20)
  with pytest.raises(ValueError, match=message):
    differentiable.attention(q, k, v, **kwargs)


def test_kernels_name_the_differentiable_path():
  q, k, v, _ = _inputs(16, 16)
  at = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (2, 16))
  blocks = block_sparse.dense_blocks(2, 4, 16)
  pages, ids, starts = selected_token.contiguous(k, v, page=16)
  calls = (
    lambda q: block_sparse.block_sparse(q, k, v, blocks),
    lambda q: block_sparse.block_sparse_paged(
      q, pages, ids, blocks, lengths=at[:, -1] + 1
    ),
    lambda q: passing_block(q, k, v, 0 * at, at + 1),
    lambda q: selected_token.attend_pages(
      q, pages, ids, starts, q_positions=at
    ),
  )
  for call in calls:
    with pytest.raises(NotImplementedError, match='differentiable'):
      jax.eval_shape(jax.grad(lambda q, call=call: call(q).out.sum()), q)
