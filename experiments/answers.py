"""Answers: what a method says to each question of each sample, as rows."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from experiments import comparison
from experiments.models import Source
from experiments.prompts import Template
from experiments.results import Row
from lcx.engine.placement import NewKeys
from lcx.engine.plan import Residual
from lcx.engine.readings import Readings

DEGENERATE = 0.5  # density above which a sparse method is not sparse
_PAGE = 64  # capacities are multiples of it
# Spans are tokenised apart, which may take some tokens more than the text.
_SEAMS = 16
_WAY_BACK = 512  # tokens of a question and its answer, at most
_KEPT = 2**25  # tokens of samples: 0.3 GB, texts included
_WRITERS = 4  # threads: tokenizers encode outside of Python's lock


@dataclasses.dataclass(frozen=True)
class Variant:
  """One method with its numbers, under the name that the report shows."""

  label: str
  method: Any
  code: str

  @property
  def parts(self) -> dict[str, str]:
    """The row's fields prefill, cache and decode."""
    m = self.method
    return {
      'prefill': repr(m.prefill),
      'cache': repr(m.cache),
      'decode': repr(m.decode),
    }


@dataclasses.dataclass(frozen=True)
class Place:
  """One row to be: where it stands in the tables, and its key."""

  source: Source
  variant: Variant
  protocol: str
  task: str
  length: int
  sample: int
  question: int
  key: str


@dataclasses.dataclass(frozen=True)
class Setting:
  """How answers are made, whatever the method; see `evaluate.Config`."""

  samples: int
  seed: int
  batch: int
  capacity: int
  haystack: str | None
  transfer_guard: str
  shared_gib: float = 0.0
  mesh: tuple[int, int, int] = (1, 1, 1)
  new_keys: NewKeys = 'last'
  residual: Residual = 'whole'


def answer(
  places: Sequence[Place],
  tasks: Mapping[str, Any],
  model: Any,
  setting: Setting,
  say: Callable[[str], None],
) -> Iterator[list[Row]]:
  """Fills places, a prefill at a time, grouped by method and length.

  Args:
    places: the rows that are missing.
    tasks: by label.
    model: an `lcx.models.load.Model`.
    setting: batch, seed and the like.
    say: is told what is being done.

  Yields:
    The rows of one prefill, without what all rows of a run share.
  """
  _check_haystack(setting.haystack, model.tokenizer, places)
  # With a shared prefill, all methods answer a batch before the next one.
  shared = setting.shared_gib > 0
  groups = [
    (length, group, _batches(group, setting))
    for (_, length), group in _grouped(
      places, lambda p: (None if shared else p.variant, p.length)
    )
  ]
  order = [
    (task, length, indices)
    for length, _, batches in groups
    for (_, task, indices), _ in batches
  ]
  with contextlib.closing(
    _drawn(order, tasks, model.tokenizer, setting)
  ) as drawn_batches:
    for length, group, batches in groups:
      readings = Readings(setting.shared_gib * 2**30)
      engines: dict[Variant, Any] = {}
      for ((protocol, name, indices), wanted), drawn in zip(
        batches, drawn_batches
      ):
        first = indices[0]
        for variant, mine in _grouped(wanted, lambda p: p.variant):
          say(f'{variant.label} {name} {length}')
          if variant not in engines:
            method = variant.method
            if any(tasks[p.task].questions > 1 for p in group):
              cache = method.cache.rewindable(_WAY_BACK)
              method = dataclasses.replace(method, cache=cache)
            engines[variant] = make_engine(
              model, method, length, setting, readings
            )
          with jax.transfer_guard(setting.transfer_guard):
            answers = engines[variant].generate(
              [prompt for _, prompt in drawn],
              max(sample.max_new_tokens for sample, _ in drawn),
              tuple(model.tokenizer.eos_ids),
              protocol=protocol,
            )
          yield [
            _row(
              p,
              tasks[name],
              drawn[p.sample - first][0],
              answers[p.sample - first][p.question],
              model.tokenizer,
            )
            for p in mine
          ]
        readings.clear()


def _batches(group: Sequence[Place], setting: Setting):
  """((protocol, task, numbers of the samples), places) of each prefill.

  A sample's neighbours in its batch are the same after a restart.
  """

  def of(place: Place):
    first = place.sample // setting.batch * setting.batch
    until = min(first + setting.batch, setting.samples)
    return place.protocol, place.task, range(first, until)

  return _grouped(group, of)


def _drawn(
  order: Sequence[tuple[str, int, range]],
  tasks: Mapping[str, Any],
  tokenizer: Any,
  setting: Setting,
) -> Iterator[list[tuple[Any, Any]]]:
  """[(sample, its prompt)] of each batch, written while the one before runs.

  Not on a CPU, where that would take the cores whose time is measured. What
  several methods ask for is written once.

  Args:
    order: (task, length, numbers of the samples) of each batch, one for each
      item that the caller takes.
    tasks: by label.
    tokenizer: the model's.
    setting: seed and haystack.
  """
  template = Template(tokenizer)

  def draw(name: str, length: int, index: int):
    sample = tasks[name].sample(
      lambda text: len(tokenizer.encode(text)),
      length,
      setting.seed,
      index,
      setting.haystack,
      overhead=template.overhead,
    )
    return sample, template.prompt(sample)

  kept: collections.OrderedDict[Any, concurrent.futures.Future] = (
    collections.OrderedDict()
  )
  with concurrent.futures.ThreadPoolExecutor(_WRITERS) as pool:

    def begin(batch: tuple[str, int, range]):
      name, length, indices = batch
      found = []
      for index in indices:
        key = name, length, index
        if key not in kept:
          kept[key] = pool.submit(draw, *key)
        kept.move_to_end(key)
        found.append(kept[key])
      while len(kept) > 1 and sum(length for _, length, _ in kept) > _KEPT:
        kept.popitem(last=False)
      return found

    # Batches that are begun while the one before them runs.
    ahead = 0 if jax.default_backend() == 'cpu' else 1
    begun = [begin(batch) for batch in order[:ahead]]
    try:
      for number in range(len(order)):
        begun += [begin(b) for b in order[number + ahead : number + ahead + 1]]
        yield [future.result() for future in begun.pop(0)]
    finally:
      pool.shutdown(cancel_futures=True)


def _check_haystack(text: str | None, tokenizer: Any, places) -> None:
  """Refuses a given text that would have to repeat itself."""
  longest = max(p.length for p in places)
  if text is None or len(text) > 16 * longest:  # a token is shorter than that
    return
  if (found := len(tokenizer.encode(text))) < longest:
    raise ValueError(
      f'config.haystack has {found} tokens, contexts of {longest} need at '
      'least as many: give a longer text, or shorter config.lengths'
    )


def capacity_for(length: int, capacity: int) -> int:
  """Tokens of a cache for a length: as asked, or in whole pages."""
  return capacity or -(-(length + _SEAMS) // _PAGE) * _PAGE


def make_engine(
  model: Any,
  method: Any,
  length: int,
  setting: Setting,
  readings: Readings | None = None,
) -> Any:
  """An engine whose cache holds `length` tokens.

  Below the method's measured crossover, one device reads densely, and the log
  says so.
  """
  from lcx import methods, sharding
  from lcx.engine import Engine

  mesh = sharding.make_mesh(*setting.mesh)
  devices = _together(mesh)
  below = method.prefill.alone_below(model.config, devices)
  if length < below:
    logging.warning(
      '%s: %d tokens are below its crossover of %d on %s: one device reads '
      'them densely',
      *(method.name, length, below, devices),
    )
    dense = methods.get_method('dense').prefill
    method = dataclasses.replace(method, prefill=dense)
    mesh = sharding.one_device()
  return Engine(
    model.config,
    model.weights,
    method,
    mesh=mesh,
    new_keys=setting.new_keys,
    residual=setting.residual,
    capacity=capacity_for(length, setting.capacity),
    batch=setting.batch,
    readings=readings,
  )


def _together(mesh: jax.sharding.Mesh) -> str:
  """Devices that read one prompt, as the policy's entries name them.

  Entries are of prompts whose sequence alone is split; where heads are, too,
  nothing was measured, and the name is no entry's.
  """
  kind = mesh.devices.flat[0].device_kind
  sizes = [mesh.shape['seq']]
  if mesh.shape['model'] > 1:
    sizes.append(mesh.shape['model'])
  elif sizes == [1]:
    return kind
  return ' x '.join(map(str, (*sizes, kind)))


def _grouped(places: Sequence[Place], key: Callable[[Place], Any]):
  """(key, its places), in the order in which keys first come."""
  groups: dict[Any, list[Place]] = {}
  for place in places:
    groups.setdefault(key(place), []).append(place)
  return groups.items()


def _row(
  place: Place, task: Any, sample: Any, answer: Any, tokenizer: Any
) -> Row:
  """What one question gave; a fault has a status and no score."""
  ids = list(answer.tokens)
  if ids and ids[-1] in tokenizer.eos_ids:
    ids.pop()
  text = tokenizer.decode(ids)
  good = answer.status == 'ok'
  question = sample.questions[place.question]
  return {
    'key': place.key,
    'model': place.source.name,
    'model_sha256': place.source.sha256,
    'method': place.variant.label,
    **place.variant.parts,
    'protocol': place.protocol,
    'task': place.task,
    'length': place.length,
    'sample': place.sample,
    'question': place.question,
    'status': answer.status,
    'score': task.score(sample, place.question, text) if good else None,
    'prediction': text,
    'answer': ' | '.join(question.answers),
    'depth': question.depths[0] if question.depths else None,
    'digest': sample.digest,
    'prompt_tokens': answer.prompt_tokens,
    'new_tokens': len(answer.tokens),
    'keys_attended': _finite(answer.keys_attended),
    'density': _finite(answer.density),
    'prefill_density': _finite(answer.prefill_density),
    'decode_density': _finite(answer.decode_density),
    **{k: _finite(v) for k, v in answer.masses.items()},
    'degenerate': good
    and place.variant.label != comparison.BASELINE
    and answer.density > DEGENERATE,
    'prefill_ms': _finite(answer.prefill_ms),
    'decode_ms_per_token': _finite(answer.decode_ms_per_token),
    'kv_bytes': answer.kv_bytes,
    'host_bytes': answer.host_bytes,
    'peak_bytes': answer.peak_bytes,
    'compilations': answer.compilations,
    'compile_s': _finite(answer.compile_s),
    **{f'count_{k}': _finite(v) for k, v in answer.counters.items()},
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }


def _finite(value: float | None) -> float | None:
  """A number that JSON has, rounded to what was measured."""
  if value is None or not math.isfinite(value):
    return None
  return float(f'{value:.6g}')
