"""From scores of key blocks to the sorted lists that attention reads.

Blocks of a row stand in a fixed order: forced, always, then by falling score,
equal scores (to 30 bits) by index. A row takes the shortest prefix of that
order that holds all of `forced` and `always` and reaches the threshold, but no
more than its limit (forced blocks alone may exceed it). Since the order does
not depend on the budget, a larger budget's set holds a smaller one's.

Bound by bytes: a row of scores is read once and its list is written.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas import dispatch
from kernels_pallas.block_choice.rules import Listed
from kernels_pallas.block_choice.xla import choose, share, to_list

__all__ = ['Listed', 'choose', 'choose_blocks', 'share', 'to_list']


def choose_blocks(
  score: Float[Array, '*R C'],
  *,
  reachable: Bool[Array, '*R C'],
  forced: Bool[Array, '*R C'],
  budget: Int32[Array, '*R 1'] | int,
  width: int,
  threshold: Float[Array, '*R 1'] | float | None = None,
  always: Bool[Array, '*R C'] | None = None,
  mass: Float[Array, '*R C'] | None = None,
  bounded: bool = True,
  implementation: str | None = None,
) -> Listed:
  """Lists of the best blocks of each row.

  Args:
    score: at least 0; a row's sum counts as its whole mass.
    reachable: blocks that may be chosen; broadcast to score's shape.
    forced: subset of `reachable`; broadcast.
    budget: most blocks of a row; broadcast.
    width: W, most blocks of any row.
    threshold: share of the mass, in (0, 1]; 1: every reachable block, those of
      no mass, too. None: the budget alone decides. Broadcast.
    always: chosen next after `forced`, whatever they score; broadcast.
    mass: what `captured` and `cut` measure; None: scores of what is reachable.
    bounded: whether the width may be below a budget; if not, `cut` is 0.
    implementation: 'xla', 'gpu', or None.
  """

  def full(x):
    return None if x is None else jnp.broadcast_to(x, score.shape)

  def one(x):
    return jnp.broadcast_to(x, (*score.shape[:-1], 1))

  given = {
    'reachable': full(reachable),
    'forced': full(forced),
    'budget': one(jnp.asarray(budget, jnp.int32)),
    'width': width,
    'threshold': None
    if threshold is None
    else one(jnp.asarray(threshold, jnp.float32)),
    'always': full(always),
    'mass': full(mass),
    'bounded': bounded,
  }
  run = dispatch.choose(
    implementation, 'block_choice', 'choose_blocks', score, **given
  )
  return run(score, **given)
