"""A graph over keys that knows the queries: RoarGraph's idea, without pivots
that are hubs.

RoarGraph (arXiv:2408.08933, section 4) links each query to its nearest keys and
projects the bipartite graph onto the keys; RetrievalAttention builds one from
prefill queries. With attention's few hub keys its projection loses most keys
(a pivot's list is overwritten by the next query). Two that do not:

  pivot   the least used of a query's 8 nearest keys is linked to the others,
          which are linked in a chain: diffuse heads
  clique  each key is linked to others that were found together with it, drawn
          at random: concentrated heads

and both with links between neighbouring keys. Every key can be reached.

A model has hundreds of heads, whose graphs many threads make side by side.
Links are sorted as packed integers, which numpy does ten times faster than
indices by several keys, and by blocks of rows: memory that is taken from the
system anew costs more than the work on it, the more so the more threads take
it.
"""

import numpy as np

_PIVOTS = 8
_AT_ONCE = 64  # queries that choose pivots before any of them counts as used
_BITS = 21  # of a key's number
_PLACES = 9  # bits of a place in a row
_ROWS = 4096


def graph(
  near: np.ndarray,
  by_key: np.ndarray | None,
  n: int,
  *,
  degree: int,
  projection: str,
  seed: int = 0,
) -> tuple[np.ndarray, int]:
  """Links int32 [n degree] (-1 at the end of a row) and the entry.

  Args:
    near: int [Q c] nearest keys of each query, best first; -1: none.
    by_key: links between keys, of `between_keys`, or None.
    n: keys.
    degree: links of a key, at most 2^8; those by queries are what is left of
      them beside those by keys.
    projection: 'pivot' or 'clique'.
    seed: of what is drawn.
  """
  draw = np.random.default_rng(seed)
  project = {'pivot': _pivot, 'clique': _clique}[projection]
  share = degree if by_key is None else degree - by_key.shape[1]
  links = project(near, n, share, draw)
  if by_key is not None:
    links = np.concatenate([links, by_key], axis=1)
  used = np.bincount(near[near >= 0], minlength=n)
  entry = int(np.argmax(used))
  return reachable(links, entry, draw), entry


def between_keys(key_near: np.ndarray, n: int, degree: int) -> np.ndarray:
  """Links int32 [n degree] of keys to their nearest ones, and back.

  Args:
    key_near: int [n d] nearest keys of each key, best first; -1: none.
    n: keys.
    degree: links of a key.
  """
  width = key_near.shape[1]
  a = np.repeat(np.arange(n, dtype=np.int32), width)
  b = key_near.reshape(-1)
  rank = np.tile(np.arange(width, dtype=np.int32), n)
  pairs = np.concatenate([a, b]), np.concatenate([b, a])
  return capped(*pairs, np.concatenate([rank, rank]), n, degree)


def hubs(near: np.ndarray) -> float:
  """Distinct first neighbours over queries: near 0, a few keys are all's."""
  return len(np.unique(near[:, 0])) / max(1, len(near))


def capped(a, b, priority, n: int, degree: int) -> np.ndarray:
  """Links a -> b as rows [n degree], those of least priority; -1 pads.

  Args:
    a: int [m] in [0, n), or negative: no link.
    b: int [m], alike.
    priority: int [m] in [0, 4096).
    n: keys, below 2^21.
    degree: of a row.
  """
  if n >= 1 << _BITS:
    raise ValueError(f'a graph holds fewer than {1 << _BITS} keys, not {n}')
  good = (a >= 0) & (b >= 0) & (a != b)
  packed = a[good].astype(np.int64)
  packed <<= 12
  packed |= priority[good]
  packed <<= _BITS
  packed |= b[good]
  packed.sort()
  a, b = packed >> (_BITS + 12), packed & ((1 << _BITS) - 1)
  count = np.bincount(a, minlength=n)
  place = np.arange(len(a)) - (np.cumsum(count) - count)[a]
  kept = place < 2 * degree  # some are repeated
  links = np.full((n, 2 * degree), -1, np.int32)
  links[a[kept], place[kept]] = b[kept]
  return _no_repeats(links)[:, :degree]


def reachable(links: np.ndarray, entry: int, draw) -> np.ndarray:
  """Links with every node that the entry does not reach hung to one it does.

  Full rows give up their last link for it.
  """
  links = _no_repeats(links)
  degree = links.shape[1]
  for _ in range(4):
    seen = _reached(links, entry)
    lost = np.flatnonzero(~seen)
    if not len(lost):
      break
    free = np.flatnonzero(seen & (links[:, -1] < 0))
    if not len(free):
      free = np.flatnonzero(seen)
    host = draw.permutation(free)[: len(lost)]
    place = np.minimum((links[host] >= 0).sum(1), degree - 1)
    links[host, place] = lost[: len(host)]
  return links


def without(links: np.ndarray, kept: np.ndarray) -> np.ndarray:
  """Links between the kept nodes, which are numbered anew.

  A link to a dropped node becomes one to a kept node that it was linked to, if
  any: paths over it stay. Which one differs by where the link begins, so that
  none becomes all's.

  Args:
    links: int [n R]; -1 at the end of a row.
    kept: bool [n].

  Returns:
    int32 [sum(kept) R].
  """
  number = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
  dropped = np.flatnonzero(~kept)
  beyond = links[dropped]
  beyond = np.where(beyond >= 0, number[beyond], -1)
  order = np.argsort(beyond < 0, axis=1, kind='stable')
  beyond = np.take_along_axis(beyond, order, 1)
  ways = (beyond >= 0).sum(1)
  place = np.zeros(len(links), np.int64)
  place[dropped] = np.arange(len(dropped))
  old = links[kept]
  rows = np.where(old >= 0, number[old], -1)
  at, column = np.nonzero((old >= 0) & (rows < 0))
  lost = place[old[at, column]]
  rows[at, column] = beyond[lost, at % np.maximum(ways[lost], 1)]
  rows[rows == np.arange(len(rows))[:, None]] = -1
  return _no_repeats(rows)


def _reached(links: np.ndarray, entry: int) -> np.ndarray:
  seen = np.zeros(len(links), bool)
  seen[entry] = True
  front = np.array([entry])
  while len(front):
    near = np.zeros(len(links) + 1, bool)  # -1 falls on the last
    near[links[front]] = True
    front = np.flatnonzero(near[:-1] & ~seen)
    seen[front] = True
  return seen


def _pivot(near, n, degree, draw):
  used = np.zeros(n + 1, np.int32)  # -1 falls on the last
  first = near[:, : min(_PIVOTS, near.shape[1])]
  order = draw.random(first.shape, np.float32)  # of those used as often
  pivots = np.full(len(near), -1, np.int64)
  for i in range(0, len(near), _AT_ONCE):
    some = first[i : i + _AT_ONCE]
    rank = np.where(some >= 0, used[some] + order[i : i + _AT_ONCE], np.inf)
    chosen = some[np.arange(len(some)), np.argmin(rank, axis=1)]
    pivots[i : i + _AT_ONCE] = chosen
    np.add.at(used, chosen, 1)
  width = near.shape[1]
  rank = np.tile(np.arange(width), len(near))
  star = np.repeat(pivots, width), near.reshape(-1)
  chain = near[:, :-1].reshape(-1), near[:, 1:].reshape(-1)
  step = np.tile(np.arange(width - 1), len(near))
  a = np.concatenate([star[0], star[1], chain[0], chain[1]])
  b = np.concatenate([star[1], star[0], chain[1], chain[0]])
  return capped(a, b, np.concatenate([rank, rank, step, step]), n, degree)


def _clique(near, n, degree, draw):
  """Draws queries that found a key, and of each another key that it found."""
  flat = near.reshape(-1)
  places = np.argsort(flat, kind='stable')
  places = places[np.searchsorted(flat[places], 0) :]  # -1: none
  if not len(places):  # all queries want keys that the device keeps
    return np.full((n, degree), -1, np.int64)
  count = np.bincount(flat[places], minlength=n)
  begin = np.cumsum(count) - count
  draws = (draw.random((n, 2 * degree)) * count[:, None]).astype(np.int64)
  place = np.minimum(begin[:, None] + draws, len(places) - 1)
  query = places[place] // near.shape[1]
  other = draw.integers(0, near.shape[1], query.shape)
  links = near[query, other]
  alone = (links == np.arange(n)[:, None]) | (count == 0)[:, None]
  return _no_repeats(np.where(alone, -1, links))[:, :degree]


def _no_repeats(links: np.ndarray) -> np.ndarray:
  """Rows without repeated links, in their order, -1 at their ends."""
  if links.shape[1] > 1 << _PLACES:
    raise ValueError(f'a row holds at most {1 << _PLACES} links')
  out = np.empty(links.shape, np.int32)
  place = np.arange(links.shape[1], dtype=np.uint32)
  none, last = np.uint32(1 << _BITS), np.uint32((1 << _PLACES) - 1)
  for first in range(0, len(links), _ROWS):
    some = links[first : first + _ROWS]
    packed = np.where(some < 0, none, some).astype(np.uint32)
    packed = np.sort((packed << _PLACES) | place, axis=1)
    ids = packed >> _PLACES
    ids[:, 1:][ids[:, 1:] == ids[:, :-1]] = none
    packed = np.where(ids == none, last, packed & last)
    packed = np.sort((packed << (_BITS + 1)) | ids, axis=1)
    ids = packed & np.uint32(2 * none - 1)
    out[first : first + _ROWS] = np.where(ids == none, -1, ids.astype(np.int32))
  return out
