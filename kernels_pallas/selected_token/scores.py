"""What selection needs beside attention: scores, a vote, top-k. Plain XLA.

XLA reaches 2.6-2.9 TB/s on these on an H100, near the copy bandwidth.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.xla_tiles import dot


def page_scores(
  q: Float[Array, 'B T N H'],
  kmin: Float[Array, 'B K C H'],
  kmax: Float[Array, 'B K C H'],
) -> Float[Array, 'B T N C']:
  """Upper bounds of q . k over each page (Quest, arXiv:2406.10774, eq. 2).

    score = sum_h max(q_h kmin_h, q_h kmax_h) = relu(q) . kmax - relu(-q) . kmin

  Exact in real arithmetic; unscaled. 4 T N C H FLOPs; reads the bounds once.
  A page that was never written must be masked by the caller.
  """
  b, t, n, h = q.shape
  kv = kmin.shape[1]
  q = q.reshape(b, t, kv, n // kv, h)
  high = dot('btkgh,bkch->btkgc', jax.nn.relu(q), kmax)
  low = dot('btkgh,bkch->btkgc', jax.nn.relu(-q), kmin)
  return (high - low).reshape(b, t, n, -1)


def likely_page_scores(
  q: Float[Array, 'B T N H'],
  mean: Float[Array, 'B K C H'],
  deviation: Float[Array, 'B K C H'],
) -> Float[Array, 'B T N C']:
  """What the largest q . k of each page is likely to be; no bound.

    score = q . mean + 2 sqrt(sum_h (q_h deviation_h)^2)

  The best of some 16 draws of a normal variable with q . k's mean and, were
  channels independent, deviation. Channels that turn fast with the position
  fill their bounds in every page; here they count by their square. Unscaled,
  float32. 4 T N C H FLOPs.
  """
  b, t, n, h = q.shape
  kv = mean.shape[1]
  q = q.astype(jnp.float32).reshape(b, t, kv, n // kv, h)
  middle = dot('btkgh,bkch->btkgc', q, mean.astype(jnp.float32))
  square = jnp.square(deviation.astype(jnp.float32))
  spread = dot('btkgh,bkch->btkgc', jnp.square(q), square)
  return (middle + 2 * jnp.sqrt(spread)).reshape(b, t, n, -1)


def token_scores(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B K S H'],
  *,
  scale: float | None = None,
) -> Float[Array, 'B T N S']:
  """Scale * q . k for every key. 2 T N S H FLOPs; reads the keys once."""
  b, t, n, h = q.shape
  kv = k.shape[1]
  q = q.reshape(b, t, kv, n // kv, h)
  scores = dot('btkgh,bksh->btkgs', q, k).reshape(b, t, n, -1)
  return scores * (h**-0.5 if scale is None else scale)


def soft_vote(
  scores: Float[Array, 'B T N S'],
  visible: Bool[Array, 'B S'] | None = None,
) -> Float[Array, 'B T S']:
  """Sum over heads of each head's softmax (TokenSelect, arXiv:2411.02886).

  Each head has one vote, however large its logits are. Invisible keys get 0; a
  row that sees nothing gets 0 everywhere.
  """
  mask = True if visible is None else visible[:, None, None]
  top = jnp.max(scores, axis=-1, keepdims=True, where=mask, initial=-1e30)
  weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return jnp.sum(weights / jnp.where(total > 0, total, 1.0), axis=2)


def top_k(
  scores: Float[Array, '*R C'], k: int
) -> tuple[Float[Array, '*R k'], Int32[Array, '*R k']]:
  """The k largest scores of each row and their indices, best first.

  XLA's top-k: on an H200 18 us for 8 x 2048, k 64, and 44 us for 1 x 131072,
  k 2048 (experiments/results/kernels.jsonl).

  Raises:
    ValueError: k is above the row's length.
  """
  if not 0 < k <= scores.shape[-1]:
    raise ValueError(f'{k=} must be within 1 and {scores.shape[-1]}')
  return lax.top_k(scores, k)
