"""token_votes in plain XLA: logits in memory, two passes, and a top-k."""

import jax
import jax.numpy as jnp

from kernels_pallas.best_in_order import best_in_order
from kernels_pallas.selected_token import token_scores


def refuse(function: str, *args, **kwargs) -> str | None:
  """XLA takes every call that the public function lets through."""
  del function, args, kwargs
  return None


def best_voted(q, k, low, high, n, *, kind, scale, weight):
  """See `kernels_pallas.token_votes.best_voted`."""
  scores = token_scores(q, k, scale=scale)
  token = jnp.arange(k.shape[2], dtype=jnp.int32)
  mask = (token >= low[..., None]) & (token < high[..., None])
  if kind == 'soft':
    inside = jnp.where(mask[:, :, None], scores, -jnp.inf)
    # Finite where there is no candidate.
    top = jnp.maximum(jnp.max(inside, axis=-1, keepdims=True), -1e30)
    total = jnp.sum(jnp.exp(inside - top), axis=-1, keepdims=True)
    scores = jnp.exp(jnp.minimum(scores - top - jnp.log(total), 0.0))
  if weight is not None:
    scores = scores * weight[..., None]
  votes = jnp.where(mask, jnp.sum(scores, axis=2), -jnp.inf)
  rows = votes.shape[:2]
  index, count = best_in_order(votes.reshape(-1, votes.shape[2]), n)
  return jax.tree.map(lambda x: x.reshape(*rows, *x.shape[1:]), (index, count))
