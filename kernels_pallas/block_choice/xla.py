"""block_choice in plain XLA: a search over whole rows, then prefix sums.

`choose` does not sort. It finds, bit by bit, the score of the last block that
is taken: 15 passes of two bits over rows that lie in cache, deterministic, any
width; then a prefix sum puts the chosen ids in ascending order.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.block_choice.rules import ALWAYS, Listed


def refuse(function: str, *args, **kwargs) -> str | None:
  """XLA takes every call that the public function lets through."""
  del function, args, kwargs
  return None


def choose_blocks(
  score, *, reachable, forced, budget, width, threshold, always, mass, bounded
):  # fmt: skip
  """See `kernels_pallas.block_choice.choose_blocks`."""
  rule = {
    'reachable': reachable,
    'forced': forced,
    'threshold': threshold,
    'always': always,
  }
  chosen = choose(score, limit=jnp.minimum(budget, width), **rule)
  mass = jnp.where(reachable, score, 0.0) if mass is None else mass
  captured = share(mass, chosen)
  cut = jnp.zeros_like(captured)
  if bounded:
    whole = share(mass, choose(score, limit=budget, **rule))
    cut = jnp.maximum(whole - captured, 0.0)
  return Listed(*to_list(chosen, width), captured, cut)


def choose(
  score: Float[Array, '*R C'],
  *,
  reachable: Bool[Array, '*R C'],
  forced: Bool[Array, '*R C'],
  limit: Int32[Array, '*R 1'] | int,
  threshold: Float[Array, '*R 1'] | float | None = None,
  always: Bool[Array, '*R C'] | None = None,
) -> Bool[Array, '*R C']:
  """The best blocks of each row, forced ones first.

  Blocks stand in a fixed order: forced, always, then by falling score, equal
  scores (to 30 bits) by index. A row takes the shortest prefix of that order
  that holds all of `forced` and `always` and reaches the threshold, but no more
  than `limit` (forced blocks alone may exceed it). Since the order does not
  depend on the budget, a larger budget's set holds a smaller one's.

  Args:
    score: at least 0; a row's sum counts as its whole mass.
    reachable: blocks that may be chosen.
    forced: subset of `reachable`.
    limit: most blocks of a row.
    threshold: share of the mass, in (0, 1]; 1: every reachable block, those of
      no mass, too. None: the limit alone decides.
    always: chosen next after `forced`, whatever they score.
  """
  score = jnp.where(reachable, score, 0.0).astype(jnp.float32)
  free = reachable & ~forced
  bits = lax.bitcast_convert_type(score, jnp.int32) >> 1
  key = jnp.where(free, bits, -1)
  if always is not None:
    key = jnp.where(always & free, ALWAYS, key)
  n_forced = jnp.sum(forced, axis=-1, keepdims=True, dtype=jnp.int32)
  limit = jnp.maximum(jnp.asarray(limit, jnp.int32) - n_forced, 0)
  held = jnp.sum(jnp.where(forced, score, 0.0), axis=-1, keepdims=True)

  def mass(mask):
    return held + jnp.sum(jnp.where(mask, score, 0.0), axis=-1, keepdims=True)

  def count(mask):
    return jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.int32)

  if threshold is None:
    goal = jnp.float32(jnp.inf)
  else:
    goal = jnp.asarray(threshold, jnp.float32)
    goal = jnp.where(goal < 1, goal * mass(key >= 0), jnp.inf)

  def enough(t):
    """Whether the blocks of key >= t fill the budget: falls as t grows."""
    above = key >= t
    full = count(above) >= limit
    if threshold is None:
      return full
    return ((mass(above) >= goal) & (t <= ALWAYS)) | full

  digits = jnp.arange(1, 4, dtype=jnp.int32).reshape(3, *(1,) * score.ndim)

  def two_bits(i, last):
    shift = 28 - 2 * i
    step = enough(last + (digits << shift))
    return last + (jnp.sum(step, axis=0, dtype=jnp.int32) << shift)

  # A loop, not its 15 copies: they compile four times as long.
  last = jnp.zeros((*score.shape[:-1], 1), jnp.int32)
  last = lax.fori_loop(0, 15, two_bits, last)
  above = key > last
  tie = key == last
  # Of the blocks that tie with the last one, the first few by index.
  value = lax.bitcast_convert_type(last << 1, jnp.float32)
  some = (last < ALWAYS) & (value > 0) & jnp.isfinite(goal)
  lacking = jnp.ceil((goal - mass(above)) / jnp.where(some, value, 1.0))
  want = jnp.where(some, jnp.clip(lacking, 1, 2**30), 2**30).astype(jnp.int32)
  want = jnp.minimum(want, limit - count(above))
  rank = jnp.cumsum(tie, axis=-1, dtype=jnp.int32)
  return forced | above | (tie & (rank <= want))


def to_list(
  chosen: Bool[Array, '*R C'], width: int
) -> tuple[Int32[Array, '*R W'], Int32[Array, '*R']]:
  """Indices of the chosen, ascending, and how many; unused entries are 0.

  More than `width` chosen: the first `width`, which `choose` must prevent.
  """
  columns = chosen.shape[-1]
  flat = chosen.reshape(-1, columns)
  rows = flat.shape[0]
  seat = jnp.cumsum(flat, axis=-1, dtype=jnp.int32) - 1
  row = jnp.arange(rows, dtype=jnp.int32)[:, None]
  column = jnp.arange(columns, dtype=jnp.int32)
  # Each dropped entry has a seat of its own, out of bounds: seats are unique.
  seat = jnp.where(
    flat & (seat < width),
    row * width + seat,
    rows * width + row * columns + column,
  )
  ids = jnp.zeros((rows * width,), jnp.int32)
  ids = ids.at[seat].set(
    jnp.broadcast_to(column, flat.shape), mode='drop', unique_indices=True
  )
  count = jnp.minimum(jnp.sum(flat, axis=-1, dtype=jnp.int32), width)
  return (
    ids.reshape(*chosen.shape[:-1], width),
    count.reshape(chosen.shape[:-1]),
  )


def share(
  mass: Float[Array, '*R C'], chosen: Bool[Array, '*R C']
) -> Float[Array, '*R']:
  """Part of a row's mass that the chosen blocks hold; 0 of nothing."""
  total = jnp.sum(mass, axis=-1)
  part = jnp.sum(jnp.where(chosen, mass, 0.0), axis=-1)
  return part / jnp.where(total > 0, total, 1.0)
