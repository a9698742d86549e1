"""Quality: model x method x task x length x sample, one row a question.

Rows go to results.jsonl as they are made (experiments/results.py); a run looks
first for the rows that are there. A row's key is a hash of everything that
decides it: the code (experiments/environment.py), the versions and the device,
the model's SHA-256, the method's parts with their numbers, the task, protocol,
length, sample and seed. The report is computed from the rows in the config's
order, so it does not depend on how often the run was cut off.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import tqdm
from absl import logging

from experiments import (
  answers,
  environment,
  errors,
  files,
  models,
  processes,
  report,
  stand_ins,
)
from experiments.answers import Place, Variant
from experiments.results import Results, Row, key_of, write_json
from lcx import head_profile, sharding
from lcx.engine.placement import NewKeys, Placement
from lcx.engine.plan import Residual
from lcx.methods.base import Prompt

Protocol = Literal['whole', 'context_first']


Dtype = Literal['auto', 'float32', 'bfloat16']
LowBit = Literal['', 'w8a8', 'w4a16', 'fp8']


@dataclasses.dataclass(frozen=True)
class Config:
  """What to evaluate.

  Attributes:
    title: of the report.
    model: a Hugging Face folder, a GGUF file, or `preset:NAME` for random
      weights of a preset's shape; several are separated by commas.
    methods: label -> the numbers of a method; `method` names it where the label
      is another word, so that one method may stand with several budgets. The
      label '*' stands for every method that has no label of its own. What needs
      an absent package runs as its stand-in (experiments/stand_ins.py), whose
      name stands in the row's label.
    tasks: label -> the fields of a task; `task` names it likewise. With a field
      `file`, the samples of a benchmark's JSONL file (experiments/files.py).
    lengths: tokens, template and answer included.
    samples: contexts a task and length.
    protocols: `whole`: context and question together; `context_first`: the
      context is prefilled before the question is seen.
    seed: of the samples (and of random weights).
    dtype: of weights and activations; 'auto': float32 on a CPU, else bfloat16.
    weights: '' (as they are), or matrices of few bits: 'w8a8', 'w4a16', 'fp8'.
    batch: sequences a prefill.
    capacity: tokens of the cache; 0: the length, in whole pages.
    max_new_tokens: of an answer; 0: what the task says.
    haystack: a text file to hide things in; '': Python's own documentation.
    mesh: devices along data, seq and model; all there are, with several
      processes.
    new_keys: where the sequence is sharded, which shards new tokens live on:
      'last', or 'round_robin', a page each by turns.
    residual: where heads are split over model, a prefill's activations between
      attention and feed-forward are held 'whole', or are 'spread', too, which
      takes less memory.
    shared_gib: memory for layer inputs of dense prefills, which methods that
      differ in decode alone then share; their prefill times are those of the
      shared prefill plus their own work. 0: each method reads by itself.
    transfer_guard: JAX's guard against implicit transfers between host and
      device while an answer is made.
  """

  model: str
  methods: dict[str, dict[str, Any]]
  tasks: dict[str, dict[str, Any]]
  lengths: tuple[int, ...]
  samples: int
  title: str = 'evaluation'
  protocols: tuple[Protocol, ...] = ('whole',)
  seed: int = 0
  dtype: Dtype = 'auto'
  weights: LowBit = ''
  batch: int = 1
  capacity: int = 0
  max_new_tokens: int = 0
  haystack: str = ''
  shared_gib: float = 0.0
  mesh: tuple[int, int, int] = (1, 1, 1)
  new_keys: NewKeys = 'last'
  residual: Residual = 'whole'
  transfer_guard: Literal['allow', 'log', 'disallow'] = 'allow'

  def __post_init__(self):
    for name in ('methods', 'tasks', 'lengths', 'protocols'):
      if not getattr(self, name):
        raise ValueError(f'config.{name} is empty')
    for name, low in (('samples', 1), ('batch', 1), ('seed', 0)):
      if getattr(self, name) < low:
        raise ValueError(f'config.{name}={getattr(self, name)}: at least {low}')
    for name in ('capacity', 'max_new_tokens'):
      if getattr(self, name) < 0:
        raise ValueError(f'config.{name}={getattr(self, name)} is negative')
    if self.shared_gib < 0:
      raise ValueError(f'config.shared_gib={self.shared_gib} is negative')
    if min(self.lengths) < 1:
      raise ValueError(f'config.lengths={self.lengths}: positive numbers')
    if self.capacity and self.capacity < max(self.lengths):
      raise ValueError(
        f'config.lengths: {max(self.lengths)} tokens do not fit into '
        f'config.capacity={self.capacity}; raise it, or leave it at 0'
      )


def run(config: Config, workdir: pathlib.Path) -> None:
  """Computes the rows that are missing, then writes and prints the report.

  Raises:
    ValueError: the config asks for what cannot be.
    OSError: the model cannot be read, or the workdir cannot be written.
    Failure: some rows have no score.
  """
  config = dataclasses.replace(config, dtype=dtype_of(config.dtype))
  variants = [
    _installed(variant(label, f)) for label, f in _every(config.methods)
  ]
  tasks = {
    label: task(label, f, config.max_new_tokens)
    for label, f in config.tasks.items()
  }
  sources = [
    models.find(spec.strip(), config.seed) for spec in config.model.split(',')
  ]
  where = environment.describe()
  places = _places(config, variants, tasks, sources, where)
  origin = _origin(config, where)
  sharding.make_mesh(*config.mesh)  # refuses what the devices do not fit
  with _results(workdir) as results:
    done = processes.share([_done(results.rows.get(p.key)) for p in places])
    missing = [p for p, d in zip(places, done, strict=True) if not d]
    _check(config, missing)
    if processes.index() == 0:
      write_json(workdir / 'config.json', _config_json(config, variants))
      write_json(workdir / 'env.json', where)
    if missing:
      with _progress(len(places), len(places) - len(missing)) as bar:
        for rows in _answers(config, missing, tasks, bar):
          results.append(row | origin for row in rows)
          bar.update(len(rows))
    if processes.index() == 0:
      _report(config, workdir, [results.rows[p.key] for p in places])


def _results(workdir: pathlib.Path) -> Any:
  """The rows on disk; for all processes but the first, none."""
  if processes.index() == 0:
    return Results(workdir / 'results.jsonl')
  return contextlib.nullcontext(_Elsewhere())


class _Elsewhere:
  """Stands for the rows that process 0 writes."""

  rows: ClassVar[dict[str, Row]] = {}

  def append(self, rows: Iterable[Row]) -> None:
    """Computes them, and leaves them to process 0."""
    collections.deque(rows, maxlen=0)


def _every(
  table: dict[str, dict[str, Any]],
) -> list[tuple[str, dict[str, Any]]]:
  """The table's methods; '*' is all that it does not name."""
  from lcx import methods

  found = [(label, fields) for label, fields in table.items() if label != '*']
  if '*' in table:
    named = {label for label, _ in found}
    found += [(n, table['*']) for n in methods.names() if n not in named]
  return found


def dtype_of(dtype: Dtype) -> Literal['float32', 'bfloat16']:
  """What 'auto' means here."""
  if dtype != 'auto':
    return dtype
  import jax

  return 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'


def load(source: models.Source, dtype: str, weights: LowBit = '') -> Any:
  """An `lcx.models.load.Model`, its matrices of few bits where asked for."""
  model = models.load(source, dtype)
  if not weights:
    return model
  from lcx.models import low_bit

  few = low_bit.quantise(model.weights, weights)
  return dataclasses.replace(model, weights=few)


def variant(label: str, fields: dict[str, Any]) -> Variant:
  """A method of the table; refuses what does not exist."""
  from lcx import methods

  numbers = dict(fields)
  name = numbers.pop('method', label)
  flat: dict[str, Any] = {}
  for key, value in numbers.items():
    if isinstance(value, dict):
      flat |= {f'{key}.{inner}': v for inner, v in value.items()}
    else:
      flat[key] = value
  try:
    method = methods.get_method(name, **flat)
  except ValueError as error:
    raise ValueError(f'config.methods.{label}: {error}') from error
  return _named(label, method)


def _installed(variant: Variant) -> Variant:
  """The variant, or what stands in for one that needs an absent package."""
  method, why = stand_ins.stand_in(variant.method)
  if method is variant.method:
    return variant
  logging.warning('config.methods.%s: %s', variant.label, why)
  return _named(f'{variant.label} ({method.name})', method)


def _named(label: str, method: Any) -> Variant:
  modules = {
    type(part).__module__.rpartition('.')[2]
    for part in (method.prefill, method.cache, method.decode)
  }
  return Variant(label, method, environment.code_version(sorted(modules)))


def task(label: str, fields: dict[str, Any], max_new_tokens: int) -> Any:
  """A task of the table; refuses what does not exist."""
  from lcx import tasks

  numbers = dict(fields)
  name = numbers.pop('task', label)
  try:
    if 'file' in numbers:
      return files.open_file(max_new_tokens=max_new_tokens, **numbers)
    task = tasks.get_task(name, **numbers)
  except ValueError as error:
    raise ValueError(f'config.tasks.{label}: {error}') from error
  if max_new_tokens:
    task = dataclasses.replace(task, max_new_tokens=max_new_tokens)
  return task


def _places(
  config: Config,
  variants: Sequence[Variant],
  tasks: dict[str, Any],
  sources: Sequence[models.Source],
  where: dict[str, Any],
) -> list[Place]:
  """All rows of the report, in its order."""
  shared = {
    'versions': {k: where['versions'][k] for k in ('jax', 'jaxlib')},
    'device': where['device'],
    'seed': config.seed,
    'dtype': config.dtype,
    'batch': config.batch,
    'capacity': config.capacity,
    'haystack': _digest(config),
    **({'mesh': config.mesh} if config.mesh != (1, 1, 1) else {}),
    **({'new_keys': config.new_keys} if config.new_keys != 'last' else {}),
    **({'weights': config.weights} if config.weights else {}),
    **({'residual': config.residual} if config.residual != 'whole' else {}),
  }
  places = []
  for source, protocol, (label, task), length, sample in itertools.product(
    sources,
    config.protocols,
    tasks.items(),
    config.lengths,
    range(config.samples),
  ):
    if sample >= getattr(task, 'size', sample + 1):
      continue  # a file holds no more
    for variant, question in itertools.product(variants, range(task.questions)):
      identity = {
        'code': variant.code,
        'model': source.name,
        'model_sha256': source.sha256,
        'model_side': source.side,
        'method': variant.label,
        'protocol': protocol,
        'task': label,
        'task_fields': repr(task),
        'length': length,
        'sample': sample,
        'question': question,
        **variant.parts,
        **shared,
      }
      row = (source, variant, protocol, label, length, sample, question)
      places.append(Place(*row, key_of(identity)))
  return places


def _done(row: Row | None) -> bool:
  return row is not None and row['status'] == 'ok'


def _progress(total: int, done: int) -> tqdm.tqdm:
  return tqdm.tqdm(
    total=total,
    initial=done,
    unit='row',
    dynamic_ncols=True,
    smoothing=0.1,
    mininterval=0.2 if sys.stderr.isatty() else 20,
    disable=processes.index() != 0,
  )


def _check_layout(config: Config, place: Placement) -> None:
  """Lets a prefill refuse the mesh and the protocols, by a tiny prompt."""
  one = np.zeros(1, np.int32)
  part, shards = place.method.prefill, place.shards
  part.pieces(shards)
  part, room = part.on(shards), place.padded(1)
  for protocol in config.protocols:
    question = 0 if protocol == 'whole' else None
    part.layout(Prompt(one, one, (one,)), question, room, shards)


def _check(config: Config, missing: Sequence[Place]) -> None:
  """Lets the parts refuse model, mesh and capacity before weights are read.

  Raises:
    ValueError: a part refuses, or the model's header is damaged.
  """
  if missing and config.batch % config.mesh[0]:
    raise ValueError(
      f'mesh axis data={config.mesh[0]} must divide config.batch={config.batch}'
    )
  for source in dict.fromkeys(p.source for p in missing):
    numbers = models.numbers(source, config.dtype)
    for variant in dict.fromkeys(p.variant for p in missing):
      for length in config.lengths:
        capacity = answers.capacity_for(length, config.capacity)
        method = variant.method
        try:
          for part in (method.prefill, method.decode):
            part.check(numbers, capacity)
          shards = config.mesh[1]
          place = Placement(method, shards, capacity, 0, config.new_keys)
          _check_layout(config, place)
          method.cache.check(numbers, capacity, config.batch, method.decode)
          check_weights(method, source)
        except ValueError as error:
          raise ValueError(
            f'config.methods.{variant.label} on {source.name}, length '
            f'{length}: {error}'
          ) from error
    if numbers.max_position < max(config.lengths):
      logging.warning(
        '%s was trained for %d tokens, config.lengths reaches %d',
        source.name,
        numbers.max_position,
        max(config.lengths),
      )


def check_weights(method: Any, source: models.Source) -> None:
  """Refuses what was learned for another model of the same shape.

  Raises:
    ValueError: the head profile is of other weight files.
  """
  path = getattr(method.cache, 'profile', '')
  if path in ('', head_profile.ALTERNATE):
    return
  if (own := head_profile.load(path).sha256) != source.sha256:
    raise ValueError(
      f'head profile {path} is of other weights: {own[:12]}, not '
      f'{source.sha256[:12]}. Train one for these; if they are the same model '
      'in another file, put its SHA-256 into the profile'
    )


def _answers(
  config: Config,
  missing: Sequence[Place],
  tasks: dict[str, Any],
  bar: tqdm.tqdm,
) -> Iterator[list[Row]]:
  setting = answers.Setting(
    samples=config.samples,
    seed=config.seed,
    batch=config.batch,
    capacity=config.capacity,
    haystack=_haystack(config),
    transfer_guard=config.transfer_guard,
    shared_gib=config.shared_gib,
    mesh=config.mesh,
    new_keys=config.new_keys,
    residual=config.residual,
  )

  def say(text: str) -> None:
    bar.set_description_str(text, refresh=sys.stderr.isatty())

  for source in dict.fromkeys(p.source for p in missing):
    say('loading the model')
    model = load(source, config.dtype, config.weights)
    mine = [p for p in missing if p.source == source]
    yield from answers.answer(mine, tasks, model, setting, say)


def _digest(config: Config) -> str:
  text = _haystack(config)
  return '' if text is None else hashlib.sha256(text.encode()).hexdigest()


def _haystack(config: Config) -> str | None:
  if not config.haystack:
    return None
  from lcx.tasks import haystacks

  try:
    return haystacks.read(config.haystack)
  except ValueError as error:
    raise ValueError(f'config.haystack: {error}') from error


def _origin(config: Config, where: dict[str, Any]) -> Row:
  return {
    'seed': config.seed,
    'dtype': config.dtype,
    **({'weights': config.weights} if config.weights else {}),
    'device': where['device'],
    'versions': ' '.join(f'{k}={v}' for k, v in where['versions'].items()),
    'git': where['git'],
  }


def _config_json(config: Config, variants: Sequence[Variant]) -> dict[str, Any]:
  return {
    'kind': 'evaluate',
    **dataclasses.asdict(config),
    'resolved': {v.label: {**v.parts, 'code': v.code} for v in variants},
  }


def _report(
  config: Config,
  workdir: pathlib.Path,
  rows: Sequence[Row],
) -> None:
  """Writes and prints the report; raises Failure where a row has no score."""
  facts = {
    'command': environment.command(),
    **{
      f'model {r["model"]}': f'{config.dtype}, SHA-256 {r["model_sha256"]}'
      for r in {r['model_sha256']: r for r in rows}.values()
    },
    'device': ', '.join(dict.fromkeys(r['device'] for r in rows)),
    'versions': ', '.join(dict.fromkeys(r['versions'] for r in rows)),
    'git': ', '.join(dict.fromkeys(r['git'] for r in rows)),
    'samples': f'{config.samples} a task and length, seed {config.seed}',
    **{
      f'method {label}': f'{v["prefill"]}, {v["cache"]}, {v["decode"]}'
      for label, v in {r['method']: r for r in rows}.items()
    },
  }
  print(report.terminal(rows))
  report.write(workdir, config.title, rows, facts)
  print(f'{len(rows)} rows; report: {workdir / "report.html"}')
  bad = [r for r in rows if r['score'] is None]
  if bad:
    r = bad[0]
    what = errors.fault(r['status'], config.dtype)
    raise errors.Failure(
      f'{len(bad)} of {len(rows)} rows have no score; the first: {what}: '
      f'method {r["method"]}, task {r["task"]}, length {r["length"]}, '
      f'sample {r["sample"]}; the same command tries them again'
    )
