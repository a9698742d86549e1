"""Builds indexes over drawn keys and decodes from them: times of a shape.

Keys and queries (`Drawn`) are clusters that attention-like queries see from
afar; the recall beside each time says how hard they were to find.
"""

import functools
import gc
import statistics
import time

import numpy as np

from experiments import models
from experiments.measure_retrieval import (
  Config,
  best_of,
  found_by,
  kind_and_graphs,
)
from experiments.results import Row

_CHUNK = 4096  # tokens that an append brings


class Drawn:
  """Keys and queries of one layer, alike in distribution to attention's.

  Keys are 64 clusters of unequal spread; queries are mixtures of 32 others,
  shifted by `_OFFSET` standard deviations of a key: far from all keys, so that
  few of them are near many queries (RetrievalAttention, figure 3b).
  """

  _OFFSET = 1.5

  def __init__(self, model, dtype, seed: int):
    import jax

    self._model, self._dtype = model, dtype
    self._key = jax.random.key(seed)
    self._tokens = jax.jit(self._draw_tokens, static_argnums=1)
    self._queries = jax.jit(self._draw_queries, static_argnums=1)

  def _mixture(self, which: int, draw, shape, heads: int, n: int):
    import jax
    import jax.numpy as jnp

    dim = self._model.head_dim
    fixed = jax.random.fold_in(self._key, which)
    a, b = jax.random.split(fixed)
    centre = jax.random.normal(a, (heads, n, dim))
    width = 0.3 + 0.7 * jax.random.uniform(b, (heads, 1, dim))
    a, b = jax.random.split(jax.random.fold_in(fixed, draw + 1))
    own = jax.random.randint(a, (*shape, heads), 0, n)
    x = centre[jnp.arange(heads), own]
    return x + width[:, 0] * jax.random.normal(b, x.shape)

  def tokens(self, first: int, count: int):
    """Keys and values [1 count K H]."""
    return self._tokens(np.int32(first), count)

  def queries(self, draw: int, count: int):
    """[1 count N H]."""
    return self._queries(np.int32(draw), count)

  def _draw_tokens(self, first, count: int):
    import jax

    k = self._mixture(0, first, (1, count), self._model.n_kv_heads, 64)
    key = jax.random.fold_in(self._key, first + 7)
    v = jax.random.normal(key, k.shape)
    return k.astype(self._dtype), v.astype(self._dtype)

  def _draw_queries(self, draw, count: int):
    q = self._mixture(1, draw, (1, count), self._model.n_heads, 32)
    return (1.5 * (q + self._OFFSET)).astype(self._dtype)


def _shape(config: Config):
  source = models.find(config.model, config.seed)
  model = models.numbers(source, config.dtype)
  if not config.model.startswith('preset:'):
    raise ValueError(f'config.model={config.model!r}: drawn keys need a preset')
  return model


def _decode_part(config: Config, kind: str):
  from lcx.methods.retrieval import RetrievalDecode

  efforts = config.efforts.get(kind, (0,))
  name, graphs = kind_and_graphs(kind)
  return RetrievalDecode(
    top=config.top,
    index=name,
    graphs=graphs,
    effort=efforts[min(2, len(efforts) - 1)],
    mass=0.0,
    queries=config.queries,
    neighbours=config.neighbours,
    degree=config.degree,
  )


def _filled(config: Config, kind: str):
  """(decode part, caches, states, seconds on device and in the host)."""
  import jax
  import jax.numpy as jnp

  from lcx.cache import CacheShape, Host
  from lcx.methods.base import Axes, Context

  model, part = _shape(config), _decode_part(config, kind)
  part.check(model, config.length)
  host = Host()
  n = max(1, len(config.layers))
  model_n = model.replace(n_layers=n)
  host.check(model_n, config.length + config.repeats + 64, 1, part)
  drawn = Drawn(model, config.dtype, config.seed)
  shape = CacheShape(
    1, model.n_kv_heads, model.head_dim, config.length, dtype=config.dtype
  )

  @functools.partial(jax.jit, donate_argnums=0)
  def fill(cache, k, v, first):
    at = first + jnp.arange(k.shape[1], dtype=jnp.int32)[None]
    return cache.append(k, v, at)

  @jax.jit
  def observe(q, k, lengths):
    at = jnp.arange(config.length, dtype=jnp.int32)[None]
    ctx = Context(
      positions=at,
      valid=at >= 0,
      source=at,
      lengths=lengths,
      layer=jnp.int32(0),
      key=jax.random.key(0),
      room=config.length,
      axes=Axes(),
    )
    return part.observe(q, k, k, lambda x, _: x, (), ctx)

  start = jax.jit(lambda cache, state: part.start(cache, state))
  caches, states, device_s, begin, compiled = [], [], 0.0, 0.0, None
  for layer in range(n):
    cache, keys = host.init(shape), []
    for first in range(0, config.length, _CHUNK):
      count = min(_CHUNK, config.length - first)
      k, v = drawn.tokens(layer * config.length + first, count)
      keys.append(k)
      cache = fill(cache, k, v, jnp.int32(first))
    q = drawn.queries(layer, config.length)
    keys = jnp.concatenate(keys, axis=1)
    lengths = jnp.full((1,), config.length, jnp.int32)
    jax.block_until_ready((q, keys, cache.handles))
    compiled = compiled or observe.lower(q, keys, lengths).compile()
    begin = time.perf_counter()
    near = jax.block_until_ready(compiled(q, keys, lengths))
    device_s += time.perf_counter() - begin
    caches.append(cache)
    states.append(near)
  begin = time.perf_counter()
  ready = [start(c, s) for c, s in zip(caches, states, strict=True)]
  jax.block_until_ready(ready)
  for cache in caches:
    for row in cache.rows():
      row.wait()
  host_s = time.perf_counter() - begin
  return part, caches, ready, device_s, host_s


def build(config: Config):
  """Rows of the time until `layers` indexes answer."""
  for kind in config.kinds:
    if kind == 'device':
      continue
    _, caches, _, device_s, host_s = _filled(config, kind)
    bytes_ = [c.nbytes('host') for c in caches]
    for cache in caches:
      cache.owned()()
    yield {
      'kind': kind,
      'layers': len(caches),
      'ms': 1e3 * (device_s + host_s),
      'device_s': device_s,
      'host_s': host_s,
      'host_bytes': sum(sum(b.values()) for b in bytes_),
    }
    gc.collect()


def decode(config: Config):
  """Rows of the time of a token's attention over `layers` layers."""
  for kind in config.kinds:
    yield _decoded_dense(config) if kind == 'device' else _decoded(config, kind)
    gc.collect()


def _context(lengths):
  import jax
  import jax.numpy as jnp

  from lcx.methods.base import Axes, Context

  return Context(
    positions=lengths[:, None],
    valid=jnp.ones((1, 1), bool),
    source=lengths[:, None],
    lengths=lengths + 1,
    layer=jnp.int32(0),
    key=jax.random.key(0),
    trace=True,
    axes=Axes(),
  )


def _timed(config: Config, part, caches, states, drawn) -> Row:
  """Every layer attends one token, one after the other, in one program."""
  import jax
  import jax.numpy as jnp

  from lcx import sharding

  spec = jax.sharding.PartitionSpec()

  @functools.partial(jax.jit, donate_argnums=0)
  @functools.partial(
    jax.shard_map,
    mesh=sharding.make_mesh(),
    in_specs=spec,
    out_specs=spec,
    check_vma=False,
  )
  def step(caches, states, q, k, v, lengths):
    total, out, sums = [], jnp.zeros((), jnp.float32), {}
    for cache, state in zip(caches, states, strict=True):
      # A layer needs the one before it.
      mine = q + (0 * out).astype(q.dtype)
      found, cache, _, trace = part.attend(
        mine, k, v, lambda x, _: x, cache, state, _context(lengths)
      )
      out = jnp.sum(found.astype(jnp.float32))
      total.append(cache)
      for name, value in trace.counters.items():
        sums[name] = sums.get(name, 0.0) + value[0]
      status = jnp.max(cache.status) if hasattr(cache, 'status') else 0
      sums['status'] = jnp.maximum(sums.get('status', 0), status)
    return tuple(total), out, sums

  times, seen = [], []
  caches = tuple(caches)
  for i in range(config.repeats + 2):
    q = drawn.queries(1000 + i, 1)
    k, v = drawn.tokens(10**6 + i, 1)
    lengths = jnp.full((1,), config.length + i, jnp.int32)
    jax.block_until_ready((q, k, v))
    begin = time.perf_counter()
    caches, out, sums = step(caches, tuple(states), q, k, v, lengths)
    if not np.isfinite(float(out)):  # waits
      raise RuntimeError('the attention is not finite')
    times.append(1e3 * (time.perf_counter() - begin))
    seen.append({k: float(v) for k, v in sums.items()})
    if seen[-1]['status']:
      from lcx.cache import host_calls

      raise RuntimeError(f'a row ended: {host_calls.last_error}')
  for cache in caches:
    if hasattr(cache, 'owned'):
      cache.owned()()
  middle = {k: statistics.median(s[k] for s in seen[2:]) for k in seen[-1]}
  return {
    'layers': len(caches),
    'ms': statistics.median(times[2:]),
    'repeats_ms': times[2:],
    'host_ms': middle.get('host_us', 0.0) / 1e3,
    'python_ms': middle.get('python_us', 0.0) / 1e3,
    'search_ms_all_threads': middle.get('search_us', 0.0) / 1e3,
    'counters': middle,
  }


def _decoded(config: Config, kind: str) -> Row:
  part, caches, ready, _, _ = _filled(config, kind)
  drawn = Drawn(_shape(config), config.dtype, config.seed)
  row = caches[0].rows()[0]
  first, stop = row.indexed
  group = drawn._model.n_heads // row.k.shape[0]
  q = np.asarray(drawn.queries(10**6, 16).astype('float32'))[0]
  hits = []
  for head, index in enumerate(row.indexes):
    ask = q[:, head * group : (head + 1) * group].reshape(-1, q.shape[2])
    want = best_of(ask, row.k[head, first:stop].astype(np.float32), config.top)
    _, got = found_by(index, ask, config.top, part.search(64).effort)
    hits.append((want[:, :, None] + first == got[:, None, :]).any(2).mean())
  device = sum(sum(c.nbytes().values()) for c in caches)
  host = sum(sum(c.nbytes('host').values()) for c in caches)
  timed = _timed(config, part, caches, ready, drawn)
  return (
    {'kind': kind, 'effort': part.search(64).effort}
    | timed
    | {
      'recall': float(np.mean(hits)) if hits else 1.0,
      'kv_bytes': device,
      'host_bytes': host,
    }
  )


def _decoded_dense(config: Config) -> Row:
  import jax
  import jax.numpy as jnp

  from lcx.cache import CacheShape, Dense
  from lcx.methods.dense import DenseDecode

  model, n = _shape(config), max(1, len(config.layers))
  drawn = Drawn(model, config.dtype, config.seed)
  room = -(-(config.length + config.repeats + 2) // 64) * 64
  shape = CacheShape(
    1, model.n_kv_heads, model.head_dim, room, dtype=config.dtype
  )
  fill = jax.jit(lambda c, k, v, p: c.append(k, v, p), donate_argnums=0)
  caches = []
  for layer in range(n):
    cache = Dense().init(shape)
    for first in range(0, config.length, _CHUNK):
      count = min(_CHUNK, config.length - first)
      k, v = drawn.tokens(layer * config.length + first, count)
      at = first + jnp.arange(count, dtype=jnp.int32)[None]
      cache = fill(cache, k, v, at)
    caches.append(cache)
  device = sum(sum(c.nbytes().values()) for c in caches)
  timed = _timed(config, DenseDecode(), caches, [()] * n, drawn)
  return {'kind': 'device', 'effort': 0} | timed | {
    'recall': 1.0,
    'kv_bytes': device,
    'host_bytes': 0,
  }  # fmt: skip
