"""Attention over a set of keys, and the exact merge of disjoint sets.

Attention of a query over any set of keys is a `Partial(out, lse)`. Two
partials over disjoint sets merge exactly (the log-sum-exp merge of
FlashAttention's split-K form, arXiv:2205.14135, section 3.1):

  lse = logsumexp_i lse_i          out = sum_i exp(lse_i - lse) * out_i

The empty set is the neutral element: out = 0, lse = -inf.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Partial(NamedTuple):
  """Attention of queries over one set of keys.

  Attributes:
    out: [... H] softmax-weighted values, normalised over this set alone.
    lse: [...] float32, natural logarithm of the sum of exp(scores).
  """

  out: Float[Array, '*R H']
  lse: Float[Array, '*R']


def empty(out_shape: tuple[int, ...], dtype=jnp.float32) -> Partial:
  """The partial over no key at all: out 0, lse -inf."""
  return Partial(
    jnp.zeros(out_shape, dtype),
    jnp.full(out_shape[:-1], -jnp.inf, jnp.float32),
  )


def merge(*parts: Partial) -> Partial:
  """Merges partials over disjoint sets of keys, in float32.

  Args:
    *parts: at least one; all of one shape.

  Returns:
    The partial over the union. `out` keeps the first part's dtype. A row that
    is empty in every part stays out 0, lse -inf.
  """
  if len(parts) == 1:
    return parts[0]
  return merge_axis(
    Partial(
      jnp.stack([p.out.astype(jnp.float32) for p in parts]),
      jnp.stack([p.lse for p in parts]),
    ),
    axis=0,
    dtype=parts[0].out.dtype,
  )


def merge_axis(part: Partial, axis: int, dtype=None) -> Partial:
  """Merges the partials stacked along one axis of `lse` (and of `out`)."""
  if axis < 0:
    axis += part.lse.ndim
  top = jnp.max(part.lse, axis=axis, keepdims=True)
  # All parts empty: subtract 0 instead of -inf, so that no NaN is born.
  top = jnp.where(jnp.isfinite(top), top, 0.0)
  weight = jnp.exp(part.lse - top)
  total = jnp.sum(weight, axis=axis)
  out = jnp.sum(part.out.astype(jnp.float32) * weight[..., None], axis=axis)
  out = out / jnp.where(total > 0, total, 1.0)[..., None]
  lse = jnp.log(total) + jnp.squeeze(top, axis)
  return Partial(out.astype(dtype or part.out.dtype), lse)


def merge_over(part: Partial, axis_name: str | tuple[str, ...]) -> Partial:
  """Merges the partials that the shards of a mesh axis hold.

  One all-gather of (out, lse), as in APB's Algorithm 3 (arXiv:2502.12085).
  """
  gathered = jax.tree.map(
    lambda x: jax.lax.all_gather(x.astype(jnp.float32), axis_name), part
  )
  return merge_axis(gathered, axis=0, dtype=part.out.dtype)
