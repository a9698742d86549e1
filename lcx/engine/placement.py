"""Where a row's tokens live on a mesh that shards the sequence.

The prompt lives where the prefill's layout puts it. New tokens fill the page
that its last token lies in, so that pages are the same as on one device; those
that come then live on the last shard, as in APB (arXiv:2502.12085, algorithm 3)
and Star Attention, or on all shards by turns, a page each. Decode merges shards
exactly, so answers are the same; by turns, no shard grows faster than another.
"""

import dataclasses
from typing import Any, Literal, get_args

import numpy as np

from lcx.engine.buckets import bucket
from lcx.methods.base import Method, Tail

NewKeys = Literal['last', 'round_robin']


@dataclasses.dataclass(frozen=True)
class Placement:
  """Room for prompt and new tokens on each sequence shard.

  Attributes:
    method: the composition; its prefill lays prompts out.
    shards: of the sequence.
    capacity: tokens that a row may reach.
    room: of these, tokens that come after the prompt.
    new_keys: which shards new tokens live on.

  Raises:
    ValueError: `new_keys` is unknown, or pages are shorter than the pieces in
      which questions are read. (A shard appends its tokens of a piece as one
      run: a piece may reach into two pages, which are two shards'.)
  """

  method: Method
  shards: int
  capacity: int
  room: int
  new_keys: NewKeys = 'last'

  def __post_init__(self):
    if self.new_keys not in get_args(NewKeys):
      raise ValueError(
        f'new_keys={self.new_keys!r} must be one of {get_args(NewKeys)}'
      )
    page, piece = self.method.cache.page, self.method.decode.max_queries
    if self.new_keys == 'round_robin' and page < piece:
      raise ValueError(
        f"new_keys='round_robin' needs pages of at least {piece} tokens, as "
        f'many as are read at a time: raise cache.page={page}'
      )

  @property
  def _unit(self) -> int:
    """Padded prompts are multiples of it."""
    return 128 * self.method.prefill.pieces(self.shards)

  def padded(self, length: int) -> int:
    """Tokens of a padded prompt: its bucket, or all that a row may reach."""
    return min(bucket(length, self._unit), self._up(self.capacity))

  def cache_capacity(self) -> int:
    """Tokens that the caches of all shards hold, of a row.

    A shard before the last one is full while padding stands behind it.
    """
    if self.shards == 1:
      return self.capacity
    page, new = self.method.cache.page, self.room
    if self.new_keys == 'round_robin':
      new = -(-new // (page * self.shards)) * page
    prompt = self._up(max(self.capacity - self.room, 1)) // self.shards
    whole = self._up(self.capacity) // self.shards
    return self.shards * max(prompt + new, whole)

  def tail(
    self, source: np.ndarray, last: np.ndarray, read: np.ndarray
  ) -> Tail:
    """Where new tokens go.

    Args:
      source: int32 [B T] of the layout.
      last: int32 [B] index of each row's last token in it.
      read: int32 [B] tokens that it holds.
    """
    part = source.shape[1] // self.shards
    shard = last // part
    own = (source >= 0) & (np.arange(source.shape[1]) // part == shard[:, None])
    page = self.method.cache.page
    free = -np.sum(own, axis=1) % page
    turn: Any = None
    if self.new_keys == 'round_robin':
      turn = np.full(read.shape, page, np.int32)
    return Tail(shard.astype(np.int32), (read + free).astype(np.int32), turn)

  def _up(self, length: int) -> int:
    return -(-length // self._unit) * self._unit
