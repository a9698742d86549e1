"""best_in_order by a full sort: the definition, for tests."""

import jax.numpy as jnp

from kernels_pallas.keys import NEVER


def best_in_order(x, n):
  """See `kernels_pallas.best_in_order.best_in_order`."""
  order = jnp.argsort(-x, axis=1, stable=True)[:, :n]
  kept = jnp.take_along_axis(x, order, axis=1) > -jnp.inf
  found = jnp.sort(jnp.where(kept, order, NEVER), axis=1)
  return found.astype(jnp.int32), jnp.sum(kept, axis=1, dtype=jnp.int32)
