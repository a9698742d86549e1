"""The numbers by which tokens are selected, and which of them are legal."""

import dataclasses
from typing import Literal, get_args

from lcx.select import soft_vote

Positions = Literal['true', 'rank']
Logits = Literal['raw', 'scaled']


@dataclasses.dataclass(frozen=True)
class TokenRules:
  """What a prefill or a decode part selects by.

  Attributes:
    k: tokens chosen by votes.
    sink: first tokens, always seen.
    local: last tokens, always seen.
    vote: 'soft', 'top_k' or 'head_vote'; see `lcx.select.soft_vote`.
    logits: 'raw' (the paper's, sharper) or 'scaled' by H**-0.5.
    pool: odd window over which votes are max-pooled; 1: none.
    pooling: of several queries into one: 'mean' or 'l2'.
    positions: 'true', or 'rank' in the list.
  """

  k: int = 2048
  sink: int = 128
  local: int = 512
  vote: str = 'soft'
  logits: str = 'raw'
  pool: int = 1
  pooling: str = 'mean'
  positions: str = 'true'

  @property
  def width(self) -> int:
    """Tokens of a list with its ends."""
    return self.sink + self.k + self.local

  @property
  def needs(self) -> frozenset[str]:
    return frozenset()

  def at_full_budget(self, length: int):
    return dataclasses.replace(self, k=length)

  def scale(self, head_dim: int) -> float:
    return 1.0 if self.logits == 'raw' else head_dim**-0.5

  def check(self, config, capacity: int) -> None:
    del capacity
    if self.k < 1 or self.sink < 0 or self.local < 1:
      raise ValueError(
        f'k={self.k} and local={self.local} must be at least 1, '
        f'sink={self.sink} at least 0'
      )
    for name, known in (
      ('vote', soft_vote.KINDS),
      ('logits', get_args(Logits)),
      ('pooling', soft_vote.POOLINGS),
      ('positions', get_args(Positions)),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f'{name}={getattr(self, name)!r} must be in {known}')
    if self.pool < 1 or self.pool % 2 == 0:
      raise ValueError(
        f'pool={self.pool} must be odd: an even window shifts the votes'
      )
    if config.sliding_window is not None:
      raise ValueError(
        f"sliding_window={config.sliding_window}: the model's own window and "
        'selected tokens do not compose; take streaming'
      )
    if self.positions == 'rank':
      rope = getattr(config, 'rope', None)
      if rope is None:
        raise ValueError(
          "positions='rank' extrapolates by rotating keys anew, but the model "
          'has no rotary positions'
        )
      if rope.kind == 'dynamic':
        raise ValueError(
          "positions='rank' keeps positions short; rope kind='dynamic', whose "
          "base grows with them, has nothing to add: take positions='true'"
        )
