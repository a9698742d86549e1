"""The numbers by which TokenSelect selects, and which of them are legal."""

import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.select import soft_vote

Positions = Literal['true', 'rank']
Logits = Literal['raw', 'scaled']
Scoring = Literal['full', 'pruned', 'budget']


@dataclasses.dataclass(frozen=True)
class TokenRules:
  """What a prefill or a decode part selects by.

  Attributes:
    k: tokens chosen by votes.
    sink: first tokens, always seen.
    local: last tokens, always seen.
    vote: 'soft', 'top_k' or 'head_vote'; see `lcx.select.soft_vote`.
    logits: 'raw' (the paper's, sharper) or 'scaled' by H**-0.5.
    heads: whose votes count how much: 'equal' or 'energy'.
    pool: odd window over which votes are max-pooled; 1: none.
    pooling: of several queries into one: 'mean' or 'l2'.
    positions: 'true', or 'rank' in the list.
    voters: order in which query heads vote, G for each kv head (an ablation);
      (): their own, head h for kv head h // G.
  """

  k: int = 2048
  sink: int = 128
  local: int = 512
  vote: soft_vote.Kind = 'soft'
  logits: Logits = 'raw'
  heads: soft_vote.Heads = 'equal'
  pool: int = 1
  pooling: soft_vote.Pooling = 'mean'
  positions: Positions = 'true'
  voters: tuple[int, ...] = ()

  @property
  def width(self) -> int:
    """Tokens of a list with its ends."""
    return self.sink + self.k + self.local

  def at_full_budget(self, length: int):
    return dataclasses.replace(self, k=length)

  def scale(self, head_dim: int) -> float:
    return 1.0 if self.logits == 'raw' else head_dim**-0.5

  def asking(
    self, q: Float[Array, '*R N H'], n_kv_heads: int
  ) -> soft_vote.Voters:
    """The voters of pooled queries, which are `in_order`."""
    return soft_vote.voters(q, n_kv_heads, self.vote, self.heads)

  def in_order(self, q: Float[Array, '*R N H']) -> Float[Array, '*R N H']:
    """Queries in the order in which they meet kv heads to vote.

    Raises:
      ValueError: the mesh axis `model` has taken heads elsewhere.
    """
    if not self.voters:
      return q
    if len(self.voters) != q.shape[-2]:
      raise ValueError(
        f'voters of {len(self.voters)} heads need all of them on one device, '
        f'not {q.shape[-2]}: mesh axis model > 1'
      )
    return jnp.take(q, jnp.array(self.voters), axis=-2)

  def check(self, config, capacity: int) -> None:
    if self.k > capacity:
      raise ValueError(
        f'k={self.k} is above the {capacity} tokens of the context: nothing '
        'would be left out; lower k, or take dense'
      )
    if self.voters and sorted(self.voters) != list(range(config.n_heads)):
      raise ValueError(
        f'voters={self.voters} must hold each of the {config.n_heads} query '
        'heads once'
      )
    if self.k < 1 or self.sink < 0 or self.local < 1:
      raise ValueError(
        f'k={self.k} and local={self.local} must be at least 1, '
        f'sink={self.sink} at least 0'
      )
    for name, known in (
      ('vote', soft_vote.KINDS),
      ('logits', get_args(Logits)),
      ('heads', soft_vote.HEADS),
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


@dataclasses.dataclass(frozen=True)
class ChunkRules(TokenRules):
  """How the chunks of a prompt select.

  Attributes:
    chunk: tokens that share a list; `local` counts back from a chunk's end.
    merge: cosine of two neighbouring chunks' pooled queries, from which on they
      vote with one query; 1: every chunk for itself.
    merged: tokens that vote with one query at most.
    tail: last tokens of a prompt that see everything, which their chunk's query
      would outvote (lcx/methods/prompt_tail.py). 0, as published: none.
  """

  chunk: int = 512
  merge: float = 1.0
  merged: int = 2048
  tail: int = 0

  def check(self, config, capacity: int) -> None:
    super().check(config, capacity)
    if self.chunk < 1 or (self.chunk % 128 and 128 % self.chunk):
      raise ValueError(
        f'chunk={self.chunk} must be a multiple or a divisor of 128'
      )
    if self.local < self.chunk:
      raise ValueError(
        f'local={self.local} must hold the chunk={self.chunk} itself'
      )
    if self.positions == 'rank' and self.sink + self.k < self.chunk:
      raise ValueError(
        f"positions='rank' keeps positions below sink + k + local, but a "
        f'chunk={self.chunk} votes at local and beyond: raise k={self.k}'
      )
    if self.tail < 0 or (self.tail and self.positions == 'rank'):
      raise ValueError(
        f'tail={self.tail} must be at least 0, and 0 with '
        "positions='rank': it sees all tokens where they stand"
      )
    if not 0 <= self.merge <= 1:
      raise ValueError(f'merge={self.merge} must be within 0 and 1')
    if self.merged < self.chunk:
      raise ValueError(
        f'merged={self.merged} must be at least chunk={self.chunk}'
      )


@dataclasses.dataclass(frozen=True)
class ReuseRules(TokenRules):
  """When decode selects anew, and which tokens it scores then.

  Attributes:
    threshold: cosine to the last query that selected, below which a row selects
      (0.9 in the paper); 1: practically always.
    reuse: tokens that a list serves at most, 1: always select. `local` keeps
      room for them: right after a selection it holds `local` - `reuse` + 1, so
      that no token leaves the window unselected.
    scoring: 'full'; 'pruned': only the best pages by bounds, with a certificate
      that the list is the same, else all tokens; 'budget': only the best pages.
    scored: tokens of the best pages, for 'pruned' and 'budget'.
    score_bits: 16: keys as the cache has them; 8: int8 copies, made for scoring
      alone, which halve its bytes.
  """

  threshold: float = 0.9
  reuse: int = 16
  scoring: Scoring = 'full'
  scored: int = 8192
  score_bits: int = 16

  def check(self, config, capacity: int) -> None:
    super().check(config, capacity)
    if not 0 <= self.threshold <= 1:
      raise ValueError(f'threshold={self.threshold} must be within 0 and 1')
    if self.reuse < 1:
      raise ValueError(f'reuse={self.reuse} must be at least 1')
    if self.scoring not in get_args(Scoring):
      raise ValueError(
        f'scoring={self.scoring!r} must be in {get_args(Scoring)}'
      )
    if self.score_bits not in (8, 16):
      raise ValueError(f'score_bits={self.score_bits} must be 8 or 16')
    if self.scoring == 'full':
      return
    if self.pool > 1:
      raise ValueError(
        f'pool={self.pool}: pooled votes reach beyond the pages that are '
        "scored; take scoring='full'"
      )
    if self.scored < self.k:
      raise ValueError(f'scored={self.scored} must be at least k={self.k}')
    if self.scoring == 'budget':
      return
    if self.vote == 'head_vote':
      raise ValueError(
        "vote='head_vote' has no certificate; take scoring='full' or 'budget'"
      )
    if self.score_bits == 8:
      raise ValueError(
        'score_bits=8 rounds votes, of which no certificate can speak; take '
        "scoring='full' or 'budget'"
      )
