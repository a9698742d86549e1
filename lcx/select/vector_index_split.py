"""Keys of one head in several indexes, which are searched side by side.

A head's search is one thread's work. Where there are more cores than heads,
each of P indexes holds every P-th token, of whatever topic, so that what a
query wants is in all of them about alike: each ranks its share of the effort,
and the best of what they find are the best of all.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np

from lcx.select.vector_index import share

# Keys of an index at least: a search of 4-bit codes has fixed costs of about as
# many (tables of each query).
LEAST = 16384


class SplitIndex:
  """Indexes of some of a head's tokens each.

  Attributes:
    parts: token t is in number t % P, or was.
    step: 0: its numbers are its parts'.
  """

  graphs, start, step = 1, 0, 0

  def __init__(self, parts: Sequence[Any]):
    self.parts = tuple(parts)

  @property
  def tokens(self):
    return np.concatenate([x.tokens for x in self.parts])

  def search(self, q, k, effort, graph=0):
    """As `Index.search`."""
    del graph
    effort = share(effort, len(self.parts))
    found = [x.search(q, k, effort) for x in self.parts]
    score, tokens = (
      np.concatenate(x, axis=1) for x in zip(*found, strict=True)
    )
    order = np.argsort(-score, axis=1, kind='stable')[:, :k]
    return (
      np.take_along_axis(score, order, 1),
      np.take_along_axis(tokens, order, 1),
    )

  def native(self, k, effort, graph=0):
    """None: its parts have one each."""
    del k, effort, graph

  def add(self, keys, tokens):
    for each, mine in self._each(tokens):
      if mine.any():
        each.add(keys[mine], tokens[mine])

  def remove(self, tokens):
    for each, mine in self._each(tokens):
      if mine.any():
        each.remove(tokens[mine])

  def _each(self, tokens):
    of = np.asarray(tokens) % len(self.parts)
    return [(part, of == i) for i, part in enumerate(self.parts)]

  def dump(self):
    return {
      f'{name}/{i}': array
      for i, part in enumerate(self.parts)
      for name, array in part.dump().items()
    }

  @classmethod
  def load(cls, arrays, one: Callable[[Any], Any]) -> Self:
    """From what `dump` returned; `one` loads a part."""
    parts = []
    while some := {
      name.rpartition('/')[0]: array
      for name, array in arrays.items()
      if name.rpartition('/')[2] == str(len(parts))
    }:
      parts.append(one(some))
    return cls(parts)

  @property
  def nbytes(self):
    return sum(x.nbytes for x in self.parts)
