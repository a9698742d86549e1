"""Speed of methods on a whole model's shape: prefill, decode step, one layer.

Weights are random, and so are the keys in the cache, which is filled through
its own `append`. A decode step is timed inside the engine's device loop, so a
selection that serves C steps is averaged over them. Rows that are in
results.jsonl already are not measured again.

The ops of a length and method:
  prefill   reading a prompt of that many tokens, logits of the last
  step      one token through the whole model, over a cache of that many
  layer     decode attention of one layer: append, selection, attention, by
            queries that have nothing to do with each other
  layer_alike  the same by queries that are alike (cosine 0.99), for methods
            that select again when queries turn
  answer    a prompt and `steps` tokens after it, end to end
"""

import dataclasses
import datetime
import functools
import gc
import itertools
import pathlib
import statistics
import time
from typing import Any, Literal

import numpy as np

from experiments import environment, evaluate, measure_plots, peers
from experiments.errors import Failure
from experiments.results import Results, Row, key_of, write_json
from lcx.methods.base import Method, Prompt, Tail
from lcx.models.config import ModelConfig

_CHUNK = 4096  # tokens that an append brings


@dataclasses.dataclass(frozen=True)
class Config:
  """What to measure.

  Attributes:
    preset: the model's shape.
    methods: label -> numbers of a method, as in `evaluate`, or a method of
      `peers`; the first is the peer of all others.
    lengths: tokens in the cache, or of the prompt.
    ops: which of the above.
    title: of the run.
    weights: '' (as the preset has them), 'w8a8', 'w4a16' or 'fp8'.
    dtype: of weights and activations.
    steps: decoded in one sample.
    layer_steps: the same of one layer, so many that what a call costs once (1
      to 2 ms) is a small part.
    repeats: samples.
    warm: tokens of the first prompt of `prefill` and `answer`, which is not
      timed; 0: as many as of the others. (A shorter one makes what is made
      once; the others' program is compiled ahead of time, which is taken off.)
    layers: of the model that are kept; 0: all. (Times of fewer layers are no
      times of the model.)
  """

  preset: str
  methods: dict[str, dict[str, Any]]
  lengths: tuple[int, ...]
  ops: tuple[
    Literal['prefill', 'step', 'layer', 'layer_alike', 'answer'], ...
  ] = ('step', 'layer')
  title: str = 'measurement'
  weights: Literal['', 'w8a8', 'w4a16', 'fp8'] = ''
  dtype: Literal['float32', 'bfloat16'] = 'bfloat16'
  steps: int = 32
  layer_steps: int = 256
  repeats: int = 10
  warm: int = 0
  layers: int = 0

  def __post_init__(self):
    for name in ('methods', 'lengths', 'ops'):
      if not getattr(self, name):
        raise ValueError(f'config.{name} is empty')
    for name in ('steps', 'layer_steps', 'repeats'):
      if getattr(self, name) < 1:
        raise ValueError(f'config.{name}={getattr(self, name)}: at least 1')
    if not 0 <= self.warm <= min(self.lengths):
      raise ValueError(
        f'config.warm={self.warm} must be within 0 and the shortest of '
        f'config.lengths={self.lengths}'
      )


def run(config: Config, workdir: pathlib.Path) -> None:
  """Measures what is missing, writes rows and a plot, prints a table.

  Raises:
    ValueError: a method or its numbers do not exist, or do not fit.
    Failure: every measurement failed.
  """
  variants = {
    label: peers.METHODS.get(fields.get('method', ''))
    or evaluate.variant(label, fields).method
    for label, fields in config.methods.items()
  }
  bench = Bench(config)
  where = environment.describe()
  rows: list[Row] = []
  with Results(workdir / 'results.jsonl') as results:
    write_json(workdir / 'config.json', dataclasses.asdict(config))
    write_json(workdir / 'env.json', where)
    for op, length in itertools.product(config.ops, config.lengths):
      peer = None
      for label, method in variants.items():
        row = _row(bench, op, length, label, method, where, results)
        peer = peer or row
        row['peer'] = peer['implementation']
        row['peer_ms'], row['ratio'] = peer['ms'], None
        if row['ms'] and peer['ms']:
          row['ratio'] = peer['ms'] / row['ms']
        results.append([row])
        rows.append(row)
        print(_line(row), flush=True)
  (workdir / 'speed.png').write_bytes(measure_plots.draw(rows))
  if all(row['ms'] is None for row in rows):
    raise Failure(f'all {len(rows)} measurements failed: {rows[0]["error"]}')


def _row(bench, op, length, label, method, where, results) -> Row:
  config = bench.config
  identity = {
    'op': op,
    'case': f'{config.preset} {config.weights} {length}'.replace('  ', ' '),
    'implementation': label,
    'length': length,
    'parts': repr(method),
    'steps': config.layer_steps if 'layer' in op else config.steps,
    'repeats': config.repeats,
    'warm': config.warm,
    'layers': config.layers,
    'device': where['device'],
    'versions': where['versions'],
    'git': where['git'],
  }
  key = key_of(identity)
  known = results.rows.get(key)
  if known and known['ms'] is not None and not where['dirty']:
    return dict(known)
  row: Row = {'key': key} | identity | {'error': None}
  row |= {'repeats_ms': [], 'ms': None, 'compile_s': None, 'kv_bytes': None}
  try:
    row |= getattr(bench, op)(method, length)
    row['ms'] = statistics.median(row['repeats_ms'])
  # One that is out of memory must not stop the others.
  except (RuntimeError, ValueError, NotImplementedError) as error:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    row['error'] = reason[0][:300]
  gc.collect()
  row['command'] = environment.command()
  row['date'] = datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds')
  return row


def _line(row: Row) -> str:
  head = f'{row["op"]:<8} {row["case"]:<30} {row["implementation"]:<20}'
  if row['ms'] is None:
    return f'{head} failed: {row["error"]}'
  text = f'{head} {row["ms"]:10.3f} ms'
  if row['kv_bytes']:
    text += f'  {row["kv_bytes"] / 2**30:6.2f} GiB'
  return text + (f'  {row["ratio"]:.2f}x' if row['ratio'] else '')


class Bench:
  """Measures; holds the weights."""

  def __init__(self, config: Config):
    import jax

    from lcx.models import presets, transformer

    if config.preset not in presets.PRESETS:
      raise ValueError(
        f'config.preset={config.preset!r}: there are '
        f'{", ".join(sorted(presets.PRESETS))}'
      )
    numbers = presets.PRESETS[config.preset].replace(
      dtype=config.dtype,
      max_position=max(config.lengths) + 4096,
    )
    if config.layers:
      numbers = numbers.replace(n_layers=config.layers)
    self.config = config
    self.model: ModelConfig = numbers
    self.weights = transformer.init(numbers, jax.random.key(0))
    if config.weights:
      from lcx.models import low_bit

      self.weights = low_bit.quantise(self.weights, config.weights)

  def _engine(self, method: Method, length: int, more: int, layers: int = 0):
    from lcx.engine import Engine

    model, weights = self.model, self.weights
    if layers:
      model = model.replace(n_layers=layers)
      weights = dataclasses.replace(weights, layers=weights.layers[:layers])
    return Engine(
      model,
      weights,
      method,
      capacity=-(-(length + more) // 256) * 256,
      room=more,
      trace=False,
    )

  def _session(self, engine, length: int):
    """A session over random keys, as after a prefill of `length` tokens.

    Of a method that judges the prompt by its own last queries: after one.
    """
    import jax
    import jax.numpy as jnp

    from lcx.engine import steps
    from lcx.engine.engine import Session

    caches, states = engine._empty()
    after = self._observed(engine, states)
    if jax.tree.structure(after) != jax.tree.structure(states[0]):
      return engine.prefill([self._prompt(length)])
    states = tuple(
      jax.tree.map(
        lambda x, to: (
          x if x.shape == to.shape else jnp.zeros(to.shape, x.dtype)
        ),
        state,
        after,
      )
      for state in states
    )
    dims = (1, _CHUNK, self.model.n_kv_heads, self.model.head_dim)

    @functools.partial(jax.jit, donate_argnums=0)
    def fill(cache, seed, first, count):
      k, v = (
        jax.random.normal(key, dims, self.model.dtype)
        for key in jax.random.split(jax.random.key(seed))
      )
      at = first + jnp.arange(_CHUNK, dtype=jnp.int32)[None]
      return cache.append(k, v, at, count)

    start = jax.jit(functools.partial(steps.start_layer, plan=engine.plan))
    caches, states = list(caches), list(states)
    for i in range(len(caches)):
      for first in range(0, length, _CHUNK):
        count = jnp.full((1,), min(_CHUNK, length - first), jnp.int32)
        caches[i] = fill(caches[i], i * length + first, first, count)
      states[i] = start(caches[i], states[i])
    # Made by JAX: they are donated, and numpy's memory may be shared.
    lengths = engine._rows(jnp.full((1,), length, jnp.int32))
    scores = engine._rows(jnp.zeros((1, self.model.vocab_size), jnp.float32))
    return Session(
      caches=tuple(caches),
      states=tuple(states),
      lengths=lengths,
      scores=scores,
      tail=Tail(*(engine._rows(np.array([n], np.int32)) for n in (0, length))),
      used=(),
      prompt_lengths=np.array([length]),
      sums={},
      prefill_sums={},
    )

  def _observed(self, engine, states):
    """Shapes of a layer's state as a prefill leaves it."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from lcx.models.transformer import make_rope

    plan, rope, model = engine.plan, make_rope(self.model), self.model
    specs = plan.state_specs()

    def observe(q, k, state):
      at = jnp.zeros((1, 128), jnp.int32)
      ctx = plan.context(
        positions=at,
        source=at,
        valid=at > 0,
        lengths=at[:, 0],
        layer=jnp.int32(0),
        key=jax.random.key(0),
        room=128,
      )
      return plan.method.decode.observe(q, k, k, rope, state, ctx)

    def tokens(heads):
      shape = (1, 128, heads, model.head_dim)
      return jax.ShapeDtypeStruct(shape, jnp.dtype(model.dtype))

    observe = plan.sharded(observe, (P(), P(), specs), specs)
    return jax.eval_shape(
      observe, tokens(model.n_heads), tokens(model.n_kv_heads), states[0]
    )

  def _prompt(self, length: int) -> Prompt:
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, self.model.vocab_size, length, dtype=np.int32)
    return Prompt(tokens[:0], tokens, ())

  def step(self, method: Method, length: int) -> dict[str, Any]:
    """One token through the whole model, in the engine's loop."""
    n, repeats = self.config.steps, self.config.repeats
    engine = self._engine(method, length, n * (repeats + 2))
    session = self._session(engine, length)
    kv = sum(sum(c.nbytes().values()) for c in session.caches)
    begin = time.perf_counter()
    engine.decode(session, n)
    compile_s = time.perf_counter() - begin
    engine.decode(session, n)
    times = []
    for _ in range(repeats):
      begin = time.perf_counter()
      _, status = engine.decode(session, n)  # waits for the tokens
      times.append((time.perf_counter() - begin) * 1e3 / n)
      if status != ['ok']:
        raise RuntimeError(f'the row ended: {status[0]}')
    return {'repeats_ms': times, 'compile_s': compile_s, 'kv_bytes': kv}

  def layer_alike(self, method: Method, length: int) -> dict[str, Any]:
    """`layer` by queries with a cosine of 0.99."""
    return self.layer(method, length, noise=0.1)

  def layer(
    self, method: Method, length: int, noise: float | None = None
  ) -> dict[str, Any]:
    """Decode attention of the middle layer: append, selection, attention.

    Args:
      method: what attends.
      length: tokens in the cache.
      noise: of queries, beside one that they share; None: they share none.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from lcx.models.transformer import make_rope

    n, repeats = self.config.layer_steps, self.config.repeats
    engine = self._engine(method, length, n * (repeats + 2), layers=1)
    session = self._session(engine, length)
    plan, rope, model = engine.plan, make_rope(self.model), self.model
    cache_specs, state_specs = plan.cache_specs(), plan.state_specs()

    def attend(q, k, v, cache, state, lengths):
      ctx = plan.context(
        positions=lengths[:, None],
        source=lengths[:, None],
        valid=jnp.ones((1, 1), bool),
        lengths=lengths + 1,
        layer=jnp.int32(0),
        key=jax.random.key(0),
      )
      return method.decode.attend(q, k, v, rope, cache, state, ctx)[:3]

    rest = (cache_specs, state_specs, P())
    attend = plan.sharded(
      attend, (P(), P(), P(), *rest), (P(), cache_specs, state_specs)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def loop(cache, state, lengths, seed):
      def draw(key, heads):
        shape = (n, 1, 1, heads, model.head_dim)
        return jax.random.normal(key, shape, model.dtype)

      keys = jax.random.split(jax.random.key(seed), 3)
      heads = (model.n_heads, model.n_kv_heads, model.n_kv_heads)
      q, k, v = map(draw, keys, heads)
      if noise is not None:
        q = q * noise + draw(jax.random.key(0), model.n_heads)[:1]
      tokens = q.astype(model.dtype), k, v

      def one(carry, qkv):
        cache, state, lengths = carry
        out, cache, state = attend(*qkv, cache, state, lengths)
        return (cache, state, lengths + 1), out

      carry, out = jax.lax.scan(one, (cache, state, lengths), tokens)
      return carry, out.astype(jnp.float32).sum()

    carry = (session.caches[0], session.states[0], session.lengths)
    kv = sum(carry[0].nbytes().values())
    del session
    times = []
    for i in range(repeats + 2):
      begin = time.perf_counter()
      carry, total = loop(*carry, i)
      if not np.isfinite(float(total)):  # waits
        raise RuntimeError('the attention is not finite')
      times.append(time.perf_counter() - begin)
    return {
      'repeats_ms': [t * 1e3 / n for t in times[2:]],
      'compile_s': times[0],
      'kv_bytes': kv,
    }

  def prefill(self, method: Method, length: int) -> dict[str, Any]:
    """A prompt of random tokens; at most three samples, since it is long."""
    found = self._read(method, length, 0)
    return found | {'repeats_ms': found.pop('prefill_repeats_ms')}

  def answer(self, method: Method, length: int) -> dict[str, Any]:
    """A prompt of random tokens and `steps` tokens after it."""
    return self._read(method, length, self.config.steps)

  def _read(self, method: Method, length: int, steps: int) -> dict[str, Any]:
    """Times of a prompt, and of it and `steps` tokens after it."""
    config = self.config
    engine = self._engine(method, length, max(256, steps))
    prompt = self._prompt(length)
    first = self._prompt(config.warm or length)

    def clock() -> float:
      return 1e3 * (time.perf_counter() - engine.compile_s)

    times, read, kv = [], [], None
    for one in (first, *[prompt] * min(config.repeats, 3)):
      begin = clock()
      session = engine.prefill([one])
      np.asarray(session.scores)  # waits
      read.append(clock() - begin)
      if steps:
        _, status = engine.decode(session, steps)  # waits
        if status != ['ok']:
          raise RuntimeError(f'the row ended: {status[0]}')
      times.append(clock() - begin)
      kv = sum(sum(c.nbytes().values()) for c in session.caches)
      del session  # before the next one's caches are made
    return {
      'repeats_ms': times[1:],
      'prefill_repeats_ms': read[1:],
      'compile_s': engine.compile_s,
      'kv_bytes': kv,
    }
