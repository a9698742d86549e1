"""Tables of committed quality rows, and what a selector trades for its speed.

python -m experiments.quality_tables [RUN_FOLDER ...]

Reads results/quality_h200.jsonl.xz, selector_speed.jsonl and snapkv_speed.jsonl
there, writes results/quality_h200.md and results/selector_tradeoff.png. Folders
of `evaluate` runs (results.jsonl, env.json) are taken into the rows first, each
in the place of what its command gave before.

A row is one of its run, with the run's command and without `TIMES`: runs that
share a GPU say nothing about time. Times come from the rows of selector_bench
and, of SnapKV's decode, measure_methods alone, which have other heads.
"""

import collections
import io
import json
import lzma
import pathlib
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments import comparison, environment
from experiments.comparison import BASELINE, Line
from experiments.plots import MARKERS, tidy
from experiments.report import difference, labelled, markdown_table, number
from experiments.results import Row, write_file
from lcx.methods.spargeattn import ALL_TRUSTED

RESULTS = pathlib.Path(__file__).parent / 'results'
ROWS = RESULTS / 'quality_h200.jsonl.xz'
SPEEDS = RESULTS / 'selector_speed.jsonl'
DECODES = RESULTS / 'snapkv_speed.jsonl'
TABLES = RESULTS / 'quality_h200.md'
PLOT = RESULTS / 'selector_tradeoff.png'
LEAST = 100  # samples of a point of the trade-off
# Of the plot: all runs of selectors have it.
TASK = 'niah_multikey_1'

# Of an evaluation's row: what depends on what else the GPU does.
TIMES = (
  'prefill_ms',
  'decode_ms_per_token',
  'peak_bytes',
  'compilations',
  'compile_s',
)

# (selector, length, setting) -> dense's time over that of the selector.
Speeds = dict[tuple[str, int, str], float]
_SPEED = re.compile(r'(\w+) (1/\d+) of (\d+)K, density [\d.]+')
# Whose lists follow from a model's keys, with the numbers of configs/selectors.
_CROSSED = re.compile(
  r'(vertical_slash(?=_128_256 )|sparge_20(?= threshold 0\.9 ))\S*'
  r'( )(?:threshold 0\.9 )?of (\d+)K, .*, keys of \S+'
)
_SHARES = ('1/8', '1/16')
# Arguments of a config that cut a piece out of its table.
_PIECES = ('method', 'task', 'protocol', 'part', 'heads', 'alone')
_CELLS = ('task', 'protocol')  # by which all methods' table is cut
_HOW = ('--config.batch=', '--config.shared_gib=')
_ALONE = re.compile(r'[:,]alone\b')
_OWN = 'own'  # what its numbers list, or keep for decode
_SELECTORS = {
  'XAttentionPrefill': 'xattention',
  'SpargePrefill': 'sparge',
  'VerticalSlashPrefill': 'vertical_slash',
  'AShapePrefill': 'a_shape',
}

_HEAD = """\
# Quality of real models on one GPU

Made by `python -m experiments.quality_tables` from `{rows}`
({n} rows: one a question). {facts}.

Up to thirteen of these runs shared the GPU, so their times and peak memory mean
nothing: the rows are kept without them, and nothing here is a speed but what
stands as dense over a selector's time, measured apart. `kv_bytes` of a row of
revision 7f73c55a23f0 is of its whole batch. Runs that are not complete ended at
their time limit.

- score: mean over samples, 0 to 1; "all": mean over the tasks above it.
- vs dense: mean difference over the samples that both answered, its 95%
  interval (percentile bootstrap over samples, 10,000 draws), and how many
  samples the method won and lost. An interval of no width says that all pairs
  differ equally, not that the difference is certain.
- density: keys attended over those of dense: the smaller of prefill's and
  decode's. "!": some of the rows attended more than half; above 0.5 a row is no
  sparse one.
- a column a task: its score; "*": the 95% interval of that task's difference to
  dense leaves out 0. Such a table was made in pieces, by several commands.
- captured mass: softmax mass of the keys that prefill attended, of all that it
  could have, over sampled queries; '-' where it was not traced.
"""

_TRADE = """\
## Density, quality and time of the selectors

![selector_tradeoff.png](selector_tradeoff.png)

Rows of the runs of `configs/selectors.py` above; density is prefill's, SnapKV's
its decode's. Times faster: dense cuDNN's time over whole attention, estimate
included, in kernels, of `selector_speed.jsonl` at the row's length or, where it
has none, at those nearest below and above: those of XAttention, and of
SpargeAttn that trusts every block's mean (`sparge`), at fixed densities
{shares} of random keys; vertical_slash's, and SpargeAttn's at similarity 0.2
(`sparge_20`), with the numbers of these rows on a model's keys; SnapKV's is of
one layer's decode over 2,048 kept tokens (`snapkv_speed.jsonl`, from the host),
where the rows here keep 512. **They are of other heads (32 / 8 of 128), not of
these models**, without a tail, and most rows of XAttention here attended more
than 1/8: at their own density they would take longer than that. a_shape with
the numbers of these rows (128 + 512 tokens) was not timed.
"""


def read(path: pathlib.Path) -> list[Row]:
  """Rows of a .jsonl or .jsonl.xz file; missing `TIMES` are None.

  Raises:
    ValueError: it cannot be read, or a line is no row.
  """
  try:
    raw = path.read_bytes()
    text = (lzma.decompress(raw) if path.suffix == '.xz' else raw).decode()
    lines = [dict(json.loads(line)) for line in text.splitlines()]
  except OSError as error:
    raise ValueError(f'{path}: {error.strerror}') from error
  except (ValueError, TypeError, lzma.LZMAError) as error:
    raise ValueError(f'{path} is no file of rows ({error})') from error
  return [dict.fromkeys(TIMES) | row for row in lines]


def taken(rows: Sequence[Row], folder: pathlib.Path) -> list[Row]:
  """Rows with those of a run, in the place of its command's older ones.

  The command loses its --workdir, and its model the folder it lay in.

  Raises:
    ValueError: the folder is none of a run of `evaluate`.
  """
  new = read(folder / 'results.jsonl')
  try:
    command = json.loads((folder / 'env.json').read_text())['command']
  except (OSError, ValueError, KeyError) as error:
    raise ValueError(f'{folder}/env.json names no command') from error
  if not all('prefill_density' in row for row in new):
    raise ValueError(f'{folder} holds no rows of an evaluation')
  # Older runs named their words without quotes.
  program, *flags = re.split(r""" (?=["']?--)""", command)
  flags = [x if x.startswith('-') else shlex.split(x)[0] for x in flags]
  flags = [x for x in flags if not x.startswith('--workdir=')]
  model = r'(?<=^--config\.model=)\S*/'
  flags = [re.sub(model, '.cache/models/', flag) for flag in flags]
  command = ' '.join([program, *map(environment.quoted, flags)])
  kept = [row for row in rows if row['command'] != command]
  return kept + [{'command': command} | row for row in new]


def packed(rows: Iterable[Row]) -> bytes:
  """The bytes of a .jsonl.xz file, without `TIMES`."""
  text = ''.join(
    json.dumps({k: v for k, v in row.items() if k not in TIMES}) + '\n'
    for row in rows
  )
  return lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)


def speeds(rows: Iterable[Row], decodes: Iterable[Row] = ()) -> Speeds:
  """Of selector_bench's rows: op `attention`, ours, beside cuDNN.

  Args:
    rows: of selector_bench.
    decodes: of measure_methods: SnapKV's layers beside dense.
  """
  found = {}
  for row in rows:
    case = _SPEED.fullmatch(row['case']) or _CROSSED.fullmatch(row['case'])
    ours = row['op'] == 'attention' and row['implementation'] == 'ours'
    if case and ours and row['peer'] == 'cudnn':
      name, share, length = case.groups()
      found[name, 1024 * int(length), share.strip() or _OWN] = row['ratio']
  for row in decodes:
    if row['implementation'] == 'snapkv' and row['ratio']:
      found['snapkv', row['length'], _OWN] = row['ratio']
  return found


def markdown(rows: Sequence[Row], times: Speeds) -> str:
  """quality_h200.md: a table a run, and the trade of the selectors."""
  text = [
    _HEAD.format(rows=ROWS.name, n=f'{len(rows):,}', facts=_facts(rows)),
    *map(_run, tables(rows)),
    _TRADE.format(shares=' and '.join(_SHARES)),
    _table(
      'model|length|protocol|task|method|density|captured mass|'
      'vs dense|95% interval|won/lost|times faster',
      [_traded(line, members, times) for line, members in trades(rows)],
    ),
    '\nThe times by themselves:\n',
    _times(times),
  ]
  return '\n'.join(text) + '\n'


def runs(rows: Iterable[Row]) -> dict[str, list[Row]]:
  """By command, in the rows' order."""
  found: dict[str, list[Row]] = {}
  for row in rows:
    found.setdefault(row['command'], []).append(row)
  return found


def tables(rows: Iterable[Row]) -> list[list[Row]]:
  """A run each; pieces with all others that their table is cut into.

  Those are of the same config, revision and other arguments, in any batch:
  pieces `alone`, or of the same methods on other tasks and protocols. What
  several pieces answered (dense, say) counts once.

  Raises:
    ValueError: two pieces of a table give a label other numbers.
  """
  pieces = runs(rows)
  wholes, cells = (
    {c: (*_whole(c, names), rows[0]['git']) for c, rows in pieces.items()}
    for names in (_PIECES, _CELLS)
  )
  apart = {wholes[command] for command in pieces if _ALONE.search(command)}
  several = collections.Counter(cells.values())
  found: dict[Any, dict[Any, Row]] = {}
  for command, members in pieces.items():
    place_of: Any = command
    if wholes[command] in apart:
      place_of = wholes[command]
    elif several[cells[command]] > 1:
      place_of = cells[command]
    joined = place_of != command
    table = found.setdefault(place_of, {})
    for row in members:
      place = (*_place(row), row['sample'], row['question'])
      known = table.setdefault(place if joined else row['key'], row)
      parts = [
        [r.get(name) for name in ('prefill', 'cache', 'decode')]
        for r in (row, known)
      ]
      if parts[0] != parts[1]:
        raise ValueError(
          f'pieces of one table give {row["method"]!r} other numbers: {parts}'
        )
  return [list(table.values()) for table in found.values()]


def _whole(command: str, cut_by: Sequence[str]) -> list[str]:
  """The words of the command of which this one makes a piece."""
  kept = []
  for word in shlex.split(command):
    if word.startswith('--config='):
      file, _, argument = word.partition(':')
      names = [x for x in argument.split(',') if x.split('=')[0] not in cut_by]
      word = f'{file}:{",".join(names)}'
    if not word.startswith(_HOW):
      kept.append(word)
  return kept


def trades(rows: Sequence[Row]) -> list[tuple[Line, list[Row]]]:
  """A line and its rows for each cell and selector of configs/selectors.py.

  Of those with `LEAST` samples: a run that ended early has fewer.
  """
  found = []
  for command, members in runs(rows).items():
    if 'configs/selectors.py' not in command:
      continue
    for line in comparison.compare(members):
      own = [row for row in members if _place(row) == _place_of(line)]
      if selector(own[0]) and line.n >= LEAST:
        found.append((line, own))
  return found


def selector(row: Row) -> str:
  """The name under which a row's selector is timed, or ''."""
  if row.get('decode', '').startswith('SnapKVDecode('):
    return 'snapkv'
  part, _, numbers = row['prefill'].partition('(')
  stride = re.search(r'\bstride=(\d+)', numbers)
  name = _SELECTORS.get(part, '')
  similarity = re.search(r'\bsimilarity=([-\d.]+)', numbers)
  if similarity and float(similarity[1]) > ALL_TRUSTED:
    return f'{name}_{100 * float(similarity[1]):g}'
  return f'{name}_{stride[1]}' if stride else name


def _place(row: Row) -> tuple:
  return *comparison.cell_of(row), row['method']


def _place_of(line: Line) -> tuple:
  return line.model, line.protocol, line.task, line.length, line.method


def _facts(rows: Sequence[Row]) -> str:
  def of(name):
    return ', '.join(dict.fromkeys(str(row[name]) for row in rows))

  days = sorted({row['date'][:10] for row in rows})
  models = dict.fromkeys((r['model'], r['model_sha256'][:12]) for r in rows)
  named = ', '.join(f'{name} (SHA-256 {sha}...)' for name, sha in models)
  versions = re.sub(r'\b(\w+)=', r'\1 ', of('versions'))
  return (
    f'{of("device")}, {of("dtype")}, {versions}; {" to ".join(days)}, '
    f'revision {of("git")}; {named}'
  )


def _run(rows: Sequence[Row]) -> str:
  """A run's heading, command, gaps and table."""
  file = re.search(r'configs/(\w+)\.py', rows[0]['command'])
  lengths = ', '.join(dict.fromkeys(str(row['length']) for row in rows))
  name = file[1] if file else 'another config'
  heading = f'## {name}: {rows[0]["model"]}, {lengths} tokens'
  lines = comparison.compare(rows)
  total = comparison.overall(rows)
  commands = list(runs(rows))
  if len(commands) > 1:
    return '\n'.join(
      [heading, '', *(f'- `{command}`' for command in commands), '']
      + [f'{gap}\n' for gap in [_gaps(lines)] if gap]
      + [_matrix(lines, total), '']
    )
  body = []
  for protocol in dict.fromkeys(line.protocol for line in lines):
    mine = [x for x in lines if x.protocol == protocol]
    body += mine
    if len({line.task for line in mine}) > 1:
      body += [x for x in total if x.protocol == protocol]
  cells = [
    [
      line.protocol.replace('_', ' '),
      line.task,
      labelled(line),
      f'{line.n}',
      number(line.score, 2),
      *difference(line),
      number(line.density, 3),
      number(line.mass, 3),
    ]
    for line in body
  ]
  head = (
    'protocol|task|method|n|score|vs dense|95% interval|won/lost|density|'
    'captured mass'
  )
  return '\n'.join(
    [heading, '', f'`{rows[0]["command"]}`', '']
    + [f'{gap}\n' for gap in [_gaps(lines)] if gap]
    + [_table(head, cells), '']
  )


def _matrix(lines: Sequence[Line], total: Sequence[Line]) -> str:
  """A line a protocol and method, a column a task."""
  tasks = list(dict.fromkeys(line.task for line in lines))
  own = {(x.protocol, x.method, x.task): x for x in lines}
  cells = []
  for line in sorted(total, key=lambda x: x.protocol != 'whole'):
    mine = [own.get((line.protocol, line.method, task)) for task in tasks]
    cells.append(
      [line.protocol.replace('_', ' '), labelled(line), f'{line.n}']
      + [_score(x) for x in mine]
      + [number(line.score, 2), *difference(line), number(line.density, 3)]
    )
  columns = ['protocol', 'method', 'n', *tasks, 'mean', 'vs dense']
  return markdown_table(
    [[*columns, '95% interval', 'won/lost', 'density'], *cells]
  )


def _score(line: Line | None) -> str:
  """With a star where the difference to dense is beyond its 95% interval."""
  if line is None or line.score is None:
    return '-'
  d = line.difference
  return f'{line.score:.2f}' + ('*' if d and d.low * d.high > 0 else '')


def _gaps(lines: Sequence[Line]) -> str:
  """What dense has answered and another method has not."""
  n = {_place_of(line): line.n for line in lines}
  methods = list(dict.fromkeys(line.method for line in lines))
  if methods == [BASELINE]:
    return 'Not complete: dense alone.'
  short = []
  for line in lines:
    if line.method != BASELINE:
      continue
    for method in methods:
      got = n.get((*_place_of(line)[:-1], method), 0)
      if got < line.n:
        where = f'{line.protocol.replace("_", " ")}, {line.task}'
        short.append(f'{method} has {got} of {line.n} ({where})')
  return f'Not complete: {"; ".join(short)}.' if short else ''


def _traded(line: Line, rows: Sequence[Row], times: Speeds) -> list[str]:
  mean, interval, won = difference(line)
  return [
    line.model,
    f'{line.length}',
    line.protocol.replace('_', ' '),
    line.task,
    labelled(line),
    number(_density(rows), 3),
    number(line.mass, 3),
    *(mean, interval, won),
    _faster(selector(rows[0]), line.length, times),
  ]


def _density(rows: Sequence[Row]) -> float:
  """Of what selects: prefill, or SnapKV's decode."""
  what = 'decode' if selector(rows[0]) == 'snapkv' else 'prefill'
  return statistics.fmean(row[f'{what}_density'] for row in rows)


def _faster(name: str, length: int, times: Speeds) -> str:
  """As in `8K 2.00, 2.20`: at a length, or at its measured neighbours."""
  lengths = sorted({n for who, n, _ in times if who == name})
  below = [n for n in lengths if n <= length][-1:]
  above = [n for n in lengths if n >= length][:1]
  return (
    '; '.join(
      f'{tidy(n, None)} {_both(name, n, times)}'
      for n in dict.fromkeys(below + above)
    )
    or '-'
  )


def _both(name: str, length: int, times: Speeds) -> str:
  settings = (_OWN,) if (name, length, _OWN) in times else _SHARES
  found = (times.get((name, length, setting)) for setting in settings)
  return ', '.join(number(ratio, 2) for ratio in found)


def _times(times: Speeds) -> str:
  lengths = sorted({n for _, n, _ in times})
  head = '|'.join(['method', *(tidy(n, None) for n in lengths)])
  cells = [
    [name]
    + [
      _both(name, n, times)
      if any((name, n, at) in times for at in (_SHARES[0], _OWN))
      else '-'
      for n in lengths
    ]
    for name in dict.fromkeys(name for name, *_ in times)
  ]
  return _table(head, cells)


def _table(head: str, cells: Sequence[Sequence[str]]) -> str:
  return markdown_table([head.split('|'), *cells])


@matplotlib.rc_context({'font.size': 8, 'axes.grid': True, 'grid.alpha': 0.25})
def draw(rows: Sequence[Row], times: Speeds) -> bytes:
  """selector_tradeoff.png: quality over density and captured mass, times."""
  panels: dict[tuple[str, int], list[tuple[Line, list[Row]]]] = {}
  for line, members in trades(rows):
    if line.task == TASK:
      panels.setdefault((line.model, line.length), []).append((line, members))
  names = [selector(m[0]) for p in panels.values() for _, m in p]
  names = dict.fromkeys(names + [name for name, *_ in times])
  styles = {
    name: {'color': f'C{i}', 'marker': MARKERS[i], 'label': name}
    for i, name in enumerate(names)
  }
  size = 8.6, 1.9 * len(panels) + 3.2
  figure = Figure(figsize=size, layout='constrained')
  heights = [1.9] * len(panels) + [2.4]
  grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
  for i, ((model, length), points) in enumerate(panels.items()):
    where = f'{TASK}, {model}, {tidy(length, None)}'
    density, mass = (figure.add_subplot(grid[i, j]) for j in (0, 1))
    _points(density, points, styles, _density)
    _points(mass, points, styles, _mass)
    density.axvspan(0.5, 1, color='0.9', zorder=0)  # no sparse row
    density.set(title=where, xlim=(0, 0.75), ylabel='score, against dense')
    mass.set(title=where, xlim=(0.65, 1))
  density.set(
    xlabel="density of prefill, snapkv's of decode\n"
    '(hollow: context first; black edge: the last 64 tokens see everything)'
  )
  mass.set(xlabel='captured mass of prefill, where traced')
  _curves(figure.add_subplot(grid[len(panels), :]), times, styles)
  handles = [Line2D([], [], ls='', **style) for style in styles.values()]
  figure.legend(handles=handles, loc='outside lower center', ncols=len(handles))
  buffer = io.BytesIO()
  # No software version or date inside: equal rows give equal files.
  figure.savefig(buffer, format='png', metadata={'Software': None})
  return buffer.getvalue()


def _points(
  ax: Axes,
  points: Sequence[tuple[Line, list[Row]]],
  styles: dict[str, dict],
  x_of: Callable[[Sequence[Row]], float | None],
) -> None:
  """Differences to dense with their intervals."""
  for line, rows in points:
    style, d, x = styles[selector(rows[0])], line.difference, x_of(rows)
    if d is None or x is None:
      continue
    colour = style['color']
    face = colour if line.protocol == 'whole' else 'white'
    tail = re.search(r'\btail=[1-9]', rows[0]['prefill'])
    ax.vlines(x, d.low, d.high, color=colour, alpha=0.5)
    edge = 'black' if tail else colour
    ax.plot(x, d.mean, linestyle='', mfc=face, mec=edge, **style)
  ax.axhline(0, c='0.15', ls='--')
  ax.set(ylim=(-1.0, 0.15))


def _mass(rows: Sequence[Row]) -> float | None:
  found = [row.get('prefill_captured_mass') for row in rows]
  found = [mass for mass in found if mass is not None]
  return statistics.fmean(found) if found else None


def _curves(ax: Axes, times: Speeds, styles: dict[str, dict]) -> None:
  for name, share in dict.fromkeys((name, share) for name, _, share in times):
    of = (name, share)
    points = {n: x for (who, n, at), x in times.items() if (who, at) == of}
    dash = '--' if share == _SHARES[1] else '-'
    ax.plot(*zip(*sorted(points.items())), linestyle=dash, **styles[name])
  ax.axhline(1, c='0.15', ls='--')
  ax.set_xscale('log', base=2)
  ax.set_yscale('log', base=2)
  ax.xaxis.set_major_formatter(tidy)
  ax.yaxis.set_major_formatter(tidy)
  ax.set_xticks(sorted({n for _, n, _ in times}))
  ax.set(xlabel='tokens', ylabel='times as fast as dense')
  ax.set_title(
    'Whole attention, estimate included, beside cuDNN; other heads (32 / 8 of '
    f'128), random keys (full: density {_SHARES[0]},\ndashed: {_SHARES[1]}; '
    "vertical_slash, sparge_20: a model's keys; snapkv: decode of a layer)"
  )


def main(argv: Sequence[str]) -> None:
  """Takes runs in, writes tables and plot anew."""
  rows = read(ROWS) if ROWS.exists() else []
  for folder in argv:
    rows = taken(rows, pathlib.Path(folder))
  if argv:
    write_file(ROWS, packed(rows))
  times = speeds(read(SPEEDS), read(DECODES))
  write_file(TABLES, markdown(rows, times))
  write_file(PLOT, draw(rows, times))


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
  except (OSError, ValueError, KeyError) as error:
    sys.exit(f'error: {error}')
