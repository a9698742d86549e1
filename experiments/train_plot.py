"""The curves of a training run."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np


def draw(rows: Sequence[Mapping[str, Any]]) -> bytes:
  """A PNG: losses and the accuracy of answers over steps, stages marked."""
  figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout='constrained')
  left = figure.subplots()
  right = left.twinx()
  step = np.array([row['step'] for row in rows])
  for name, colour in (('answer', 'C0'), ('text', 'C7')):
    left.plot(
      step, _smooth([row[name] for row in rows]), color=colour, label=name
    )
  right.plot(
    step, _smooth([row['accuracy'] for row in rows]), 'C1', label='accuracy'
  )
  last = None
  for row in rows:
    if row['length'] != last:
      left.axvline(row['step'], color='0.8', linewidth=0.8)
      left.text(row['step'], 0.02, f' {row["length"]}', color='0.4',
                fontsize=8, transform=left.get_xaxis_transform())  # fmt: skip
      last = row['length']
  left.set_xlabel('step')
  left.set_ylabel('loss (nats a token)')
  left.set_ylim(bottom=0)
  right.set_ylabel('accuracy of answer tokens')
  right.set_ylim(0, 1)
  left.legend(loc='upper left', frameon=False)
  right.legend(loc='upper right', frameon=False)
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=110)
  return buffer.getvalue()


def _smooth(values: Sequence[float], width: int = 20) -> np.ndarray:
  array = np.asarray(values, float)
  size = max(1, min(width, len(array)))
  padded = np.concatenate([np.full(size - 1, array[0]), array])
  return np.convolve(padded, np.ones(size) / size, 'valid')
