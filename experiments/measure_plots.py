"""PNG plots of measured rows: rates of kernels, times of methods by length.

python -m experiments.measure_plots ROWS.jsonl OUT.png [OP ...]

A panel is an op. Rows of methods at several lengths are curves of time over
length, both logarithmic; so are those of selectors at several (selector_bench),
but how many times as fast as their peer where they have one. All others are
points, a line of the panel for each case or method: rates where the run
measured the chip's own, which is drawn beside them, else times. At the right:
our time, and the best peer's over it.
"""

import io
import json
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments.comparison import BASELINE
from experiments.plots import MARKERS, tidy
from experiments.results import Row

# A line of the points, or a curve -> (case, implementation) -> newest row.
_Panel = dict[str, dict[tuple[str, str], Row]]
# Of selector_bench: what is timed, its length, its density, and whose keys.
_SELECTED = re.compile(
  r'(dense|[a-z]\w+(?: \S+)*(?= of)) (?:of )?(\d+)K'
  r'(?:, density [\d.]+)?(?:, mass [\d.]+)?(, keys of \S+)?'
)


@matplotlib.rc_context({'font.size': 8, 'axes.grid': True, 'grid.alpha': 0.25})
def draw(rows: Sequence[Row]) -> bytes:
  """A PNG of rows, without those that failed (none left: no panel)."""
  buffer = io.BytesIO()
  # No software version or date inside: equal rows give equal files.
  figure(rows).savefig(buffer, format='png', metadata={'Software': None})
  return buffer.getvalue()


def figure(rows: Sequence[Row]) -> Figure:
  """As `draw`, before it is a file: a panel is one Axes."""
  panels: dict[str, _Panel] = {}
  for row in map(_of_length, rows):
    if row['ms'] is None or row['op'] in ('matmul', 'copy'):
      continue
    op, name = row['op'], row['case']
    if 'keys' in row:
      op, name = f'{op} ({row["keys"]})', row['implementation']
    elif 'length' in row:
      op, name = f'{op}, {name.rpartition(" ")[0]}', row['implementation']
      if row.get('layers', 0) > 1:  # a cut model beside the whole one
        op += f' of {row["layers"]} layers'
    title = f'{op}, {row["device"].removeprefix("1 x ")}'
    line = panels.setdefault(title, {}).setdefault(name, {})
    line[row['case'], row['implementation']] = row
  parts = [_part(panel) for panel in panels.values()]
  styles = _styles([row for panel in panels.values() for row in _rows(panel)])
  heights = [height for _, height in parts] or [1]
  size = 8.6, sum(heights) + 0.65 * len(heights) + 0.5
  made = Figure(figsize=size, layout='constrained')
  grid = made.add_gridspec(len(heights), height_ratios=heights)
  handles = {}
  for i, (title, panel) in enumerate(panels.items()):
    ax = made.add_subplot(grid[i], title=title)
    parts[i][0](ax, panel, styles)
    if parts[i][0] == _gains:
      ax.legend(loc='center left', bbox_to_anchor=(1.01, 0.5), fontsize=7)
      continue
    handles |= dict(zip(*ax.get_legend_handles_labels()[::-1]))
  if handles:
    pairs = list(handles.values()), list(handles)
    made.legend(*pairs, loc='outside lower center', ncols=4)
  return made


def _of_length(row: Row) -> Row:
  """A selector's row with its length, and with its case as who ran."""
  case = _SELECTED.fullmatch(row['case'])
  if not case or row['op'] not in ('attention', 'estimate'):
    return row
  name, length, keys = case.groups()
  if row['implementation'] != 'ours':
    return row | {'ms': None}  # the peer, of which ours has the ratio
  keys = keys.removeprefix(', ') if keys else 'random keys'
  found = {'implementation': name, 'length': 1024 * int(length), 'keys': keys}
  return row | found


def _part(panel: _Panel) -> tuple[Callable[..., None], float]:
  """What draws a panel, and the inches that it is high."""
  rows = _rows(panel)
  if 'length' not in rows[0] or len(rows) == len(panel):
    return _points, 0.1 + 0.2 * len(panel)
  return (_gains, 2.8) if 'keys' in rows[0] else (_curves, 2.2)


def _rows(panel: _Panel) -> list[Row]:
  return [row for line in panel.values() for row in line.values()]


def _styles(rows: Sequence[Row]) -> dict[str, dict]:
  """By implementation: ours and dense are dark and full, others hollow."""
  styles = {}
  for i, name in enumerate(dict.fromkeys(r['implementation'] for r in rows)):
    own, marker = name in ('ours', BASELINE), MARKERS[i % len(MARKERS)]
    hollow = {'color': f'C{i}', 'marker': marker, 'mfc': 'none'}
    styles[name] = {'color': '0.15', 'marker': 'o'} if own else hollow
  return styles


def _curves(ax: Axes, panel: _Panel, styles: dict[str, dict]) -> None:
  for name, line in panel.items():
    points = sorted((row['length'], row['ms']) for row in line.values())
    dash = '--' if name == BASELINE else '-'
    ax.plot(*zip(*points), linestyle=dash, label=name, **styles[name])
  ax.set_xscale('log', base=2)
  ax.set_yscale('log')
  ax.xaxis.set_major_formatter(tidy)
  ax.yaxis.set_major_formatter(tidy)
  ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  ax.yaxis.set_minor_formatter('')
  lengths = sorted({row['length'] for row in _rows(panel)})
  ax.set(xlabel='tokens', ylabel='ms', xticks=lengths)


def _gains(ax: Axes, panel: _Panel, styles: dict[str, dict]) -> None:
  """Of selectors: times as fast as the peer, or ms where none has one."""
  gain = any(row['ratio'] for row in _rows(panel))
  # A colour a selector, the same in all panels; a marker and dash a budget.
  selectors = list(dict.fromkeys(name.split()[0] for name in sorted(styles)))
  budgets: dict[str, list[str]] = {}
  for name in sorted(panel):
    points = sorted(
      (row['length'], row['ratio'] if gain else row['ms'])
      for row in panel[name].values()
      if row['ratio'] or not gain
    )
    if not points:
      continue
    selector = name.split()[0]
    seen = budgets.setdefault(selector, [])
    ax.plot(
      *zip(*points),
      label=name,
      color=f'C{selectors.index(selector)}',
      linestyle=('-', '--', ':', '-.')[len(seen) % 4],
      marker=MARKERS[len(seen) % len(MARKERS)],
      markersize=4,
    )
    seen.append(name)
  if gain:
    ax.axhline(1, c='0.15', ls='--')
  ax.set_xscale('log', base=2)
  ax.set_yscale('log', base=2 if gain else 10)
  ax.xaxis.set_major_formatter(tidy)
  ax.yaxis.set_major_formatter(tidy)
  peer = next((row['peer'] for row in _rows(panel) if row['peer']), '')
  ax.set(
    xlabel='tokens',
    ylabel=f'times as fast as {peer}' if gain else 'ms',
    xticks=sorted({row['length'] for row in _rows(panel)}),
  )


def _points(ax: Axes, panel: _Panel, styles: dict[str, dict]) -> None:
  heads = [next(iter(line.values())) for line in panel.values()]
  ceiling, length = heads[0].get('ceiling'), heads[0].get('length')
  field, unit = ('rate', heads[0]['unit']) if ceiling else ('ms', 'ms')
  unit += f' at {length} tokens' if length else ''
  for y, line in enumerate(panel.values()):
    for i, row in enumerate(line.values()):  # the first, ours, on top
      name = row['implementation']
      label = '' if name in panel else name  # the line says it already
      at = {'linestyle': '', 'zorder': 9 - i}
      ax.plot(row[field], y, label=label, **at, **styles[name])
  values = [row[field] for row in _rows(panel)]
  if ceiling:
    ax.axvline(ceiling, c='0.5', ls='--', label='large product or copy')
  if not ceiling and max(values) > 20 * min(values):
    ax.set_xscale('log')
    ax.xaxis.set_major_formatter(tidy)
  else:
    ax.set_xlim(0, 1.06 * max(ceiling or 0, *values))
  ax.set_yticks(range(len(panel)), list(panel))
  ax.set(xlabel=unit, ylim=(len(panel) - 0.4, -0.6))  # the first on top
  right = ax.secondary_yaxis('right')
  right.set_yticks(range(len(panel)), [_said(row) for row in heads])


def _said(row: Row) -> str:
  ms = row['ms']
  text = f'{ms * 1e3:.1f} us' if ms < 1 else f'{ms:#.3g}'.rstrip('.') + ' ms'
  text = f'{ms:.0f} ms' if ms >= 1000 else text
  if row['ratio'] and row['peer'] != row['implementation']:
    text += f', {row["ratio"]:.2f} x {row["peer"]}'
  return text


def main(argv: Sequence[str]) -> None:
  """Draws recorded rows, of all ops or those named."""
  if len(argv) < 2:
    raise ValueError('give ROWS.jsonl OUT.png [OP ...]')
  source, out, *ops = argv
  rows = map(json.loads, pathlib.Path(source).read_text().splitlines())
  png = draw([row for row in rows if not ops or row['op'] in ops])
  pathlib.Path(out).write_bytes(png)


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
  except (OSError, ValueError, KeyError) as error:
    sys.exit(f'error: {error}')
