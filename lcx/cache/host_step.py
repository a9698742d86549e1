"""One call of a row's attention: what is asked, done side by side, and found.

Plain numpy. All kv heads go together: a call of numpy for each would be most of
a step's time, and Python runs in one thread at a time.
"""

import concurrent.futures
import time
from typing import Any, NamedTuple

import numpy as np

from lcx.select import vector_index as vi

_FAR = 1.25  # over the farthest held-out query's distance: a far one
# Of query heads: keys scored beside the index, keys attended; queries that
# were far, of which more effort or more keys were asked, or all keys.
COUNTERS = ('scored', 'attended', 'far', 'more_effort', 'more_keys', 'exact')
# Sign, and the 15 other bits of a 16-bit float, where a float32 has its own.
_HALF = np.int32(-0x7FFFFFFF - 1 | 0x0FFFE000)
# Keys that are multiplied together: of more, BLAS copies them first, and makes
# threads beside those that scan other heads.
_A_PRODUCT = 256
_UP = np.float32(2.0**112)  # exponents begin at -126 in place of -14


class Part(NamedTuple):
  """Attention of M queries a kv head over the host's tokens.

  Attributes:
    out: float32 [K M H].
    lse: float32 [K M].
    rest: float32 [K M] log of the estimated exp sum of all other tokens.
    counts: float [len(COUNTERS)].
    search_s: seconds in the index: of one native call, its duration; else of
      all threads together.
    native_s: seconds of the calling thread that it waited for searches and for
      products with values; the rest of its time is Python's.
  """

  out: np.ndarray
  lse: np.ndarray
  rest: np.ndarray
  counts: np.ndarray
  search_s: float
  native_s: float


class Calibration(NamedTuple):
  """Which scaled queries are like those of the prompt.

  Attributes:
    centre: [H] of a kv head's; [K 1 H] of all, `together`.
    spread: alike.
    limit: a number; [K 1].
  """

  centre: np.ndarray
  spread: np.ndarray
  limit: Any

  @classmethod
  def of(cls, near: Any) -> 'Calibration':
    """From what the prompt's queries say, a `Near` of one kv head."""
    scale = near.held_out.shape[1] ** -0.5
    spread = np.maximum(near.spread * scale, 1e-6)
    found = cls(near.centre * scale, spread, np.inf)
    held = near.held_out[near.held_near[:, 0] >= 0] * scale
    if not len(held):
      return found
    return found._replace(limit=_FAR * float(found.distance(held).max()))

  def distance(self, q: np.ndarray) -> np.ndarray:
    """Mean squared deviation of q [... H] in standard deviations."""
    x = q - self.centre
    x /= self.spread
    return np.einsum('...h,...h->...', x, x) / q.shape[-1]

  @classmethod
  def together(cls, heads: 'list[Calibration]') -> 'Calibration':
    """That of all kv heads, made once: a step asks it of all at once."""
    return cls(*(np.stack(x)[:, None] for x in zip(*heads, strict=True)))

  def far(self, q: np.ndarray) -> np.ndarray:
    """Bool [K M]: which of q [K M H] are unlike those of their kv head."""
    return self.distance(q) > self.limit


class Step:
  """What one call of `Row.attend` asks, and its results so far.

  Queries are flat, [K M H] as [K * M, H]: number i is of kv head i // M.
  """

  def __init__(self, q: np.ndarray, m: int, first: int, until: int, pool):
    self.q, self.m, self.first, self.until = q, m, first, until
    self.out = np.zeros(q.shape, np.float32)
    self.lse = np.full((len(q),), -np.inf, np.float32)
    self.rest = self.lse.copy()
    self.counts = np.zeros(len(COUNTERS))
    self.search_s = self.native_s = 0.0
    self._pool = pool

  def searched(
    self, asked, k: int, effort: int, jobs: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """What the indexes find: see `lcx.select.vector_index.together`.

    In one native call, or by the pool's threads; of fewer than k, the others
    are -inf and -1.
    """
    begin = time.perf_counter()
    found = vi.together(asked, k, effort, jobs)
    if found is not None:
      seconds = time.perf_counter() - begin
      self.native_s += seconds
      self.search_s += seconds
      return found
    sizes = [len(q) for _, _, q in asked]
    at_once = max(1, sum(sizes) // jobs)
    score = np.full((sum(sizes), k), -np.inf, np.float32)
    tokens = np.full(score.shape, -1, np.int64)
    parts, begin = [], 0
    for each, size in zip(asked, sizes, strict=True):
      cuts = range(0, size, at_once)
      parts += [(each, first, begin + first) for first in cuts]
      begin += size

    def search(part):
      begin, ((index, graph, q), first, at) = time.perf_counter(), part
      some = index.search(q[first : first + at_once], k, effort, graph)
      for mine, found in zip((score, tokens), some, strict=True):
        mine[at : at + len(found), : found.shape[1]] = found
      return time.perf_counter() - begin

    self.search_s += sum(self.side_by_side(search, parts))
    return score, tokens

  def side_by_side(self, work, each) -> list:
    """`work` of each, in the pool's threads and the calling one.

    Raises what one of them raises.
    """
    begin = time.perf_counter()
    jobs = [self._pool.submit(work, x) for x in each[1:]]
    try:
      done = [work(x) for x in each[:1]]
    finally:  # they write into the step
      concurrent.futures.wait(jobs)
    done += [job.result() for job in jobs]
    self.native_s += time.perf_counter() - begin
    return done


def weights(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(softmax [M c], logsumexp [M]) of scores; zeros and -inf of nothing."""
  peak = score.max(axis=1, keepdims=True)
  peak[peak == -np.inf] = 0
  weight = score - peak
  np.exp(weight, out=weight)
  total = weight.sum(1)
  with np.errstate(divide='ignore'):
    lse = np.log(total)
  lse += peak[:, 0]
  weight /= np.maximum(total, np.float32(1e-30))[:, None]
  return weight, lse


def mixed(weight: np.ndarray, value: np.ndarray) -> np.ndarray:
  """sum_c weight[m c] value[m c H], float32 [M H].

  numpy widens 16-bit floats one by one, which was half of a step's time beside
  the search. Their bits, in a float32's place, are those of value / 2^112; the
  weights bring that back. Finite values alone: the device attends every token
  before the host does, so others are seen there.
  """
  if value.dtype != np.float16:
    return np.matmul(weight[:, None], value.astype(np.float32, copy=False))[
      :, 0
    ]
  return np.matmul((weight * _UP)[:, None], _small(value))[:, 0]


def _small(x: np.ndarray) -> np.ndarray:
  """16-bit floats / 2^112, as float32: see `mixed`."""
  bits = x.view(np.int16).astype(np.int32)
  bits <<= 13
  bits &= _HALF
  return bits.view(np.float32)


def scanned(q: np.ndarray, keys: np.ndarray) -> np.ndarray:
  """Products [M n] of float32 q [M H] with all stored keys [n H] of a head.

  Few at a time, which stay in a cache, and widened by their bits: numpy widens
  16-bit floats one by one. Elements of float16 are finite, queries' below
  2**16: they are multiplied by 2**112.
  """
  out = np.empty((len(q), len(keys)), np.float32)
  half = keys.dtype == np.float16
  q = q * _UP if half else q
  for at in range(0, len(keys), _A_PRODUCT):
    some = keys[at : at + _A_PRODUCT]
    some = _small(some) if half else some.astype(np.float32, copy=False)
    np.matmul(q, some.T, out=out[:, at : at + _A_PRODUCT])
  return out


def weighted_sum(weight: np.ndarray, values: np.ndarray) -> np.ndarray:
  """sum_n weight[m n] values[n H] of all stored values of a head, likewise."""
  out = np.zeros((len(weight), values.shape[1]), np.float32)
  half = values.dtype == np.float16
  weight = weight * _UP if half else weight
  for at in range(0, len(values), _A_PRODUCT):
    some = values[at : at + _A_PRODUCT]
    some = _small(some) if half else some.astype(np.float32, copy=False)
    out += weight[:, at : at + _A_PRODUCT] @ some
  return out


def products(q: np.ndarray, keys: np.ndarray) -> np.ndarray:
  """Products [K M n] of q [K M H] with keys [K n H], all float32.

  Few queries with many keys are copied about and shared among BLAS's threads,
  which are not there yet; with few keys at a time they are multiplied at once.
  """
  out = np.empty((*q.shape[:2], keys.shape[1]), np.float32)
  for at in range(0, keys.shape[1], _A_PRODUCT):
    some = slice(at, at + _A_PRODUCT)
    np.matmul(q, keys[:, some].swapaxes(1, 2), out=out[..., some])
  return out


def lse_of(x: np.ndarray, peak: np.ndarray | None = None) -> np.ndarray:
  """Logsumexp over the last axis; -inf of nothing.

  Args:
    x: [... n].
    peak: [...] the largest of it, where that is known.
  """
  if peak is None:
    peak = np.max(x, axis=-1, initial=-np.inf)
  peak = np.where(peak > -np.inf, peak, np.float32(0))
  x = x - peak[..., None]
  with np.errstate(divide='ignore'):
    return np.log(np.exp(x, out=x).sum(-1)) + peak
