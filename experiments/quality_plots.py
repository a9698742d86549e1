"""Plots of committed quality rows: how far each method is from dense.

python -m experiments.quality_plots ROWS.jsonl[.xz] OUT.png [TEXT ...]

A panel a model, protocol and length, a line a method: the mean difference to
dense over all tasks, its 95% interval, and the task that lost most; in brackets
how many samples it has, where others of the panel have more. Rows stay whose
command and revision contain every TEXT (a config's name, one of its
arguments): a label that means other numbers in another run must not meet it.
"""

import io
import pathlib
import sys
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from experiments import comparison, quality_tables
from experiments.comparison import BASELINE, Line
from experiments.plots import tidy
from experiments.results import Row, write_file


@matplotlib.rc_context({'font.size': 8, 'axes.grid': True, 'grid.alpha': 0.25})
def draw(rows: Sequence[Row]) -> bytes:
  """A PNG file of the rows' methods beside dense.

  Args:
    rows: of one table; a method without a partner in dense is left out.

  Raises:
    ValueError: no method has a partner in dense.
  """
  panels: dict[tuple, list[Line]] = {}
  for line in comparison.by_length(rows):
    if line.difference:
      where = line.model, line.protocol, line.length
      panels.setdefault(where, []).append(line)
  if not panels:
    raise ValueError('no row has a partner in dense: nothing to draw')
  # By length; of one, whole prompts first.
  panels = dict(sorted(panels.items(), reverse=True))
  panels = dict(sorted(panels.items(), key=lambda x: (x[0][0], x[0][2])))
  worst = _worst(comparison.compare(rows))
  heights = [len(lines) + 2.0 for lines in panels.values()]
  figure = Figure(figsize=(7.0, 0.19 * sum(heights)), layout='constrained')
  axes = figure.subplots(
    len(panels), squeeze=False, sharex=True, height_ratios=heights
  )
  for ax, (where, lines) in zip(axes[:, 0], panels.items()):
    for y, line in enumerate(lines):
      d = line.difference
      assert d is not None
      ax.hlines(y, d.low, d.high, color='C0', alpha=0.6)
      ax.plot(
        d.mean, y, 'o', color='C0', mfc='white' if line.degenerate else 'C0'
      )
      ax.plot(worst[*where, line.method], y, 'x', color='C3')
    ax.axvline(0, color='0.15', linestyle='--')
    most = max(_pairs(line) for line in lines)
    names = [
      line.method if _pairs(line) == most else f'{line.method} ({_pairs(line)})'
      for line in lines
    ]
    ax.set_yticks(range(len(lines)), names)
    ax.set_ylim(len(lines) - 0.4, -0.6)
    model, protocol, length = where
    ax.set_title(
      f'{model}, {tidy(length, None)}, {protocol.replace("_", " ")}, n = {most}'
    )
  axes[-1, 0].set_xlabel(
    'score less that of dense: mean over tasks with its 95% interval (hollow: '
    'more than half of the keys);\nx: the task that lost most'
  )
  buffer = io.BytesIO()
  # No software version or date inside: equal rows give equal files.
  figure.savefig(buffer, format='png', dpi=110, metadata={'Software': None})
  return buffer.getvalue()


def _pairs(line: Line) -> int:
  return line.difference.pairs if line.difference else 0


def _worst(lines: Sequence[Line]) -> dict[tuple, float]:
  """(model, protocol, length, method): its tasks' smallest difference."""
  found: dict[tuple, float] = {}
  for line in lines:
    if line.difference and line.method != BASELINE:
      key = line.model, line.protocol, line.length, line.method
      mean = line.difference.mean
      found[key] = min(found.get(key, mean), mean)
  return found


def main(argv: Sequence[str]) -> None:
  """Draws a file's rows."""
  if len(argv) < 2:
    raise ValueError('give ROWS.jsonl and OUT.png, and what commands contain')
  source, out, *texts = argv
  rows = []
  for row in quality_tables.read(pathlib.Path(source)):
    about = f'{row.get("command", "")} {row.get("git", "")}'
    if all(text in about for text in texts):
      rows.append(row)
  write_file(out, draw(rows))


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
  except (OSError, ValueError, KeyError) as error:
    sys.exit(f'error: {error}')
