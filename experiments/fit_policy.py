"""Writes crossover lengths into lcx/policy.json, from measured rows.

python -m experiments.fit_policy --rows=runs/lserve_speed/results.jsonl

Rows are those of `measure_methods`: one entry for each op, method, device and
cache, with the measured speed-ups over dense as its evidence; and layers of
`measure_prefill`: op 'prefill' on several devices over dense on one.
"""

import pathlib
import sys
from typing import Any

from absl import app, flags

from experiments.results import Results, write_file
from lcx import policy
from lcx.models import presets

_ROWS = flags.DEFINE_string('rows', None, 'results.jsonl of measure_methods.')
_OUT = flags.DEFINE_string('out', str(policy.DEFAULT), 'The policy file.')


def entries(rows: list[dict[str, Any]]) -> list[policy.Entry]:
  """One entry for each group of rows that differ in length alone."""
  groups: dict[tuple, dict[int, float]] = {}
  for row in rows:
    if not row.get('ratio') or row['implementation'] == row['peer']:
      continue
    preset = presets.PRESETS[row['case'].split()[0]]
    bits = next((b for b in (8, 4) if f'bits={b}' in row['parts']), 16)
    where = (preset.n_heads, preset.n_kv_heads, preset.head_dim, bits)
    device = row['device'].split(' x ')[-1]
    op = row['op']
    if row.get('devices', 1) > 1:  # several devices against one
      op, device = 'prefill', f'{row["devices"]} x {device}'
    key = (op, row['implementation'], device, *where)
    groups.setdefault(key, {})[row['length']] = row['ratio']
  found = []
  for key, ratios in groups.items():
    evidence = tuple(sorted(ratios.items()))
    crossover = policy.crossover_of(evidence)
    found.append(policy.Entry(*key, crossover, evidence))
  return found


def main(argv: list[str]) -> None:
  """Reads rows, updates the file."""
  del argv
  if not _ROWS.value or not pathlib.Path(_ROWS.value).exists():
    sys.exit(f'error: --rows={_ROWS.value!r} does not exist')
  out = pathlib.Path(_OUT.value)
  found = policy.load(out) if out.exists() else policy.Policy()
  with Results(_ROWS.value) as results:
    for entry in entries(list(results.rows.values())):
      found = found.with_entry(entry)
      print(f'{entry.op} {entry.method} {entry.bits} bits: {entry.crossover}')
  write_file(out, found.to_json())


if __name__ == '__main__':
  app.run(main)
