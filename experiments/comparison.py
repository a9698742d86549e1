"""Numbers of a report: scores of methods, and differences to dense in pairs.

Pure functions over rows. A sample (one context) is the unit: its questions are
averaged first, for they share a context and are not independent.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from experiments.results import Row

BASELINE = 'dense'
RESAMPLES = 10_000

# A sample's place in a table, and the sample within it.
Cell = tuple[str, str, str, int]  # model, protocol, task, length


@dataclasses.dataclass(frozen=True)
class Difference:
  """Mean difference to dense over pairs of the same sample.

  Attributes:
    mean: method minus dense.
    low: lower end of the 95% interval (percentile bootstrap over samples).
    high: upper end.
    pairs: samples that both answered.
    won: samples on which the method scores higher.
    lost: samples on which it scores lower.
  """

  mean: float
  low: float
  high: float
  pairs: int
  won: int
  lost: int


@dataclasses.dataclass(frozen=True)
class Line:
  """One method on one cell, or, with `task` 'all', on several cells.

  Attributes:
    model: as in the rows.
    protocol: `whole` or `context_first`.
    task: the task, or 'all' (the mean of the cells' means).
    length: tokens, or 0 for all.
    method: label.
    n: samples scored.
    failed: rows without a score.
    score: mean, 0 to 1; None where nothing was scored.
    difference: to dense; None for dense itself and where dense is absent.
    density: mean share of keys attended.
    mass: mean captured softmax mass of the prefill; None where it is not known.
    degenerate: the marked rows' share.
    keys: mean of keys that a query of decode attended.
    kv_bytes: mean bytes of a sequence's keys and values on the device.
    host_bytes: mean bytes on the host.
    prefill_ms: median.
    decode_ms: median, a token.
    answer_ms: median of prefill and decode of a whole answer.
  """

  model: str
  protocol: str
  task: str
  length: int
  method: str
  n: int
  failed: int
  score: float | None
  difference: Difference | None
  density: float | None
  mass: float | None
  degenerate: float
  keys: float | None
  kv_bytes: float | None
  host_bytes: float | None
  prefill_ms: float | None
  decode_ms: float | None
  answer_ms: float | None


def cell_of(row: Row) -> Cell:
  """The cell to which a row belongs."""
  return row['model'], row['protocol'], row['task'], row['length']


def scores(rows: Iterable[Row]) -> dict[Cell, dict[int, float]]:
  """Per cell and sample the mean score of its questions; failed rows apart."""
  found: dict[Cell, dict[int, list[float]]] = {}
  for row in rows:
    if row['score'] is not None:
      samples = found.setdefault(cell_of(row), {})
      samples.setdefault(row['sample'], []).append(row['score'])
  return {
    cell: {s: statistics.fmean(v) for s, v in sorted(samples.items())}
    for cell, samples in found.items()
  }


def paired(
  method: Mapping[Cell, Mapping[int, float]],
  dense: Mapping[Cell, Mapping[int, float]],
) -> Difference | None:
  """Mean over cells of the mean paired difference, with its interval.

  Cells weigh the same; samples are drawn within their cell. None where no
  sample was answered by both.
  """
  strata = []
  for cell, samples in method.items():
    other = dense.get(cell, {})
    both = [score - other[s] for s, score in samples.items() if s in other]
    if both:
      strata.append(np.asarray(both))
  if not strata:
    return None
  rng = np.random.default_rng(0)
  draws = np.zeros(RESAMPLES)
  for stratum in strata:
    n = len(stratum)
    # The same numbers as of 64 bits, in a third of the time.
    ids = rng.integers(0, n, (RESAMPLES, n), dtype=np.int32)
    draws += stratum[ids].mean(1)
  low, high = np.quantile(draws / len(strata), (0.025, 0.975))
  every = np.concatenate(strata)
  return Difference(
    mean=float(np.mean([s.mean() for s in strata])),
    low=float(low),
    high=float(high),
    pairs=len(every),
    won=int((every > 1e-9).sum()),
    lost=int((every < -1e-9).sum()),
  )


def compare(rows: Sequence[Row]) -> list[Line]:
  """A line a cell and method, in the rows' order."""
  groups = _group(rows, cell_of)
  return [
    line for cell, members in groups.items() for line in _lines(members, *cell)
  ]


def by_length(rows: Sequence[Row]) -> list[Line]:
  """A line a model, protocol, length and method, over all tasks."""
  groups = _group(rows, lambda r: (r['model'], r['protocol'], r['length']))
  return [
    line
    for (model, protocol, length), members in groups.items()
    for line in _lines(members, model, protocol, 'all', length)
  ]


def overall(rows: Sequence[Row]) -> list[Line]:
  """A line a model, protocol and method, over all tasks and lengths."""
  groups = _group(rows, lambda r: (r['model'], r['protocol']))
  return [
    line
    for (model, protocol), members in groups.items()
    for line in _lines(members, model, protocol, 'all', 0)
  ]


def _group(rows: Iterable[Row], key) -> dict:
  groups: dict = {}
  for row in rows:
    groups.setdefault(key(row), []).append(row)
  return groups


def _lines(rows, model, protocol, task, length) -> Iterable[Line]:
  methods = _group(rows, lambda r: r['method'])
  dense = scores(methods.get(BASELINE, ()))
  for method, members in methods.items():
    own = scores(members)
    good = [r for r in members if r['score'] is not None]
    yield Line(
      model=model,
      protocol=protocol,
      task=task,
      length=length,
      method=method,
      n=sum(len(samples) for samples in own.values()),
      failed=len(members) - len(good),
      score=_mean(statistics.fmean(s.values()) for s in own.values()),
      difference=paired(own, dense) if method != BASELINE else None,
      density=_mean(r['density'] for r in good),
      mass=_mean(r.get('prefill_captured_mass') for r in good),
      degenerate=_mean(float(r['degenerate']) for r in members) or 0.0,
      keys=_mean(r['keys_attended'] for r in good),
      kv_bytes=_mean(r['kv_bytes'] for r in good),
      host_bytes=_mean(r['host_bytes'] for r in good),
      prefill_ms=_median(r['prefill_ms'] for r in good),
      decode_ms=_median(r['decode_ms_per_token'] for r in good),
      answer_ms=_median(_answer(r) for r in good),
    )


def _answer(row: Row) -> float | None:
  parts = row['prefill_ms'], row['decode_ms_per_token'], row['new_tokens']
  if any(p is None for p in parts):
    return None
  return parts[0] + parts[1] * parts[2]


def _mean(values: Iterable[float | None]) -> float | None:
  found = [v for v in values if v is not None]
  return statistics.fmean(found) if found else None


def _median(values: Iterable[float | None]) -> float | None:
  found = [v for v in values if v is not None]
  return statistics.median(found) if found else None
