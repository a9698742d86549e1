"""Speed: the cases of a benchmark, one row a case and implementation.

A suite is a module of this folder with `cases(**numbers)`, an iterator over
`kernel_bench.Case`. Calls of a case run in one process, one after another, on
the same numbers; a call that fails is a row with its reason and no time. Rows
that are in results.jsonl already are not measured again.
"""

import dataclasses
import datetime
import importlib
import pathlib
import sys
from typing import Any, Literal

from absl import logging

from experiments import environment
from experiments.errors import Failure
from experiments.results import Results, Row, key_of, write_json


@dataclasses.dataclass(frozen=True)
class Config:
  """What to measure.

  Attributes:
    suite: which module's cases.
    numbers: arguments of its `cases`.
    title: of the report.
    repeats: samples of each call.
  """

  suite: Literal['selector_bench']
  numbers: dict[str, Any]
  title: str = 'measurement'
  repeats: int = 10

  def __post_init__(self):
    if self.repeats < 1:
      raise ValueError(f'config.repeats={self.repeats}: at least 1')


def run(config: Config, workdir: pathlib.Path) -> None:
  """Measures what is missing, writes rows, prints a table.

  Raises:
    ValueError: the suite does not take these numbers.
    Failure: every call failed.
  """
  suite = importlib.import_module(f'experiments.{config.suite}')
  where = environment.describe()
  rows: list[Row] = []
  with Results(workdir / 'results.jsonl') as results:
    write_json(workdir / 'config.json', dataclasses.asdict(config))
    write_json(workdir / 'env.json', where)
    for case in suite.cases(**config.numbers):
      found = _measure_case(case, config, where, results)
      rows += found
      for row in found:
        print(_line(row), flush=True)
  if rows and all(row['ms'] is None for row in rows):
    raise Failure(f'all {len(rows)} calls failed: {rows[0]["error"]}')


def _measure_case(case, config: Config, where, results: Results) -> list[Row]:
  rows = []
  for name, make in case.calls.items():
    identity = {
      'op': case.op,
      'case': case.case,
      'implementation': name,
      'repeats': config.repeats,
      'device': where['device'],
      'versions': where['versions'],
      'git': where['git'],
    }
    key = key_of(identity)
    known = results.rows.get(key)
    if known and known['ms'] is not None and not where['dirty']:
      rows.append(known)
      continue
    row: Row = {'key': key} | identity | _times(case, make, config.repeats)
    row['command'] = ' '.join(sys.argv)
    row['date'] = datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds')
    rows.append(row)
  rivals = {r['implementation']: r['ms'] for r in rows[1:] if r['ms']}
  peer = min(rivals, key=rivals.__getitem__, default=None)
  for row in rows:
    row['peer'], row['peer_ms'], row['ratio'] = peer, None, None
    if peer is not None and row['ms'] and row['implementation'] != peer:
      row['peer_ms'] = rivals[peer]
      row['ratio'] = rivals[peer] / row['ms']
  results.append(rows)
  return rows


def _times(case, make, repeats: int) -> dict[str, Any]:
  from lcx import timing

  empty = {'repeats_ms': [], 'ms': None, 'rate': None, 'unit': case.unit}
  empty |= {'ceiling': None, 'compile_s': None, 'error': None}
  try:
    call = make()
    found = timing.measure(
      call.function, call.inputs, shared=call.shared, repeats=repeats
    )
  # One call out of memory, or without its library, must not stop the others.
  except (RuntimeError, ValueError, NotImplementedError) as error:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    logging.warning('%s %s: %s', case.op, case.case, reason[0])
    return empty | {'error': reason[0][:300]}
  scale = {'TFLOP/s': 1e12, 'GB/s': 1e9}[case.unit]
  return empty | {
    'repeats_ms': list(found.repeats_ms),
    'ms': found.ms,
    'rate': case.work / (found.ms * 1e-3) / scale,
    'compile_s': found.compile_s,
  }


def _line(row: Row) -> str:
  head = f'{row["op"]:<10} {row["case"]:<44} {row["implementation"]:<8}'
  if row['ms'] is None:
    return f'{head} failed: {row["error"]}'
  text = f'{head} {row["ms"]:9.3f} ms {row["rate"]:8.1f} {row["unit"]}'
  if row['ratio'] is not None:
    text += f'  {row["ratio"]:.2f}x {row["peer"]}'
  return text
