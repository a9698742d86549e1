"""token_votes by a full sort in float32: the definition, for tests."""

import jax
import jax.numpy as jnp

from kernels_pallas.keys import NEVER


def best_voted(q, k, low, high, n, *, kind, scale, weight):
  """See `kernels_pallas.token_votes.best_voted`."""
  found = votes(q, k, low, high, kind=kind, scale=scale, weight=weight)
  index = jnp.argsort(-found, axis=-1, stable=True)[..., :n]
  kept = jnp.take_along_axis(found, index, axis=-1) > -jnp.inf
  index = jnp.sort(jnp.where(kept, index, NEVER), axis=-1)
  return index.astype(jnp.int32), jnp.sum(kept, axis=-1, dtype=jnp.int32)


def votes(q, k, low, high, *, kind, scale, weight=None):
  """Votes [B R S]; -inf where a token is no candidate."""
  group = q.shape[2] // k.shape[1]
  keys = jnp.repeat(k.astype(jnp.float32), group, axis=1)
  scores = scale * jnp.einsum(
    'brnh,bnsh->brns',
    q.astype(jnp.float32),
    keys,
    precision=jax.lax.Precision.HIGHEST,
  )
  token = jnp.arange(k.shape[2])
  mask = (token >= low[..., None]) & (token < high[..., None])
  if kind == 'soft':
    scores = jax.nn.softmax(scores, axis=-1, where=mask[:, :, None])
  if weight is not None:
    scores = scores * weight[..., None]
  return jnp.where(mask, jnp.sum(scores, axis=2), -jnp.inf)
