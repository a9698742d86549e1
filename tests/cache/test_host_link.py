"""Calls of the host by a program: on this CPU, and copies of a GPU's memory."""

import ctypes
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.cache import Host, host_calls, host_link
from lcx.cache.host_row import Search
from tests.cache.reading import DIM, HEADS, empty, feed

SHAPE = jax.ShapeDtypeStruct((2, 3), jnp.int32)


@pytest.mark.parametrize('kind', host_link.KINDS)
def test_calls_follow_their_data_in_loops(kind):
  seen = []

  def work(x):
    seen.append(int(x[0, 0]))
    return np.asarray(x)[:, :3] + 1

  def step(x, _):
    y = host_link.call(kind, work, SHAPE, x)
    return jnp.pad(y, ((0, 0), (0, 2))), y.sum()

  @jax.jit
  def program(x):
    x, sums = jax.lax.scan(step, x, None, length=4)
    x = jax.lax.while_loop(lambda x: x[0, 0] < 7, lambda x: step(x, 0)[0], x)
    return x, sums

  x, sums = program(jnp.zeros((2, 5), jnp.int32))
  assert x[0, 0] == 7 and seen == list(range(7))
  np.testing.assert_array_equal(sums, [6, 12, 18, 24])


def attended(config):
  """What a cache's host says of a step's queries, of its own tokens."""
  rows = [list(range(45)), list(range(200, 264))]
  cache = feed(empty(config, 2), rows, 64)
  draw = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(draw.normal(size=(2, 1, HEADS, DIM)), jnp.float32)
    for _ in 'qkv'
  )
  at = cache.used[:, None]

  @jax.jit
  def step(cache):
    used = cache.used
    cache = cache.append_device(k, v, at, jnp.ones((2,), jnp.int32))
    search = Search(top=10**6, effort=50, first=8, recent=9, page=8)
    lse, ready = jnp.zeros((2, 1, HEADS)), jnp.zeros((2, HEADS), jnp.int32)
    return cache.attend_host(used, q, k, v, at, lse, search, ready)

  cache, found = step(cache)
  assert not np.asarray(cache.status).any()
  out = [np.asarray(x) for x in (cache.used, *found[:3])]
  cache.owned()()
  assert np.isfinite(out[1]).all() and np.isfinite(out[2]).all()
  return out


def test_both_links_bring_the_same():
  io = Host(page=8, sink=5, recent=9, slack=4)
  want = attended(io)
  got = attended(dataclasses.replace(io, link='buffer'))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)
  assert host_calls.held_bytes() == 0
  with pytest.raises(ValueError, match="cache.link='tube' must be one of"):
    Host(link='tube')


class Driver:
  """CUDA's driver, of memory that is the host's."""

  def __init__(self):
    self.names, self.code = [], 0

  def __getattr__(self, name):
    def do(*args):
      self.names.append(name)
      if 'Memcpy' in name:
        to, source, size, stream = args
        assert stream.value == 5
        ctypes.memmove(to.value, source.value, size.value)
      return self.code

    return do


def buffer(array):
  return types.SimpleNamespace(
    shape=array.shape,
    dtype=array.dtype,
    __dlpack_device__=lambda: (2, 0),
    __cuda_array_interface__={'data': (array.ctypes.data, False)},
  )


def test_a_gpus_memory_is_copied_in_the_streams_order(monkeypatch):
  driver = Driver()
  monkeypatch.setattr(host_link, '_cuda', lambda: host_link._Cuda(driver))
  context = types.SimpleNamespace(stream=5)
  x, out = np.arange(10, dtype=np.int32).reshape(2, 5), np.zeros((2, 3), 'i4')

  def work(x):
    driver.names.append('work')
    return (x[:, :3] + 1).T.copy().T  # in another order of memory

  host_link._put(work, context, buffer(out), buffer(x))
  np.testing.assert_array_equal(out, x[:, :3] + 1)
  assert driver.names == [
    'cuCtxGetCurrent', 'cuDevicePrimaryCtxRetain', 'cuCtxSetCurrent',
    'cuMemcpyDtoHAsync_v2', 'cuStreamSynchronize', 'work',
    'cuMemcpyHtoDAsync_v2',
  ]  # fmt: skip
  with pytest.raises(ValueError, match=r'\(2, 5\) for an array \(2, 3\)'):
    host_link._put(lambda x: x, context, buffer(out), buffer(x))
  driver.code = 700
  with pytest.raises(RuntimeError, match='cuCtxGetCurrent: CUDA error 700'):
    host_link._put(work, context, buffer(out), buffer(x))
