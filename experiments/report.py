"""The report of a run: terminal tables, report.md, PNG plots, report.html.

Everything is computed from rows. The section Quality depends on the answers
alone: two runs with the same rows but for times print the same text there.
"""

import base64
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2

from experiments import comparison, plots
from experiments.comparison import Line
from experiments.results import Row, write_file

_MIB = 2**20

# What a repeated run may give otherwise; everything else of a row is decided
# by its key.
MEASURED = (
  'prefill_ms',
  'decode_ms_per_token',
  'peak_bytes',
  'compilations',
  'compile_s',
  'git',
  'date',
)

NOTES = (
  'score: mean over samples, 0 to 1; "all": mean over the cells above it.',
  'vs dense: mean difference over the samples that both answered (pairs); '
  'interval: 95%, percentile bootstrap over samples, 10,000 draws; won/lost: '
  'samples with a higher/lower score than dense. An interval of no width says '
  'that all pairs differ equally, not that the difference is certain; below '
  'ten pairs read it as a sketch.',
  'decode keys: keys that a query of decode (answer, question read apart) '
  'attended, a mean over layers and query heads; the prompt is not counted.',
  'density: keys attended over keys that dense causal attention would attend: '
  "the smaller of prefill's and decode's.",
  'captured mass: softmax mass of the keys that prefill attended, of all keys '
  "it could have: a mean over sampled queries; '-' where it was not traced.",
  'degenerate (!): a method other than dense that attended more than half of '
  'the keys; its score says little about sparsity.',
  'failed: rows without a score (NaN, out of pages); the same command tries '
  'them again.',
)


def number(value: float | None, digits: int, signed: bool = False) -> str:
  """With so many decimals; '-' where there is none; never a negative zero."""
  if value is None:
    return '-'
  text = f'{value:{"+" if signed else ""}.{digits}f}'
  return text.replace('-', '+', 1) if float(text) == 0 and signed else text


def difference(line: Line) -> tuple[str, str, str]:
  """Mean difference to dense, its interval, won and lost; '' of dense."""
  d = line.difference
  if d is None:
    return '', '', ''
  mean = number(d.mean, 2, signed=True)
  low, high = (number(v, 2, signed=True) for v in (d.low, d.high))
  return mean, f'[{low}, {high}]', f'{d.won}/{d.lost} of {d.pairs}'


def labelled(line: Line) -> str:
  """The method; with '!' where some rows attended more than half."""
  return line.method + (' !' if line.degenerate > 0 else '')


def _where(line: Line) -> list[str]:
  return [line.task, f'{line.length}' if line.length else 'all']


def _quality(lines: Sequence[Line]) -> list[list[str]]:
  head = 'task|length|method|n|failed|score|vs dense|95% interval|won/lost'
  table = [head.split('|')]
  for line in lines:
    table.append(
      [
        *_where(line),
        labelled(line),
        f'{line.n}',
        f'{line.failed}' if line.failed else '',
        number(line.score, 2),
        *difference(line),
      ]
    )
  if not any(line.failed for line in lines):
    table = [[*row[:4], *row[5:]] for row in table]
  return table


def _cost(lines: Sequence[Line]) -> list[list[str]]:
  table = [
    [
      'length',
      'method',
      'decode keys',
      'density',
      'captured mass',
      'KV MiB',
      'host MiB',
      'prefill ms',
      'decode ms/token',
    ]
  ]
  for line in lines:
    table.append(
      [
        f'{line.length}',
        labelled(line),
        number(line.keys, 0),
        number(line.density, 3),
        number(line.mass, 3),
        number(None if line.kv_bytes is None else line.kv_bytes / _MIB, 2),
        number(None if line.host_bytes is None else line.host_bytes / _MIB, 2),
        number(line.prefill_ms, 1),
        number(line.decode_ms, 2),
      ]
    )
  if all(line.mass is None for line in lines):
    table = [[*row[:4], *row[5:]] for row in table]
  return table


def _columns(table: Sequence[Sequence[str]], quiet: int) -> str:
  """Aligned text; the first `quiet` columns are blank where they repeat."""
  widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
  text, last = [], None
  for number, row in enumerate(table):
    cells = list(row)
    for i in range(quiet):
      if last is not None and list(row[: i + 1]) == list(last[: i + 1]):
        cells[i] = ''
    words = []
    for i, (cell, width) in enumerate(zip(cells, widths)):
      left = i == 0 or table[0][i] in ('method', '95% interval')
      words.append(cell.ljust(width) if left else cell.rjust(width))
    if quiet and number and last is not None and cells[0] and number > 1:
      text.append('')
    text.append('  '.join(words).rstrip())
    if number == 0:
      text.append('  '.join('-' * width for width in widths))
    last = row if number else None
  return '\n'.join(text)


def markdown_table(table: Sequence[Sequence[str]]) -> str:
  """Rows of cells, the head first."""
  left = ('model', 'protocol', 'task', 'method', '95% interval')
  rule = [':--' if name in left else '--:' for name in table[0]]
  rows = [table[0], rule, *table[1:]]
  return '\n'.join(
    '| ' + ' | '.join(c.replace('|', '\\|') for c in row) + ' |' for row in rows
  )


def _sections(
  rows: Sequence[Row], shape: Callable[[Sequence[Sequence[str]], int], str]
) -> list[tuple[str, str, str]]:
  """(heading, quality table, cost table) a model and protocol."""
  every = comparison.compare(rows)
  total = comparison.overall(rows)
  lengths = comparison.by_length(rows)
  found = []
  for model, protocol in dict.fromkeys((x.model, x.protocol) for x in every):

    def mine(lines, model=model, protocol=protocol):
      return [x for x in lines if (x.model, x.protocol) == (model, protocol)]

    found.append(
      (
        f'{model}, protocol: {protocol.replace("_", " ")}',
        shape(_quality(mine(every) + mine(total)), 2),
        shape(_cost(mine(lengths)), 1),
      )
    )
  return found


def terminal(rows: Sequence[Row]) -> str:
  """The tables, for a terminal."""
  text = []
  for heading, quality, cost in _sections(rows, _columns):
    text += [heading, '', quality, '', cost, '']
  return '\n'.join(text)


def markdown(
  title: str,
  rows: Sequence[Row],
  facts: Mapping[str, Any],
  files: Sequence[str],
) -> str:
  """report.md: what was run, Quality, Cost, plots, how to read it."""
  text = [f'# {title}', '', *(f'- {k}: {v}' for k, v in facts.items()), '']
  sections = _sections(rows, lambda table, _: markdown_table(table))
  for heading, quality, cost in sections:
    text += [f'## Quality: {heading}', '', quality, '']
    text += [f'## Cost: {heading}', '', cost, '']
  text += ['## Plots', '', *(f'![{name}]({name})' for name in files), '']
  text += ['## How to read it', '', *(f'- {note}' for note in NOTES)]
  return '\n'.join(text) + '\n'


def html(
  title: str,
  rows: Sequence[Row],
  facts: Mapping[str, Any],
  images: Mapping[str, bytes],
) -> str:
  """report.html: one file, no script, no address; it opens offline."""
  folder = pathlib.Path(__file__).parent
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(folder),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )

  def keep(table, _):
    return table

  return environment.get_template('report.html').render(
    title=title,
    facts=facts,
    sections=_sections(rows, keep),
    images={n: base64.b64encode(i).decode() for n, i in images.items()},
    notes=NOTES,
    rows=rows,
  )


def write(
  workdir: pathlib.Path,
  title: str,
  rows: Sequence[Row],
  facts: Mapping[str, Any],
) -> None:
  """Writes report.md, report.html and the plots, each file at once.

  Args:
    workdir: the run directory.
    title: of the report.
    rows: in the order of the tables.
    facts: what was run, a line each.
  """
  images = plots.draw(comparison.by_length(rows))
  for name, image in images.items():
    write_file(workdir / name, image)
  write_file(workdir / 'report.md', markdown(title, rows, facts, list(images)))
  write_file(workdir / 'report.html', html(title, rows, facts, images))
