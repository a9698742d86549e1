"""Writes crossover lengths into lcx/policy.json, from measured rows alone.

python -m experiments.fit_policy [--rows=runs/lserve_speed/results.jsonl]

Reads the committed rows (experiments/results/*.jsonl but those of superseded
code) and the files given; a later row takes the place of an earlier one. Three
kinds are understood, the others passed over:

  measure_methods   prefill, step and layer of a method over its peer, dense
  measure_prefill   a layer on several devices over dense on one: op 'prefill'
  selector_bench    a prompt's attention, selection included, over our own dense
                    at the same length, which is what runs in its place: at a
                    share of random keys; on a model's: vertical_slash, and
                    SpargeAttn at a threshold and similarity of its own

A selector's rows have two clocks, inside kernels and from the host, gaps
between launches included; the one that is worse for it counts. Without lengths
that lost and longer ones that won, nothing is written (see lcx/policy.py).
"""

import json
import pathlib
import re
import statistics
import sys
from collections.abc import Iterable
from typing import Any

from absl import app, flags

from experiments import kernel_bench
from experiments.results import write_file
from lcx import policy
from lcx.models import presets

_ROWS = flags.DEFINE_multi_string(
  'rows', [], 'results.jsonl with more rows; may be repeated.'
)
_OUT = flags.DEFINE_string('out', str(policy.DEFAULT), 'The policy file.')

RESULTS = pathlib.Path(__file__).parent / 'results'

Row = dict[str, Any]
# All of policy.Entry down to `crossover`.
Identity = tuple[str, str, str, int, int, int, int]
_SELECTED = re.compile(r'(\w+) (1/\d+) of (\w+), (density [\d.]+)')
# What these list follows from a model's keys, not from a share.
_CROSSED = re.compile(
  r'(vertical_slash_\w+|sparge_\d+) (threshold [\d.]+ |)of (\w+), '
  r'(density [\d.]+), mass [\d.]+, keys of \S+'
)


def committed() -> list[pathlib.Path]:
  """Files of rows that stand; each row names the revision that gave it."""
  found = sorted(RESULTS.glob('*.jsonl'))
  return [path for path in found if not path.name.startswith('superseded')]


def read(paths: Iterable[pathlib.Path]) -> list[Row]:
  """The rows of some files, oldest first.

  Raises:
    ValueError: a file that cannot be read, or a line that is no row.
  """
  rows = []
  for path in paths:
    try:
      lines = path.read_text('utf-8').splitlines()
      rows += [dict(json.loads(line)) for line in lines]
    except OSError as error:
      raise ValueError(f'--rows={path}: {error.strerror}') from error
    except (ValueError, TypeError) as error:
      raise ValueError(f'--rows={path} has a line that is no row') from error
  return sorted(rows, key=lambda row: str(row.get('date')))


def fit(rows: list[Row]) -> policy.Policy:
  """All entries that the rows bracket."""
  found = []
  for identity, evidence in sorted(groups(rows).items()):
    crossover = policy.crossover_of(evidence)
    if crossover is not None:
      found.append(policy.Entry(*identity, crossover, evidence))
  return policy.Policy(tuple(found))


def groups(rows: list[Row]) -> dict[Identity, policy.Evidence]:
  """Evidence of what differs in length and setting alone."""
  dense = {_run(row): row for row in rows if _is_dense(row)}
  found: dict[Identity, dict[tuple[int, str], float]] = {}
  for row in rows:
    if row.get('op') == 'attention':
      pair = _selector(row, dense)
    else:
      pair = _method(row)
    if pair:
      identity, length, ratio, setting = pair
      places = found.setdefault(identity, {})
      places[length, setting] = round(ratio, 3)
  return {
    identity: tuple((n, x, at) for (n, at), x in sorted(places.items()))
    for identity, places in found.items()
  }


def _method(row: Row) -> tuple[Identity, int, float, str] | None:
  """Of measure_methods or measure_prefill."""
  if row.get('op') not in ('prefill', 'step', 'layer') or 'parts' not in row:
    return None
  if not row['ratio'] or row['implementation'] == row['peer']:
    return None
  parts = row['parts']
  # A label may end in the cache's bits, which are a column here.
  label = re.sub(r', int[48]$', '', row['implementation'])
  name = re.match(r"Method\(name='(\w+)'", parts)
  if name and name[1] != label:
    return None  # a variation, as one part of it switched off
  shape, *rest = row['case'].split()
  if name and len(rest) > 1:
    return None  # low-bit weights: products take another share of the time
  preset = presets.PRESETS[shape]
  bits = re.search(r'\bbits=(\d+)', parts)
  where = (preset.n_heads, preset.n_kv_heads, preset.head_dim)
  op, device = row['op'], row['device'].split(' x ')[-1]
  if row.get('devices', 1) > 1:  # several devices against one
    op, device = 'prefill', f'{row["devices"]} x {device}'
  where += (int(bits[1]) if bits else 16,)
  identity = (op, label, device, *where)
  return identity, row['length'], row['ratio'], _part(op, parts)


def _part(op: str, parts: str) -> str:
  """The part of a composition that an op runs, as its row describes it."""
  if op == 'prefill':
    return parts.partition('prefill=')[2].partition(', cache=')[0] or parts
  return parts.partition('decode=')[2].removesuffix(')') or parts


def _selector(
  row: Row, dense: dict[tuple, Row]
) -> tuple[Identity, int, float, str] | None:
  """Of selector_bench, at its heads in bfloat16."""
  case = _SELECTED.fullmatch(row['case']) or _CROSSED.fullmatch(row['case'])
  if not case or row['implementation'] != 'ours':
    return None
  rival = dense.get(_run(row))
  if rival is None:
    return None
  name, share, label, density = case.groups()
  length = int(label.removesuffix('K')) * (1024 if label[-1] == 'K' else 1)
  clocks = [c for c in ('kernel_ms', 'repeats_ms') if row[c] and rival[c]]
  ratio = min(
    statistics.median(rival[c]) / statistics.median(row[c]) for c in clocks
  )
  bench = kernel_bench
  identity = (
    'attention',
    name,
    row['device'].removeprefix('1 x '),
    *(bench.HEADS, bench.KV_HEADS, bench.HEAD_DIM, 16),
  )
  setting = ', '.join(filter(None, (share.strip(), density)))
  return identity, length, ratio, setting


def _is_dense(row: Row) -> bool:
  return (
    row.get('op') == 'attention'
    and row['implementation'] == 'ours'
    and re.fullmatch(r'dense \w+(, keys of \S+)?', row['case']) is not None
  )


def _run(row: Row) -> tuple:
  """What a row and its dense one share: device, code, length and keys."""
  length = row['case'].partition(',')[0].split()[-1]
  keys = row['case'].partition(', keys of ')[2]
  return row['device'], row['git'], length, keys


def line(identity: Identity, evidence: policy.Evidence) -> str:
  """What was found, in words."""
  op, method, device, *_, bits = identity
  won = sorted({n for n, ratio, _ in evidence if ratio > 1})
  lost = sorted({n for n, ratio, _ in evidence if ratio <= 1})
  found = policy.crossover_of(evidence)
  return (
    f'{op} {method}, {device}, {bits} bits: {found or "no entry"} '
    f'(faster than dense at {won}, not at {lost})'
  )


def main(argv: list[str]) -> None:
  """Reads rows, writes the file anew."""
  del argv
  try:
    rows = read([*committed(), *map(pathlib.Path, _ROWS.value)])
  except ValueError as error:
    sys.exit(f'error: {error}')
  for group in sorted(groups(rows).items()):
    print(line(*group))
  write_file(_OUT.value, fit(rows).to_json())


if __name__ == '__main__':
  app.run(main)
