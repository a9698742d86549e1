"""Measures and writes records.json: the one way to record quality anew.

python -m tests.quality.record [--long] [METHOD ...]

Without names, every method. Prints each score with dense beside it and a paired
test. Give the commit message the reason why a record falls.
"""

import json
import sys
import time

from tests.quality import measure, records


def main(argv: list[str]) -> None:
  """Records the methods named, or all."""
  long = '--long' in argv
  wanted = [a for a in argv if a != '--long']
  known = {n for after in (True, False) for n in measure.names(after)}
  if wrong := set(wanted) - known:
    raise SystemExit(f'no method {", ".join(sorted(wrong))}')
  found = records.read()
  for label, (_, after, is_long) in measure.GROUPS.items():
    if is_long != long:
      continue
    group = measure.group(label)
    for name in measure.names(after):
      if wanted and name not in wanted:
        continue
      start = time.perf_counter()
      cells = group.measure(name)
      rows = {cell: records.row(score) for cell, score in cells.items()}
      found.setdefault(label, {})[name] = rows
      found[label] = dict(sorted(found[label].items()))
      records.FILE.write_text(json.dumps(found, indent=1) + '\n')
      seconds = time.perf_counter() - start
      for cell, row in rows.items():
        print(
          f'{label:10} {name:18} {cell:22} {row["score"]:.2f} '
          f'(dense {row["dense"]:.2f}, lost {row["lost"]}, won {row["won"]}, '
          f'p {row["p"]:.3f}) KL {row["kl"]:.4f} top-1 {row["top1"]:.2f} '
          f'{seconds:5.1f} s',
          flush=True,
        )


if __name__ == '__main__':
  main(sys.argv[1:])
