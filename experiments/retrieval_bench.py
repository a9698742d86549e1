"""Builds indexes over drawn keys and decodes from them: times of a shape.

Keys and queries (`Drawn`) are clusters that attention-like queries see from
afar. How hard they are to find is printed beside each time: recall by share of
keys scanned, over efforts, for queries that no index was made from. The same
curve of a real model's heads is what the op `recall` prints; times of drawn
keys are times of a model where the two curves agree.

Caches are filled once, and each kind is built over them once: its build and its
decode are of one index. What a graph needs of the prompt's queries, the nearest
keys, is computed where a graph is among the kinds, and in its build's time
alone.
"""

import collections
import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from experiments import models
from experiments.measure_retrieval import (
  Config,
  best_of,
  coded,
  kind_and_options,
  searched,
)
from experiments.results import Row

_CHUNK = 4096  # tokens that are drawn together, and that an append brings
_ASKING = 16  # tokens whose queries tell an effort's recall
# A search for `top` keys takes an effort of as many.
_AT_LEAST_TOP = ('graph', 'hnsw', 'fastscan')
_MOST = 0.5  # share of keys scanned beyond which no effort is tried


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
    # Of one size each, cut to what is asked for: they compile for seconds.
    self._tokens = jax.jit(self._draw_tokens)
    self._queries = jax.jit(self._draw_queries)

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
    """Keys and values [1 count K H], of at most 4096 tokens."""
    k, v = self._tokens(np.int32(first))
    return k[:, :count], v[:, :count]

  def queries(self, draw: int, count: int):
    """[1 count N H], alike."""
    return self._queries(np.int32(draw))[:, :count]

  def layer(self, number: int, length: int):
    """Queries, keys and values of a whole prompt."""
    import jax.numpy as jnp

    parts = []
    for first in range(0, length, _CHUNK):
      at, count = number * length + first, min(_CHUNK, length - first)
      parts.append((self.queries(at, count), *self.tokens(at, count)))
    return tuple(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))

  def _draw_tokens(self, first):
    import jax

    k = self._mixture(0, first, (1, _CHUNK), self._model.n_kv_heads, 64)
    key = jax.random.fold_in(self._key, first + 7)
    v = jax.random.normal(key, k.shape)
    return k.astype(self._dtype), v.astype(self._dtype)

  def _draw_queries(self, draw):
    q = self._mixture(1, draw, (1, _CHUNK), self._model.n_heads, 32)
    return (1.5 * (q + self._OFFSET)).astype(self._dtype)


def _shape(config: Config):
  source = models.find(config.model, config.seed)
  model = models.numbers(source, config.dtype)
  if not config.model.startswith('preset:'):
    raise ValueError(f'config.model={config.model!r}: drawn keys need a preset')
  return model


def speed(config: Config) -> Iterator[tuple[str, Row]]:
  """(op, row) of each kind: its build, then its decode; `device` comes last.

  Rows carry the bytes of the caches and, where the device counts them, those in
  use and their peak since the process began: with `device` last, a peak before
  it is that of filling, building and decoding with indexes alone.
  """
  kinds = [k for k in config.kinds if k != 'device']
  if kinds:
    filled = _Filled(config, kinds)
    try:
      for kind in kinds:
        for op, row in _measured(config, kind, filled):
          if op in config.ops:
            yield op, row
        gc.collect()
    finally:
      filled.release()
    del filled
    gc.collect()
  if 'device' in config.kinds and 'decode' in config.ops:
    yield 'decode', _decoded_dense(config)


def _decode_part(config: Config, kind: str):
  """With the third of the kind's efforts: what no `recall` is asked for."""
  from lcx.methods.retrieval import RetrievalDecode

  efforts = _efforts(config, kind)
  name, options = kind_and_options(kind)
  return RetrievalDecode(
    top=config.top,
    index=name,
    jobs=config.jobs,
    effort=efforts[min(2, len(efforts) - 1)],
    mass=0.0,
    queries=config.queries,
    neighbours=config.neighbours,
    degree=config.degree,
    **options,
  )


def _efforts(config: Config, kind: str) -> tuple[int, ...]:
  """Those of the kind, in order; 0 alone: its default, if it has any at all."""
  name, _ = kind_and_options(kind)
  efforts = config.efforts.get(kind, config.efforts.get(name, (0,)))
  if name in _AT_LEAST_TOP:
    efforts = (max(e, config.top) if e else 0 for e in efforts)
  return tuple(sorted(set(efforts)))


class _Filled:
  """The caches of all layers, and what the prompts' queries say.

  Attributes:
    caches: one a layer; whoever decodes leaves others, `rewound`.
    rows: their host parts.
    states: of a graph (True) and of other kinds (False): a `Near` a layer.
    device_s: seconds that those took on the device.
    asked: float32 [K M H] queries of the first layer, in none of the states.
    wanted: numbers of the keys that they want, [K M top].
  """

  def __init__(self, config: Config, kinds: Sequence[str]):
    import jax
    import jax.numpy as jnp

    from lcx.cache import CacheShape, Host

    model, n = _shape(config), max(1, len(config.layers))
    host = Host(slack=max(256, config.repeats + 2))
    parts = {}
    for kind in kinds:
      part = _decode_part(config, kind)
      part.check(model, config.length)
      room = config.length + config.repeats + 64
      host.check(model.replace(n_layers=n), room, 1, part)
      parts.setdefault(part.index == 'graph', part)
    self.drawn = Drawn(model, config.dtype, config.seed)
    self.length = config.length
    shape = CacheShape(
      1, model.n_kv_heads, model.head_dim, config.length, dtype=config.dtype
    )
    at = jnp.arange(config.length, dtype=jnp.int32)[None]
    fill = jax.jit(lambda c, k, v, p: c.append(k, v, p), donate_argnums=0)
    self.caches: tuple[Any, ...] = ()
    self.states = collections.defaultdict(list)
    self.device_s = collections.Counter()
    observe: dict[bool, Any] = {}
    for layer in range(n):
      q, k, v = self.drawn.layer(layer, config.length)
      self.caches += (fill(host.init(shape), k, v, at),)
      jax.block_until_ready((q, k, self.caches[-1].handles))
      for graph, part in parts.items():
        if graph not in observe:
          observe[graph] = _observe(part, config.length).lower(q, k).compile()
        begin = time.perf_counter()
        near = jax.block_until_ready(observe[graph](q, k))
        self.device_s[graph] += time.perf_counter() - begin
        # Off the device, where a decode does not have them.
        self.states[graph].append(jax.device_get(near))
    self.rows = [cache.rows()[0] for cache in self.caches]
    self._owned = [cache.owned() for cache in self.caches]
    self._rewind = jax.jit(
      lambda c: c.truncate(jnp.full((1,), config.length, jnp.int32)),
      donate_argnums=0,
    )
    asked = np.asarray(self.drawn.queries(10**6, _ASKING).astype('float32'))[0]
    asked = asked.reshape(_ASKING, model.n_kv_heads, -1, model.head_dim)
    asked = asked.swapaxes(0, 1)
    self.asked = asked.reshape(model.n_kv_heads, -1, model.head_dim)
    self.wanted = np.zeros((0,))

  def rewound(self, caches) -> None:
    """The caches after a decode, without what it brought."""
    self.caches = tuple(self._rewind(cache) for cache in caches)

  def want(self, top: int) -> np.ndarray:
    """The keys of the first layer's indexes that `asked` want."""
    if not self.wanted.size:
      (first, stop), keys = self.rows[0].indexed, self.rows[0].k
      self.wanted = np.stack(
        [
          best_of(q, k[first:stop].astype(np.float32), top) + first
          for q, k in zip(self.asked, keys, strict=True)
        ]
      )
    return self.wanted

  def release(self) -> None:
    for owned in self._owned:
      owned()


def _observe(part, length: int):
  """A program of (q, k): what decode's part takes from a prompt of a layer."""
  import jax
  import jax.numpy as jnp

  from lcx.methods.base import Axes, Context

  @jax.jit
  def observe(q, k):
    at = jnp.arange(length, dtype=jnp.int32)[None]
    ctx = Context(
      positions=at,
      valid=at >= 0,
      source=at,
      lengths=jnp.full((1,), length, jnp.int32),
      layer=jnp.int32(0),
      key=jax.random.key(0),
      room=length,
      axes=Axes(),
    )
    return part.observe(q, k, k, lambda x, _: x, (), ctx)

  return observe


def _memory(caches) -> Row:
  """Bytes of both tiers; of the device, where it says so."""
  import jax

  stats = jax.local_devices()[0].memory_stats() or {}
  names = {
    'peak_bytes': 'peak_bytes_in_use',
    'bytes_in_use': 'bytes_in_use',
    'limit_bytes': 'bytes_limit',
  }
  tiers = {'kv_bytes': 'device', 'host_bytes': 'host'}
  return {
    name: sum(sum(c.nbytes(tier).values()) for c in caches)
    for name, tier in tiers.items()
  } | {name: stats[of] for name, of in names.items() if of in stats}


def _measured(config: Config, kind: str, filled: _Filled):
  """(op, row) of a kind's build and decode."""
  import jax

  part = _decode_part(config, kind)
  states = filled.states[part.index == 'graph']
  device_s = filled.device_s[part.index == 'graph']
  start = jax.jit(lambda cache, state: part.start(cache, state))
  start = start.lower(filled.caches[0], states[0]).compile()
  states = jax.block_until_ready(jax.device_put(states))
  begin = time.perf_counter()
  ready = [start(c, s) for c, s in zip(filled.caches, states, strict=True)]
  jax.block_until_ready(ready)
  del states
  for row in filled.rows:
    row.wait()
  host_s = time.perf_counter() - begin
  yield (
    'build',
    {
      'kind': kind,
      'layers': len(filled.caches),
      'ms': 1e3 * (device_s + host_s),
      'device_s': device_s,
      'host_s': host_s,
    }
    | _memory(filled.caches),
  )
  if 'decode' not in config.ops:
    return
  found = _effort(config, kind, filled, part)
  size = _memory(filled.caches)
  for jobs in (config.jobs, *config.more_jobs):
    part = dataclasses.replace(part, effort=found['effort'], jobs=jobs)
    timed, caches = _timed(config, part, filled.caches, ready, filled.drawn)
    filled.rewound(caches)
    yield 'decode', {'kind': kind, 'jobs': jobs} | found | timed | size | {
      k: v for k, v in _memory(()).items() if k == 'peak_bytes'
    }  # fmt: skip


def _effort(config: Config, kind: str, filled: _Filled, part) -> Row:
  """The effort of a kind, and how recall and scan go with efforts."""
  row, name = filled.rows[0], part.index
  first, stop = row.indexed
  if not row.indexes:  # a prompt so short that all of it is attended
    return {'effort': 0, 'recall': 1.0, 'scanned': 1.0, 'curve': []}
  want, curve = filled.want(config.top), {}

  def measure(effort: int) -> tuple[float, float]:
    if effort not in curve:
      hits, shares = [], []
      for index, ask, best in zip(row.indexes, filled.asked, want, strict=True):
        _, got, share = searched(
          index, name, ask, config.top, effort, stop - first
        )
        hits.append((best[:, :, None] == got[:, None, :]).any(2).mean())
        shares.append(share)
      curve[effort] = float(np.mean(hits)), float(np.mean(shares))
    return curve[effort]

  effort, reached = part.search(64).effort, None
  efforts = tuple(e or effort for e in _efforts(config, kind))
  for each in efforts:
    measure(each)
  if config.recall:
    least = config.top if name in _AT_LEAST_TOP else 1
    effort, reached = smallest_effort(measure, config.recall, efforts, least)
  recall, scanned = measure(effort)
  return {
    'effort': effort,
    'recall': recall,
    'scanned': scanned,
    'target': config.recall,
    'reached': reached,
    'parts': max(1, len(row.indexes[0].parts)),
    **coded(part.numbers),
    'curve': [[e, *curve[e]] for e in sorted(curve)],
  }


def smallest_effort(
  measure: Callable[[int], tuple[float, float]],
  target: float,
  efforts: Sequence[int],
  least: int = 1,
) -> tuple[int, bool]:
  """(the smallest effort with a recall of `target`, to a sixteenth; True).

  (the largest that was tried, False), where half of the keys do not do.

  Args:
    measure: (recall, share scanned) of an effort; both grow with it.
    target: a recall.
    efforts: that are tried first; 0 alone: the kind has none.
    least: the smallest that there is.
  """
  low, high, effort = least - 1, None, 0
  for effort in sorted(efforts):
    if measure(effort)[0] >= target:
      high = effort
      break
    low = effort
  while high is None and effort and measure(effort)[1] < _MOST:
    effort *= 2
    if measure(effort)[0] >= target:
      high = effort
    else:
      low = effort
  if high is None:
    return low, False
  while high - low > max(1, high // 16):
    middle = (low + high) // 2
    if measure(middle)[0] >= target:
      high = middle
    else:
      low = middle
  return high, True


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


def _timed(config: Config, part, caches, states, drawn):
  """(row, caches): every layer attends one token, in one program."""
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
  # As the step returns them; else its second call compiles again.
  place = jax.sharding.NamedSharding(sharding.make_mesh(), spec)
  caches, states = jax.device_put((tuple(caches), tuple(states)), place)
  n = config.repeats + 2
  q_of, (k_of, v_of) = drawn.queries(2 * 10**6, n), drawn.tokens(10**6, n)
  for i in range(n):
    q, k, v = (x[:, i : i + 1] for x in (q_of, k_of, v_of))
    lengths = jnp.full((1,), config.length + i, jnp.int32)
    jax.block_until_ready((q, k, v))
    begin = time.perf_counter()
    caches, out, sums = step(caches, states, q, k, v, lengths)
    if not np.isfinite(float(out)):  # waits
      raise RuntimeError('the attention is not finite')
    times.append(1e3 * (time.perf_counter() - begin))
    seen.append({k: float(v) for k, v in sums.items()})
    if seen[-1]['status']:
      from lcx.cache import host_calls

      raise RuntimeError(f'a row ended: {host_calls.last_error}')
  middle = {k: statistics.median(s[k] for s in seen[2:]) for k in seen[-1]}
  longest = max(range(2, n), key=times.__getitem__)
  row: Row = {
    'layers': len(caches),
    'ms': statistics.median(times[2:]),
    'longest_ms': times[longest],
    # What it was at: tokens joined, or a query had all keys scanned.
    'longest': {'token': longest - 2} | seen[longest],
    'repeats_ms': times[2:],
    'host_ms': middle.get('host_us', 0.0) / 1e3,
    'python_ms': middle.get('python_us', 0.0) / 1e3,
    'search_ms': middle.get('search_us', 0.0) / 1e3,
    'counters': middle,
  }
  return row, caches


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
  timed, caches = _timed(config, DenseDecode(), caches, [()] * n, drawn)
  return {'kind': 'device', 'effort': 0, 'recall': 1.0, 'scanned': 1.0} | (
    timed | _memory(caches)
  )
