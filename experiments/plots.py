"""PNG plots of a report. Colours and markers belong to methods."""

import io
import math
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.comparison import BASELINE, Line

MARKERS = 'osD^vP*Xhpd<>'
_MIB = 2**20


def draw(lines: Sequence[Line]) -> dict[str, bytes]:
  """PNG files by name, from the lines of `by_length`."""
  styles = _styles(lines)
  return {
    'quality_by_length.png': _png(
      lines,
      styles,
      'context length (tokens)',
      lambda line: line.length,
      log=2,
      intervals=True,
    ),
    'quality_by_time.png': _png(
      lines,
      styles,
      'time of an answer: prefill + decode (ms, median)',
      lambda line: line.answer_ms,
      log=10,
    ),
    'quality_by_kv.png': _png(
      lines,
      styles,
      'keys and values, all tiers (MiB a sequence)',
      lambda line: ((line.kv_bytes or 0) + (line.host_bytes or 0)) / _MIB,
      log=2,
    ),
  }


def _styles(lines: Sequence[Line]) -> dict[str, dict]:
  methods = sorted({line.method for line in lines} - {BASELINE})
  colours = matplotlib.color_sequences['tab10']
  styles = {BASELINE: {'color': '0.15', 'marker': 'o', 'linestyle': '--'}}
  for i, method in enumerate(methods):
    styles[method] = {
      'color': colours[i % len(colours)],
      'marker': MARKERS[(i + 1) % len(MARKERS)],
      'linestyle': '-',
    }
  return styles


def _png(
  lines: Sequence[Line],
  styles: dict[str, dict],
  label: str,
  x_of: Callable[[Line], float | None],
  log: int,
  intervals: bool = False,
) -> bytes:
  panels: dict[tuple[str, str], dict[str, list[Line]]] = {}
  for line in lines:
    panel = panels.setdefault((line.model, line.protocol), {})
    panel.setdefault(line.method, []).append(line)
  figure = Figure(figsize=(5.6 * len(panels) + 0.6, 4), layout='constrained')
  axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
  for ax, ((model, protocol), methods) in zip(axes, panels.items()):
    found = {x_of(line) for m in methods.values() for line in m}
    seen = {x for x in found if x is not None} or {1}
    for method, members in methods.items():
      _plot(ax, members, x_of, styles[method], method, intervals)
    if (all(seen) and max(seen) >= 4 * min(seen)) or (intervals and all(seen)):
      ax.set_xscale('log', base=log)
      ax.xaxis.set_major_formatter(tidy)
      ax.xaxis.set_minor_formatter('')
      if log == 2 and intervals:
        ax.set_xticks(sorted(seen))
    ax.set_xlabel(label)
    ax.set_ylim(-0.03, 1.05)
    ax.grid(alpha=0.25)
    ax.set_title(f'{model}, {protocol.replace("_", " ")}', fontsize=9)
    if ax.lines:  # nothing was scored otherwise
      ax.legend(fontsize=8)
  axes[0].set_ylabel('score, mean over tasks')
  buffer = io.BytesIO()
  # No software version or date inside: equal rows give equal files.
  figure.savefig(buffer, format='png', dpi=110, metadata={'Software': None})
  return buffer.getvalue()


def _plot(
  ax: Axes,
  members: Sequence[Line],
  x_of: Callable[[Line], float | None],
  style: dict,
  method: str,
  intervals: bool,
) -> None:
  points = [
    (x, line.score, line)
    for line in members
    if (x := x_of(line)) is not None and line.score is not None
  ]
  if not points:
    return
  points.sort(key=lambda p: p[2].length)
  xs, ys, found = zip(*points)
  hollow = [line.degenerate > 0.5 for line in found]
  ax.plot(xs, ys, label=method, markersize=0, **_without(style, 'marker'))
  for x, y, empty in zip(xs, ys, hollow):
    face = 'white' if empty else style['color']
    ax.plot(x, y, style['marker'], color=style['color'], mfc=face)
  if intervals:
    for x, y, line in points:
      if line.difference:
        base = y - line.difference.mean
        low, high = base + line.difference.low, base + line.difference.high
        ax.vlines(x, low, high, color=style['color'], alpha=0.4)
  else:
    for x, y, line in points:
      ax.annotate(
        f'{line.length}',
        (x, y),
        textcoords='offset points',
        xytext=(4, -10),
        fontsize=7,
        color=style['color'],
      )


def _without(style: dict, name: str) -> dict:
  return {k: v for k, v in style.items() if k != name}


def tidy(value: float, _) -> str:
  """A tick's label: powers of two from 1024 on in K."""
  if value >= 1024 and math.log2(value).is_integer():
    return f'{value / 1024:g}K'
  return f'{value:g}'
