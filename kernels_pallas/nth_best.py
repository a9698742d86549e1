"""The n best of many numbers, in their order: parts of Pallas Triton kernels.

The search is for a number, not an order: floats map to integers of the same
order, each pass cuts the interval in three by counting what lies above two
thresholds (in the halves of one integer: one reduction), and ends as soon as
exactly n lie above one. Compaction in place of a sort gives what was chosen in
the order in which it stood.

Candidates come as a list of vectors of lanes: a lane's candidates follow one
another, one in each vector, so that one scan over lanes counts them all. Or, of
candidates that lie in memory, as a list of `pieces`, which are loaded in lines.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Integers in the order of the floats that they stand for, see `ordered`.
LOWEST = -(2**31)  # below every float
MINUS_INF = -0x7F800001
PLUS_INF = 0x7F800000
MOST = 2**16 - 1  # two counts share an int32


def ordered(x: jax.Array) -> jax.Array:
  """float32 to int32 of the same order; both zeros to 0, NaN to inf's.

  (Were NaN above inf, more than n could be chosen, and written.)
  """
  bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
  bits ^= lax.shift_right_arithmetic(bits, 31) & 0x7FFFFFFF
  return jnp.minimum(bits, PLUS_INF)


def slots(width: int, most_lanes: int) -> list[jax.Array]:
  """Numbers of the candidates, vectors of lanes; some are `width` or more."""
  lanes = min(most_lanes, 1 << (width - 1).bit_length())
  depth = -(-width // lanes)
  lane = lax.broadcasted_iota(jnp.int32, (lanes,), 0)
  return [lane * depth + i for i in range(depth)]


def places(
  keys: list[jax.Array], n: int
) -> tuple[list[tuple[jax.Array, jax.Array]], jax.Array]:
  """Where the n best go, in their order; of equal ones the first are best.

  Args:
    keys: `ordered` numbers, at most `MOST` in all; what is not above -inf is
      never chosen.
    n: how many to choose.

  Returns:
    ((chosen, its place among the chosen) of each vector, how many are chosen).
  """
  cut, ties, total = nth_best(keys, n)
  flags = [
    jnp.where(key > cut, 1, jnp.where(key == cut, 1 << 16, 0)) for key in keys
  ]
  lane = sum(flags)
  before = jnp.cumsum(lane) - lane  # above the cut, equal to it << 16
  found = []
  for key, flag in zip(keys, flags):
    equal = lax.shift_right_logical(before, 16)
    chosen = (key > cut) | ((key == cut) & (equal < ties))
    found.append((chosen, (before & 0xFFFF) + jnp.minimum(equal, ties)))
    before += flag
  return found, total


def places_in_pieces(
  keys: list[jax.Array], n: int
) -> tuple[list[tuple[jax.Array, jax.Array]], jax.Array]:
  """`places` of pieces [lanes depth], one behind the other, rows in order.

  So neighbours in memory are neighbours in a row, and are loaded together.
  """
  cut, ties, total = nth_best(keys, n)
  found, above = [], jnp.int32(0)  # before the piece
  for key in keys:
    flag = jnp.where(key > cut, 1, jnp.where(key == cut, 1 << 16, 0))
    lane = jnp.sum(flag, axis=1)
    before = jnp.cumsum(lane) - lane + above
    before = before[:, None] + jnp.cumsum(flag, axis=1) - flag
    equal = lax.shift_right_logical(before, 16)
    chosen = (key > cut) | ((key == cut) & (equal < ties))
    found.append((chosen, (before & 0xFFFF) + jnp.minimum(equal, ties)))
    above += jnp.sum(lane)
  return found, total


def pieces(
  width: int, depth: int, least: int, most: int
) -> list[tuple[int, int]]:
  """Few (first, lanes) of pieces [lanes depth] that hold `width` candidates.

  Lanes are powers of 2 within `least` and `most`; one piece of few candidates
  has fewer.
  """
  lanes = -(-width // depth)
  if lanes <= least:
    return [(0, 1 << (lanes - 1).bit_length())]
  left, first, found = -(-lanes // least), 0, []
  while left:
    some = min(most // least, 1 << (left.bit_length() - 1))
    found.append((first, some * least))
    first, left = first + some * least * depth, left - some
  return found


def nth_best(keys: list[jax.Array], n: int):
  """Where to cut so that n remain: (cut, ties, total), scalars.

  What lies above `cut` is chosen, and the first `ties` of what equals it:
  `total` in all, fewer than n only where fewer are above -inf.
  """

  def count(low, high):
    """How many keys are >= low, and >= high."""
    both = [
      jnp.where(key >= high, 0x10001, jnp.where(key >= low, 1, 0))
      for key in keys
    ]
    both = _whole(jnp.add, jnp.sum, both)
    return both & 0xFFFF, lax.shift_right_logical(both, 16)

  used, forced = count(jnp.int32(MINUS_INF + 1), jnp.int32(PLUS_INF))
  finite = [(key > MINUS_INF) & (key < PLUS_INF) for key in keys]
  least = [jnp.where(f, k, PLUS_INF) for f, k in zip(finite, keys)]
  largest = [jnp.where(f, k, MINUS_INF) for f, k in zip(finite, keys)]
  least = _whole(jnp.minimum, jnp.min, least)
  largest = _whole(jnp.maximum, jnp.max, largest)

  # At least n keys are >= low, fewer than n are >= high.
  search = (forced < n) & (n < used)
  low = jnp.where(search, least, PLUS_INF)
  high = jnp.where(search, largest + 1, PLUS_INF + 1)
  above = jnp.where(search, forced, 0)
  exact = used <= n

  def unsettled(carry):
    low, high, _, exact = carry
    return ~exact & (low + 1 < high)

  def narrow(carry):
    low, high, above, _ = carry
    span = (high - low).astype(jnp.uint32)  # wraps to the true distance
    third = jnp.maximum(span // 3, 1).astype(jnp.int32)
    first, second = low + third, high - third
    n_first, n_second = count(first, second)
    low = jnp.where(n_second >= n, second, jnp.where(n_first >= n, first, low))
    high = jnp.where(n_first < n, first, jnp.where(n_second < n, second, high))
    above = jnp.where(
      n_first < n, n_first, jnp.where(n_second < n, n_second, above)
    )
    return low, high, above, (n_first == n) | (n_second == n)

  low, _, above, exact = lax.while_loop(
    unsettled, narrow, (low, high, above, exact)
  )
  cut = jnp.where(used <= n, MINUS_INF, jnp.where(exact, low - 1, low))
  ties = jnp.where(exact, 0, n - above)
  return cut, ties, jnp.minimum(used, n)


def _whole(f, reduce, parts: list[jax.Array]) -> jax.Array:
  """A reduction of all parts; those of one shape go together first."""
  folded: dict[tuple[int, ...], jax.Array] = {}
  for part in parts:
    found = folded.get(part.shape)
    folded[part.shape] = part if found is None else f(found, part)
  # Pallas Triton reduces one axis.
  return functools.reduce(f, (reduce(x.reshape(-1)) for x in folded.values()))
