"""Records of quality: written by `tests.quality.record`, read by the tests."""

import json
import pathlib
from typing import Any

from tests.quality import measure

FILE = pathlib.Path(__file__).parent / 'records.json'

# One-sided sign test on pairs of answers: what is no accident.
SIGNIFICANT = 0.05
# Other CPUs round otherwise; where two keys score nearly alike, a selection
# may turn over and with it a token's distribution.
KL_FACTOR, KL_MARGIN = 1.25, 0.02  # nats


def read() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
  """Group -> method -> cell -> a `measure.Score` as JSON."""
  return json.loads(FILE.read_text()) if FILE.exists() else {}


def row(score: measure.Score) -> dict[str, Any]:
  """What is written of a score: it, and the paired test against dense."""
  lost, won = measure.lost_and_won(score.dense, score.hits)
  return {
    'score': round(score.mean, 4),
    'dense': round(score.dense.count('1') / len(score.dense), 4),
    'lost': lost,
    'won': won,
    'p': round(measure.falls(lost, won), 4),
    'kl': round(score.kl, 4),
    'top1': round(score.top1, 4),
    'nll': round(score.nll, 4),
    'hits': score.hits,
  }


def worse(
  now: dict[str, measure.Score], record: dict[str, dict[str, Any]]
) -> str | None:
  """How scores fall below their record by more than chance, or None.

  Answers of all cells are tested together; KL cell by cell.
  """
  old = ''.join(record[cell]['hits'] for cell in now)
  new = ''.join(score.hits for score in now.values())
  lost, won = measure.lost_and_won(old, new)
  p = measure.falls(lost, won)
  if p < SIGNIFICANT:
    return (
      f'{lost} answers lost and {won} won since the record of '
      f'{old.count("1")} in {len(old)} (p = {p:.3f})'
    )
  for cell, score in now.items():
    most = KL_FACTOR * record[cell]['kl'] + KL_MARGIN
    if score.kl > most:
      return (
        f'{cell}: KL to dense is {score.kl:.4f} nats, the record allows '
        f'{most:.4f}'
      )
  return None
