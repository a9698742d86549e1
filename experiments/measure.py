"""Measures kernels on the device it finds, beside their peers, in one run.

Each row is one implementation of one case (kernel_bench.py). `ms` is time on
the device: in kernels, by CUPTI, where that is to be had; else a queue of
calls, timed from the host. `ceiling` is what the chip reached in this very run
on a large matrix product or a large copy; `ratio` is the best peer's time over
ours.
"""

import dataclasses
import datetime
import gc
import importlib
import json
import pathlib
from typing import Any, Literal

from absl import logging

from experiments import environment, kernel_bench, measure_plots, results
from experiments.errors import Failure
from lcx import timing

OPS = (
  'block_sparse',
  'passing_block',
  'selected_token',
  'scores',
)


@dataclasses.dataclass(frozen=True)
class Config:
  """What to measure.

  Attributes:
    title: of the report.
    suite: a module of this folder; its cases are measured, beside their peers,
      in place of all below down to `peers`. '': the kernels.
    numbers: arguments of the suite's `cases`.
    ops: of OPS.
    prompts: prompt lengths of block_sparse.
    shares: block_sparse at 1 / share of the blocks.
    mixture: prompt length of the streaming heads; 0: none.
    anchor: tokens of passing_block's anchor; half as many are passed, four
      times as many are local; 0: none.
    decodes: cache lengths of dense decode.
    bits: of the cache in dense decode.
    select: cache length from which pages and tokens are selected.
    batch: sequences of 32K in one decode; 0: none.
    ceilings: whether to measure the chip's own rates.
    implementation: ours; '': what the platform chooses.
    peers: whether to measure what others ship.
    repeats: samples a row.
    output: a file that also gets the rows; '': none.
  """

  title: str = 'kernels'
  suite: Literal['', 'selector_bench', 'tokenselect_bench'] = ''
  numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
  ops: tuple[str, ...] = OPS
  prompts: tuple[int, ...] = ()
  shares: tuple[int, ...] = ()
  mixture: int = 0
  anchor: int = 0
  decodes: tuple[int, ...] = ()
  bits: tuple[int, ...] = (16, 8, 4)
  select: int = 0
  batch: int = 0
  ceilings: bool = True
  implementation: str = ''
  peers: bool = True
  repeats: int = 10
  output: str = ''

  def __post_init__(self):
    for op in self.ops:
      if op not in OPS:
        raise ValueError(f'config.ops: {op!r} is not one of {", ".join(OPS)}')
    if self.repeats < 1:
      raise ValueError(f'config.repeats={self.repeats} must be positive')


def cases(config: Config):
  """The cases of a config, one after the other: they fill the memory."""
  if config.suite:
    suite = importlib.import_module(f'experiments.{config.suite}')
    yield from suite.cases(**config.numbers)
    return
  ours = config.implementation or None
  bench = kernel_bench
  if config.ceilings:
    yield from bench.ceilings()
  if 'block_sparse' in config.ops:
    yield from bench.prompts(
      config.prompts, config.shares, ours, peers=config.peers
    )
    if config.mixture:
      yield from bench.mixtures(config.mixture, implementation=ours)
  if 'passing_block' in config.ops and config.anchor:
    a = config.anchor
    yield from bench.passing(4 * a, a, a // 2, implementation=ours)
  if 'selected_token' in config.ops:
    yield from bench.decodes(
      config.decodes, config.bits, ours, peers=config.peers
    )
    if config.select:
      yield from bench.selections(config.select, implementation=ours)
    if config.batch:
      yield from bench.batches(
        config.batch, implementation=ours, peers=config.peers
      )
  if 'scores' in config.ops and config.select:
    yield from bench.scores(config.select)


def run(config: Config, workdir: pathlib.Path) -> None:
  """Measures every case and writes the rows, a table and a plot."""
  file = results.Results(workdir / 'results.jsonl')
  (workdir / 'env.json').write_text(json.dumps(environment.describe()))
  ceilings: dict[str, float] = {}
  table, failed, measured = [], [], []
  for case in cases(config):
    rows = []
    for name in (*case.calls, *case.timed):
      try:
        time, plan_ms = _timed(case, name, config.repeats)
      # Peers fail in ways of their own; the others are still measured.
      except Exception as e:
        logging.warning(
          '%s %s: %s is left out: %s', case.op, case.case, name, e
        )
        if name.startswith('ours'):
          failed.append(f'{case.op} {case.case}: {e}')
        continue
      finally:
        gc.collect()
      rows.append(row_of(case, name, time, ceilings, plan_ms))
    _compare(rows)
    if rows and case.op in ('matmul', 'copy'):
      ceilings[case.unit] = rows[0]['rate']
    file.append(rows)
    measured += rows
    if config.output and rows:
      with open(config.output, 'a') as out:
        out.writelines(json.dumps(row) + '\n' for row in rows)
    for row in rows:
      table.append(line(row))
      print(table[-1], flush=True)
  (workdir / 'report.md').write_text(
    f'# {config.title}\n\n```\n' + '\n'.join(table) + '\n```\n'
  )
  (workdir / 'speed.png').write_bytes(measure_plots.draw(measured))
  if failed:
    first = failed[0].strip().splitlines()[0]
    raise Failure(f'{len(failed)} measurements failed; the first: {first}')


def _timed(case, name: str, repeats: int) -> tuple[timing.Timing, float | None]:
  """The time of a call, and of its plan where that is apart."""
  if name in case.timed:
    times = case.timed[name](repeats)
    return timing.Timing(times.repeats_ms, compile_s=0.0), times.plan_ms
  call = case.calls[name]()
  time = timing.measure(
    call.function, call.inputs, shared=call.shared, repeats=repeats
  )
  return time, None


def row_of(
  case,
  name: str,
  time,
  ceilings: dict[str, float],
  plan_ms: float | None = None,
) -> dict[str, Any]:
  """The row of one implementation, peers not yet compared."""
  per_second = {'TFLOP/s': 1e9, 'GB/s': 1e6}[case.unit]
  identity = {
    'op': case.op,
    'case': case.case,
    'implementation': name,
    'device': environment.device(),
    'git': environment.git(),
  }
  return {
    'key': results.key_of(identity),
    **identity,
    'ms': time.ms,
    'repeats_ms': list(time.repeats_ms),
    'kernel_ms': list(time.kernel_ms),
    **({} if plan_ms is None else {'plan_ms': plan_ms}),
    'rate': case.work / time.ms / per_second,
    'unit': case.unit,
    'ceiling': ceilings.get(case.unit),
    'peer': None,
    'peer_ms': None,
    'ratio': None,
    'compile_s': time.compile_s,
    'versions': environment.versions(),
    'command': environment.command(),
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }


def _compare(rows: list[dict[str, Any]]) -> None:
  """Enters the fastest peer into our rows."""
  peers = [r for r in rows if not r['implementation'].startswith('ours')]
  if not peers:
    return
  best = min(peers, key=lambda r: r['ms'])
  for row in rows:
    if row['implementation'].startswith('ours'):
      row['peer'], row['peer_ms'] = best['implementation'], best['ms']
      row['ratio'] = best['ms'] / row['ms']


def line(row: dict[str, Any]) -> str:
  """A row as a line of the table."""
  share = f'{row["rate"] / row["ceiling"]:6.1%}' if row['ceiling'] else ''
  ratio = f'{row["ratio"]:.2f} x {row["peer"]}' if row['ratio'] else ''
  plan = f'plan {row["plan_ms"]:.2f} ms apart' if 'plan_ms' in row else ''
  return (
    f'{row["op"]:15} {row["case"]:28} {row["implementation"]:16} '
    f'{row["ms"] * 1e3:10.1f} us {row["rate"]:8.1f} {row["unit"]:7} '
    f'{share:7} {ratio}{plan}'
  ).rstrip()
