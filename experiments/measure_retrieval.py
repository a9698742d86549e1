"""Vector indexes over attention keys: recall by scan, time to build, to decode.

The ops:
  recall  keys and queries of a real model: a prompt is read, the queries of its
          last tokens ask for the largest products among the keys that an index
          holds, as in decode. A row is a kv head of a layer under one kind of
          index: recall and share of keys scanned, by effort.
  build   seconds until a layer's index answers, by kind: nearest keys on the
          device, then the host's part. One row of tokens, drawn keys.
  decode  milliseconds of a token's attention over `layers` layers, by kind,
          beside dense attention on the device where it fits; at the effort that
          gives a recall, the same for all kinds, or at a fixed one.

The last two, on drawn keys, are in retrieval_bench.py: one pass a kind.
"""

import dataclasses
import datetime
import pathlib
import statistics
import time
from typing import Any, Literal

import numpy as np

from experiments import environment, models
from experiments.errors import Failure
from experiments.results import Results, Row, key_of, write_json

_MORE_KINDS = ('graph/query_head', 'fastscan/2bit', 'fastscan/3bit', 'device')
_OPTIONS = {
  '': {},
  'query_head': {'graphs': 'query_head'},
  '2bit': {'bits': 2},
  '3bit': {'bits': 3},
}


def kind_and_options(kind: str) -> tuple[str, dict[str, Any]]:
  """What `lcx.select.vector_index.Numbers` calls a kind of a config."""
  kind, _, option = kind.partition('/')
  return kind, _OPTIONS[option]


@dataclasses.dataclass(frozen=True)
class Config:
  """What to measure.

  Attributes:
    model: of `recall`: a folder, a GGUF file or preset:NAME; of the others,
      preset:NAME, whose heads and layers count.
    length: tokens that the index may hold.
    kinds: of `lcx.select.vector_index`; 'device' is dense on the device;
      'graph/query_head' is 'graph' with one a query head, 'fastscan/2bit'
      and 'fastscan/3bit' are 'fastscan' with codes of so many bits an element.
    ops: which of recall, build and decode.
    title: of the run.
    text: a file that is read by `recall`; '': Python's own documentation.
    top: tokens retrieved per query head.
    efforts: of each kind that has one, for the curve of recall by scan; the
      third is that of `decode` where it has no `recall` to reach.
    recall: that `decode` reaches with the smallest effort; 0: efforts are
      fixed.
    layers: numbers of the layers in `recall` (empty: all); in the others, how
      many there are counts.
    asked: tokens after the indexed ones whose queries ask.
    queries: tokens whose queries are sampled for a graph.
    neighbours: nearest keys of each sampled query.
    degree: links of a key.
    repeats: samples of `decode`, a token each.
    jobs: of `decode`: threads that share a layer's queries; 0: the cores.
    more_jobs: others, with which a kind decodes from the same index again.
    dtype: of weights, keys and values.
    seed: of what is drawn.
    output: a file that also gets the rows; '': none.
  """

  model: str
  length: int
  kinds: tuple[str, ...]
  ops: tuple[Literal['recall', 'build', 'decode'], ...]
  title: str = 'retrieval'
  text: str = ''
  top: int = 100
  efforts: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  recall: float = 0.0
  layers: tuple[int, ...] = ()
  asked: int = 32
  queries: int = 8192
  neighbours: int = 32
  degree: int = 32
  repeats: int = 10
  jobs: int = 0
  more_jobs: tuple[int, ...] = ()
  dtype: Literal['float32', 'bfloat16'] = 'bfloat16'
  seed: int = 0
  output: str = ''

  def __post_init__(self):
    from lcx.select import vector_index

    for kind in self.kinds:
      if kind not in (*vector_index.KINDS, *_MORE_KINDS):
        raise ValueError(
          f'config.kinds: {kind!r} is not one of '
          f'{", ".join((*vector_index.KINDS, *_MORE_KINDS))}'
        )
    for name in ('length', 'top', 'asked', 'repeats'):
      if getattr(self, name) < 1:
        raise ValueError(f'config.{name}={getattr(self, name)}: at least 1')
    for jobs in (self.jobs, *self.more_jobs):
      if jobs < 0:
        raise ValueError(f'config.jobs={jobs}: at least 0')
    if self.repeats > 4000:
      raise ValueError(f'config.repeats={self.repeats}: at most 4000')
    if not 0 <= self.recall <= 1:
      raise ValueError(f'config.recall={self.recall} must be from 0 to 1')


def run(config: Config, workdir: pathlib.Path) -> None:
  """Measures, writes rows, prints a table.

  Raises:
    ValueError: a model, a kind or a number does not exist or does not fit.
    Failure: nothing could be measured.
  """
  where = environment.describe()
  lines: list[str] = []
  with Results(workdir / 'results.jsonl') as results:
    write_json(workdir / 'config.json', dataclasses.asdict(config))
    write_json(workdir / 'env.json', where)
    for op, found in _found(config):
      row = _row(config, op, found, where)
      results.append([row])
      if config.output:
        with open(config.output, 'a', encoding='utf-8') as out:
          out.write(_json(row) + '\n')
      lines.append(_line(row))
      print(lines[-1], flush=True)
    lines += _summary(results.rows.values())
  if not lines:
    raise Failure('nothing was measured: config.kinds is empty')
  print('\n'.join(_summary(results.rows.values())), flush=True)
  (workdir / 'report.md').write_text(
    f'# {config.title}\n\n```\n' + '\n'.join(lines) + '\n```\n'
  )


def _found(config: Config):
  """(op, row) of all ops."""
  from experiments import retrieval_bench

  if 'recall' in config.ops:
    for row in recall(config):
      yield 'recall', row
  if {'build', 'decode'} & set(config.ops):
    yield from retrieval_bench.speed(config)


def _json(row: Row) -> str:
  import json

  return json.dumps(row, ensure_ascii=False, allow_nan=False)


def _row(config, op: str, found: Row, where) -> Row:
  identity = {
    'op': op,
    'model': pathlib.Path(config.model).name,
    'length': config.length,
    'top': config.top,
    'queries': config.queries,
    'neighbours': config.neighbours,
    'degree': config.degree,
    'dtype': config.dtype,
    'seed': config.seed,
    **({'target': config.recall} if op == 'decode' else {}),
    **({'jobs': found['jobs']} if found.get('jobs') else {}),
    'device': where['device'],
    'git': where['git'],
  } | {k: found[k] for k in ('kind', 'layer', 'head') if k in found}
  return (
    {'key': key_of(identity)}
    | identity
    | found
    | {
      'cores': where['cores'],
      'versions': where['versions'] | _faiss_version(),
      'command': environment.command(),
      'date': datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds'),
    }
  )


def _faiss_version() -> dict[str, str]:
  import importlib.metadata

  try:
    return {'faiss-cpu': importlib.metadata.version('faiss-cpu')}
  except importlib.metadata.PackageNotFoundError:
    return {'faiss-cpu': 'absent'}


def _line(row: Row) -> str:
  head = f'{row["op"]:<7}{row["kind"]:<17}'
  if row['op'] == 'recall':
    points = zip(row['recall'], row['scanned'], strict=True)
    curve = _shown(points, row.get('codes', 0.0))
    return f'{head} layer {row["layer"]:>2} head {row["head"]} {curve}'
  if row['op'] == 'build':
    return (
      f'{head} {row["ms"] / 1e3:9.2f} s for {row["layers"]} layers: device '
      f'{row["device_s"]:.2f} s, host {row["host_s"]:.2f} s'
    )
  line = (
    f'{head}{_jobs(row)} {row["ms"]:9.3f} ms a token of {row["layers"]} '
    f'layers, in the host {row["host_ms"]:.3f} ms, of it '
    f'{row["search_ms"]:.3f} in indexes, {row["python_ms"]:.3f} in Python; '
    f'longest {row["longest_ms"]:.3f}'
  )
  if not row.get('curve'):
    return line
  here = _shown([(row['recall'], row['scanned'])], row.get('codes', 0.0))
  missed = ' (not reached)' if row['reached'] is False else ''
  return (
    f'{line}; effort {row["effort"]}: {here}{missed}\n'
    f'{head} recall@scanned: {_shown(c[1:] for c in row["curve"])}'
  )


def _jobs(row: Row) -> str:
  return f' {row["jobs"]} jobs:' if row.get('jobs') else ''


def _shown(curve, codes: float = 0.0) -> str:
  """Recalls, each at its share of keys scanned."""
  points = ' '.join(f'{r:.3f}@{100 * s:.1f}%' for r, s in curve)
  return points + (f' and all codes ({100 * codes:g}%)' if codes else '')


def _summary(rows) -> list[str]:
  """Mean share scanned at recall 0.95 by kind, over heads that reach it.

  Of decode rows: how much longer other kinds take than the first.
  """
  rows = list(rows)
  recalls = [r for r in rows if r['op'] == 'recall']
  lines = []
  for kind in dict.fromkeys(r['kind'] for r in recalls):
    rows_of = [r for r in recalls if r['kind'] == kind]
    mine = [r['scanned_at_95'] for r in rows_of]
    got = [s for s in mine if s is not None]
    mean = f'{100 * statistics.mean(got):.2f}%' if got else 'none'
    codes = rows_of[0].get('codes')
    beside = (
      f' beside all codes ({100 * codes:g}% of the bytes)' if codes else ''
    )
    lines.append(
      f'{kind:<17} recall 0.95 at {mean} scanned{beside}, {len(got)} of '
      f'{len(mine)} heads reach it'
    )
  one, *others = [r for r in rows if r['op'] == 'decode'] or [None]
  lines += [
    f'{other["kind"]:<17}{_jobs(other)} {other["ms"] / one["ms"]:.2f} times '
    f'the time of {one["kind"]}{_jobs(one)}, recall {other["recall"]:.3f} and '
    f'{one["recall"]:.3f}'
    for other in others
  ]
  return lines


def at_95(recalls: list[float], scanned: list[float]) -> float | None:
  """Share scanned at which recall passes 0.95, between measured efforts.

  Where the smallest effort passes it already, its share: an upper bound.
  """
  curve = list(zip(recalls, scanned, strict=True))
  for (r0, s0), (r1, s1) in zip([curve[0], *curve], curve, strict=False):
    if r1 >= 0.95:
      return s1 if r0 >= 0.95 else s0 + (0.95 - r0) / (r1 - r0) * (s1 - s0)
  return None


# Recall on a model's keys.


def recall(config: Config):
  """Rows of every head, kind by kind."""
  from lcx.select import vector_index

  kinds = [k for k in config.kinds if k != 'device']
  for kind in kinds:
    vector_index.require(kind_and_options(kind)[0])
  gathered = _gathered(config)
  for layer, (near, keys, asked) in gathered:
    for head in range(len(keys)):
      one = type(near)(*(x if x is None else x[head] for x in near))
      for kind in kinds:
        yield {'kind': kind, 'layer': layer, 'head': head} | _curve(
          config, kind, one, keys[head], asked[head]
        )


def _gathered(config: Config):
  """(layer, (Near, keys [K n H], queries [K M H])) of the chosen layers.

  Keys and queries are rotated; the keys are those that an index holds: `length`
  tokens without the sink and the recent ones that the device keeps.
  """
  import jax
  import jax.numpy as jnp

  from lcx.cache import Dense
  from lcx.engine import Engine
  from lcx.methods.base import Decode, Method, Prompt
  from lcx.methods.dense import DensePrefill
  from lcx.methods.retrieval import RetrievalDecode
  from lcx.tasks.haystacks import default_text

  names = [kind_and_options(kind)[0] for kind in config.kinds]
  decode = RetrievalDecode(
    top=config.top,
    index='graph' if 'graph' in names else 'exact',  # what is observed for it
    queries=config.queries,
    neighbours=config.neighbours,
    degree=config.degree,
  )
  search = decode.search(64)
  until = search.until(config.length)
  if until - search.first < 2 * config.top:
    raise ValueError(
      f'config.length={config.length} leaves {until - search.first} tokens to '
      f'an index beside sink and recent ones: less than 2 x top={config.top}'
    )

  class Collect(Decode):
    """Keeps what an index is made of, and what asks it."""

    def observe(self, q, k, v, rope, state, ctx):
      del state
      earlier = ctx.valid & (ctx.positions < config.length)
      near = decode.observe(
        q, k, v, rope, (), dataclasses.replace(ctx, valid=earlier)
      )
      b, _, n, h = q.shape
      kv = k.shape[2]
      last = rope(q, ctx.positions)[:, config.length :][:, : config.asked]
      last = last.reshape(b, -1, kv, n // kv, h).transpose(0, 2, 1, 3, 4)
      keys = rope(k, ctx.positions)[:, search.first : until].swapaxes(1, 2)
      return near, keys, last.reshape(b, kv, -1, h)

  source = models.find(config.model, config.seed)
  model = models.load(source, config.dtype)
  total = config.length + config.asked
  text = default_text()
  if config.text:
    text = pathlib.Path(config.text).read_text(encoding='utf-8')
  tokens = np.asarray(model.tokenizer.encode(text), np.int32)
  if len(tokens) < total:
    raise ValueError(
      f'the text has {len(tokens)} tokens, {total} are asked for: '
      'give a longer one as config.text'
    )
  method = Method('collect', DensePrefill(), Dense(), Collect())
  engine = Engine(
    model.config, model.weights, method, capacity=total, trace=False
  )
  nothing = np.zeros((0,), np.int32)
  session = engine.prefill([Prompt(nothing, tokens[:total], ())])
  n_layers = model.config.n_layers
  for layer in config.layers or range(n_layers):
    if layer >= n_layers:
      break
    state = jax.tree.map(
      lambda x: np.asarray(x[0].astype(jnp.float32) if x.dtype == jnp.bfloat16
                           else x[0]),
      session.states[layer],
    )  # fmt: skip
    yield layer, state


def _curve(config: Config, kind: str, near, keys, asked) -> Row:
  """Recall and scan of one head under one kind of index."""
  from lcx.cache.host_row import Row as HostRow
  from lcx.select import vector_index

  n = len(keys)
  name, options = kind_and_options(kind)
  numbers = vector_index.Numbers(kind=name, degree=config.degree, **options)
  holder = HostRow(1, keys.shape[1], np.float32)
  first = 128  # RetrievalDecode's sink
  holder.at = np.arange(first + n, dtype=np.int32)
  numbered = holder._numbered(near, first, first + n)
  begin = time.perf_counter()
  index = vector_index.build(numbers, keys.astype(np.float32), 0, numbered)
  build_s = time.perf_counter() - begin
  want = best_of(asked, keys, config.top)
  recalls, scans = [], []
  for effort in config.efforts.get(kind, (0,)):
    _, found, scan = searched(index, name, asked, config.top, effort, n)
    hit = (want[:, :, None] == found[:, None, :]).any(2)
    recalls.append(float(hit.mean()))
    scans.append(scan)
  score = asked @ keys.T * keys.shape[1] ** -0.5
  score = np.exp(score - score.max(1, keepdims=True))
  best = np.take_along_axis(score, want, 1).sum(1) / score.sum(1)
  return {
    'keys': n,
    'efforts': list(config.efforts.get(kind, (0,))),
    'recall': recalls,
    'scanned': scans,
    'scanned_at_95': at_95(recalls, scans),
    'mass_of_top': float(best.mean()),
    'hubs': _hubs(numbered.near),
    'build_s': build_s,
    'index_bytes': index.nbytes,
  } | coded(numbers)


def _hubs(near) -> float | None:
  from lcx.select import vector_index_graph

  return None if near is None else vector_index_graph.hubs(near)


def best_of(q, keys, top: int) -> np.ndarray:
  """Numbers of the largest products, best first."""
  score = q @ keys.T
  best = np.argpartition(-score, top - 1, axis=1)[:, :top]
  order = np.argsort(-np.take_along_axis(score, best, 1), axis=1)
  return np.take_along_axis(best, order, 1)


def found_by(index, q, top: int, effort: int):
  """(scores, tokens) of queries, query heads side by side as `observe` has it.

  Each is asked of its own head's graph, where there are several.
  """
  parts = [
    index.search(q[graph :: index.graphs], top, effort, graph)
    for graph in range(index.graphs)
  ]
  return tuple(
    np.stack(each, axis=1).reshape(len(q), -1)
    for each in zip(*parts, strict=True)
  )


def coded(numbers) -> Row:
  """Of a kind that reads codes of all keys: their share of 16-bit keys' bytes.

  `scanned` is the share of keys whose exact product was computed, beside them.
  """
  return {'codes': numbers.bits / 16} if numbers.kind == 'fastscan' else {}


def searched(index, kind: str, q, top: int, effort: int, n: int):
  """(scores, tokens, share of keys whose exact product was computed)."""
  from lcx.select import vector_index

  if kind in ('exact', 'flat'):
    return *index.search(q, top, effort), 1.0
  if kind == 'fastscan':
    parts = max(1, len(index.parts))
    ranked = parts * max(vector_index.share(effort, parts), top)
    return *index.search(q, top, effort), min(ranked, n) / n
  from lcx.select import vector_index_faiss

  vector_index_faiss.scanned(reset=True)
  score, tokens = found_by(index, q, top, effort)
  count = vector_index_faiss.scanned()
  if kind == 'ivf':  # centroids are products, too
    count += len(q) * index.index.nlist
  return score, tokens, count / (len(q) * n)
