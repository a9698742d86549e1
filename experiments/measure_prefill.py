"""Time of one layer's prefill over sequence shards, and of its parts.

For each length and method: the whole layer as the engine runs it, and each part
as a program of its own, on the same mesh: projections, compressor,
communication (the layer's collectives alone), attention (what is left of the
method's `attend` without the other two), output and feed-forward. Then the
predicted time at other bandwidths: all but communication stays, communication
scales (arXiv:2502.12085, table 16, is the same split).

A row: op ('layer' or a part), method, length, ms, repeats_ms, bytes (of the
collectives, the mean of the devices, from the compiled program); of a layer
also its speed-up over the dense layer on one device, from which
experiments/fit_policy.py finds the length below which one device should run
alone.
"""

import dataclasses
import datetime
import functools
import pathlib
import statistics
import time
from typing import Any, Literal

import numpy as np

from experiments import environment, evaluate
from experiments.collectives import collective_bytes, permuted
from experiments.errors import Failure
from experiments.results import Results, Row, key_of, write_file, write_json
from lcx.methods.base import Method, Prompt

PARTS = (
  'projections',
  'compressor',
  'communication',
  'attention',
  'feed_forward',
)


@dataclasses.dataclass(frozen=True)
class Config:
  """What to measure.

  Attributes:
    preset: the model's shape; weights are random.
    methods: label -> numbers of a method, as in `evaluate`.
    lengths: tokens of the prompt, the question's 64 included.
    devices: of the mesh's seq axis.
    bandwidths: factors of the measured one that are predicted.
    parts: whether to time parts.
    repeats: samples.
    title: of the run.
    dtype: of weights and activations.
    output: a file that also gets the rows; '': none.
  """

  preset: str
  methods: dict[str, dict[str, Any]]
  lengths: tuple[int, ...]
  devices: int = 1
  bandwidths: tuple[float, ...] = (0.1, 1.0)
  parts: bool = True
  repeats: int = 10
  title: str = 'prefill'
  dtype: Literal['float32', 'bfloat16'] = 'bfloat16'
  output: str = ''

  def __post_init__(self):
    for name in ('methods', 'lengths'):
      if not getattr(self, name):
        raise ValueError(f'config.{name} is empty')
    if self.repeats < 1 or min(self.lengths) < 256:
      raise ValueError(
        f'config.repeats={self.repeats} must be positive, config.lengths='
        f'{self.lengths} at least 256'
      )


def run(config: Config, workdir: pathlib.Path) -> None:
  """Measures, writes rows, prints tables.

  Raises:
    ValueError: a method does not exist or fit, or devices are missing.
    Failure: nothing could be measured.
  """
  from lcx import sharding

  mesh = sharding.make_mesh(1, config.devices, 1)
  variants = {
    label: evaluate.variant(label, fields).method
    for label, fields in config.methods.items()
  }
  where = environment.describe()
  model, weights = _model(config)
  for method in variants.values():
    method.prefill.check(model, max(config.lengths))
    method.prefill.pieces(config.devices)
  rows: list[Row] = []
  with Results(workdir / 'results.jsonl') as results:
    write_json(workdir / 'config.json', dataclasses.asdict(config))
    write_json(workdir / 'env.json', where)
    for length in config.lengths:
      alone = _alone(config, model, weights, length)
      for label, method in variants.items():
        for row in _rows(config, model, weights, mesh, label, method, length):
          row |= _origin(where) | {'peer': 'one device', 'ratio': None}
          row['peer_ms'] = alone
          if alone and row['ms'] and row['op'] == 'layer':
            row['ratio'] = alone / row['ms']
          row['key'] = key_of({k: row[k] for k in _IDENTITY})
          results.append([row])
          rows.append(row)
          print(_line(row), flush=True)
  if config.output:
    import json

    with open(config.output, 'a') as out:
      out.writelines(json.dumps(row) + '\n' for row in rows)
  write_file(workdir / 'report.md', report(config, rows))
  print(report(config, rows))
  if all(row['ms'] is None for row in rows):
    raise Failure(f'all {len(rows)} measurements failed: {rows[0]["error"]}')


_IDENTITY = (
  'op', 'case', 'implementation', 'length', 'devices', 'method', 'parts',
  'device', 'versions', 'git', 'date',
)  # fmt: skip


def _model(config: Config):
  """The shape, and one layer of random weights."""
  import jax

  from lcx.models import presets, transformer

  if config.preset not in presets.PRESETS:
    raise ValueError(
      f'config.preset={config.preset!r}: there are '
      f'{", ".join(sorted(presets.PRESETS))}'
    )
  model = presets.PRESETS[config.preset].replace(
    dtype=config.dtype, n_layers=1, max_position=max(config.lengths)
  )
  return model, transformer.init(model, jax.random.key(0)).layers[0]


def _origin(where) -> Row:
  return {
    'device': where['device'],
    'versions': where['versions'],
    'git': where['git'],
    'command': environment.command(),
    'date': datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds'),
  }


def _rows(config, model, weights, mesh, label, method, length):
  base: Row = {
    'case': f'{config.preset} {length}',
    'implementation': label,
    'method': method.name,
    'parts': repr(method.prefill),
    'length': length,
    'devices': config.devices,
    'error': None,
    'ms': None,
    'repeats_ms': [],
    'bytes': None,
  }
  try:
    bench = Bench(config, model, weights, mesh, method, length)
    wanted = ('layer', *PARTS[:3], 'attend', PARTS[4])
    ops = wanted if config.parts else ('layer',)
    found = {op: bench.measure(op) for op in ops}
  # One that does not fit into memory must not stop the others.
  except (RuntimeError, NotImplementedError) as error:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    yield base | {'op': 'layer', 'error': reason[0][:300]}
    return
  attend = found.pop('attend', None)
  if attend:
    others = sum(found[op]['ms'] for op in ('compressor', 'communication'))
    found['attention'] = attend | {'ms': max(0.0, attend['ms'] - others)}
  for op, row in found.items():
    yield base | {'op': op} | row


def _alone(config, model, weights, length) -> float | None:
  """Ms of the dense layer on one device; None where that is all there is."""
  from lcx import methods, sharding

  if config.devices == 1:
    return None
  config = dataclasses.replace(config, devices=1, parts=False)
  mesh, dense = sharding.one_device(), methods.get_method('dense')
  (row,) = _rows(config, model, weights, mesh, '', dense, length)
  return row['ms']


class Bench:
  """Programs of one method at one length, on random activations."""

  def __init__(self, config, model, weights, mesh, method: Method, length):
    import jax
    import jax.numpy as jnp

    from lcx import sharding
    from lcx.cache import CacheShape, Shards
    from lcx.engine.plan import Plan

    self.config, self.mesh, self.model = config, mesh, model
    self.method = method
    self.plan = Plan(model, method, mesh, trace=False)
    shards, part = config.devices, method.prefill
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, model.vocab_size, length, dtype=np.int32)
    prompt = Prompt(tokens[:16], tokens[16:-64], (tokens[-64:],))
    whole = 128 * part.pieces(shards)
    self.room = -(-length // whole) * whole
    layout = part.layout(prompt, 0, self.room, shards)
    self.total = len(layout.tokens)
    spread = sharding.named(mesh, jax.sharding.PartitionSpec('data', 'seq'))
    everywhere = sharding.named(mesh, jax.sharding.PartitionSpec())

    def put(x):
      return jax.device_put(np.asarray(x)[None], spread)

    self.places = tuple(
      put(x) for x in (layout.positions, layout.source, layout.valid)
    )
    self.lengths = jax.device_put(
      np.array([layout.source.max() + 1], np.int32), everywhere
    )
    self.weights = jax.device_put(weights, everywhere)
    self.x = jax.jit(
      lambda: jax.random.normal(
        jax.random.key(1), (1, self.total, model.d_model), model.dtype
      ),
      out_shardings=spread,
    )()
    shape = CacheShape(
      1,
      model.n_kv_heads,
      model.head_dim,
      shards * -(-self.room // shards // 128) * 128,
      model.dtype,
      shards=Shards(1, shards, 1),
    )
    places = sharding.named(mesh, self.plan.cache_specs())

    def make():
      return jax.lax.with_sharding_constraint(method.cache.init(shape), places)

    self.cache = jax.jit(make)()
    self.state = method.decode.init_state(shape)
    self.zero = jax.device_put(jnp.int32(0), everywhere)
    learned = part.learned(model) or ((),)
    self.learned = jax.device_put(
      learned[0], sharding.named(mesh, self.plan.learned_specs())
    )

  def measure(self, op: str) -> Row:
    """{'ms', 'repeats_ms', 'compile_s', 'bytes'} of one program."""
    import jax

    made = getattr(self, f'_{op}')()
    if made is None:
      return {'ms': 0.0, 'repeats_ms': [], 'compile_s': 0.0, 'bytes': {}}
    function, args = made
    begin = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    compile_s = time.perf_counter() - begin
    times = []
    for _ in range(self.config.repeats + 1):
      begin = time.perf_counter()
      jax.block_until_ready(program(*args))
      times.append((time.perf_counter() - begin) * 1e3)
    return {
      'ms': statistics.median(times[1:]),
      'repeats_ms': times[1:],
      'compile_s': compile_s,
      'bytes': collective_bytes(program.as_text() or '', self.config.devices),
    }

  def _layer(self):
    from lcx.engine import steps

    function = functools.partial(
      steps.prefill_layer, plan=self.plan, room=self.room
    )
    return function, (
      self.weights,
      self.x,
      self.cache,
      self.state,
      *self.places,
      self.lengths,
      self.zero,
      self.zero,
      self.learned,
    )

  def _projections(self):
    from lcx.models import transformer

    return (
      lambda w, x: transformer.attention_inputs(w, x, self.model),
      (self.weights, self.x),
    )

  def _qkv(self):
    import jax

    function, args = self._projections()
    return jax.jit(function)(*args)

  def _inside(self, function):
    """`function(q, k, v, cache, context)` on every shard."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from lcx.engine.plan import AXES

    row, prompt = P(AXES.data), P(AXES.data, AXES.seq)
    heads = P(AXES.data, AXES.seq, AXES.model)

    def call(q, k, v, cache, positions, source, valid, lengths, learned):
      context = self.plan.context(
        room=self.room,
        positions=positions,
        source=source,
        valid=valid,
        lengths=lengths,
        layer=jnp.int32(0),
        key=jax.random.key(0),
        learned=learned,
      )
      return function(q, k, v, cache, context)

    specs = (heads, heads, heads, self.plan.cache_specs())
    specs += (prompt, prompt, prompt, row, self.plan.learned_specs())
    args = (*self._qkv(), self.cache, *self.places, self.lengths, self.learned)
    return self.plan.sharded(call, specs, prompt), args

  def _attend(self):
    from lcx.models import transformer

    rope = transformer.make_rope(self.model)

    def attend(q, k, v, cache, context):
      return self.method.prefill.attend(q, k, v, rope, cache, context)[0]

    return self._inside(attend)

  def _compressor(self):
    import jax.numpy as jnp

    from lcx.methods.apb import ApbPrefill
    from lcx.select.compressors import Block

    part = self.method.prefill
    if not isinstance(part, ApbPrefill) or not part.sizes(self.room)[3]:
      return None

    block, anchor, rows, passing = part.sizes(self.room)
    hosts = part.hosts // self.config.devices

    def compress(q, k, v, cache, context):
      del cache

      def local(x):
        return x.reshape(hosts, rows + block, *x.shape[2:])[:, rows:]

      q, k, v = map(local, (q, k, v))
      found = Block(
        q=q,
        k=k,
        v=v,
        unrotated_q=q,
        unrotated_k=k,
        question=q[:, : max(rows, 1)],
        asked=jnp.ones((hosts, max(rows, 1)), bool),
        positions=local(context.positions),
        valid=local(context.valid),
        layer=context.layer,
        learned=context.learned,
      )
      barred = jnp.where(jnp.arange(hosts) == 0, anchor, 0)
      count = jnp.full((hosts,), passing)
      chosen = part._select(found, barred, count, passing)
      chosen = jnp.concatenate(chosen, -1)  # as they would travel
      return chosen.reshape(1, -1, *chosen.shape[2:])

    return self._inside(compress)

  def _communication(self):
    """The layer's collectives alone, as many bytes of each kind."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    size = self.config.devices
    function, args = self._layer()
    text = jax.jit(function).lower(*args).compile().as_text() or ''
    moved = collective_bytes(text, size)
    if not moved:
      return None
    ring = [(i, (i + 1) % size) for i in range(size)]
    found = {permuted(line) for line in text.splitlines()}
    # Hops that leave devices out: those of one exchange, all at once.
    partial = sorted(h for h in found if 0 < len(h) < size)

    def one(kind, n, x):
      if kind == 'all-gather':
        whole = jax.lax.all_gather(x[: int(n / (size - 1))], 'seq', tiled=True)
        return whole.max()
      if kind == 'all-to-all':
        rows = int(n / (size - 1)) * size
        return jax.lax.all_to_all(x[:rows], 'seq', 0, 0, tiled=True).max()
      if partial:
        block = x[: int(n * size / sum(map(len, partial)))]
        hops = [jax.lax.ppermute(block, 'seq', h) for h in partial]
        return jnp.stack(hops).max()
      hop = x[: int(n / (size - 1))]
      for _ in range(size - 1):
        hop = jax.lax.ppermute(hop, 'seq', ring)
      return hop.max()

    longest = 2 * int(max(moved.values()))
    where = jax.sharding.NamedSharding(self.mesh, P('seq'))
    x = jax.jit(
      lambda: jnp.ones(longest * size, jnp.int8), out_shardings=where
    )()

    def inside(x):
      found = [one(kind, n, x) for kind, n in moved.items()]
      return jnp.stack(found).astype(jnp.float32)

    return self.plan.sharded(inside, (P('seq'),), P('seq')), (x,)

  def _feed_forward(self):
    from lcx.engine import steps

    q, _, _ = self._qkv()

    def output(w, x, out):
      return steps.chunked_output(w, x, out, self.plan)

    return output, (self.weights, self.x, q)


def _line(row: Row) -> str:
  head = f'{row["length"]:>8} {row["implementation"]:<24} {row["op"]:<14}'
  if row['ms'] is None:
    return f'{head} failed: {row["error"]}'
  moved = sum((row['bytes'] or {}).values())
  return f'{head} {row["ms"]:10.3f} ms {moved / 2**20:10.2f} MiB'


def report(config: Config, rows: list[Row]) -> str:
  """Markdown: parts of a layer, then the prediction at other bandwidths."""
  factors = [f for f in config.bandwidths if f != 1]
  head = ['length', 'method', 'layer ms', 'x one device', *PARTS]
  head += ['MiB', 'GB/s']
  head += [f'layer ms at {f:g} x bandwidth' for f in factors]
  lines = [
    f'# {config.title}',
    '',
    f'{config.preset}, one layer, {config.devices} devices, median of '
    f'{config.repeats}; parts are programs of their own, attention is what '
    'is left of the method without compressor and communication; MiB: '
    'received, the mean of the devices.',
    '',
    '| ' + ' | '.join(head) + ' |',
    '|' + '---|' * len(head),
  ]
  for length in config.lengths:
    for label in config.methods:
      mine = {
        r['op']: r
        for r in rows
        if r['length'] == length and r['implementation'] == label
      }
      if mine.get('layer', {}).get('ms') is None:
        continue
      layer, apart = mine['layer'], mine.get('communication')
      moved = sum((layer['bytes'] or {}).values())
      ratio = f'{layer["ratio"]:.2f}' if layer.get('ratio') else ''
      cells = [str(length), label, f'{layer["ms"]:.2f}', ratio]
      cells += [f'{mine[p]["ms"]:.2f}' if p in mine else '' for p in PARTS]
      cells += [f'{moved / 2**20:.1f}']
      spent = apart['ms'] if apart else 0.0
      cells += [f'{moved / spent / 1e6:.1f}' if spent else '']
      for factor in factors:
        cells.append(f'{layer["ms"] + spent * (1 / factor - 1):.2f}')
      lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'
