"""Attention over a set of keys, and the exact merge of disjoint sets.

Attention of a query over any set of keys is a `Partial(out, lse)`. Two
partials over disjoint sets merge exactly (the log-sum-exp merge of
FlashAttention's split-K form, arXiv:2205.14135, section 3.1):

  lse = logsumexp_i lse_i          out = sum_i exp(lse_i - lse) * out_i

The empty set is the neutral element: out = 0, lse = -inf.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_FEW = 32  # partials whose merge is written out


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
  top = _finite(functools.reduce(jnp.maximum, (p.lse for p in parts)))
  weights = [jnp.exp(p.lse - top) for p in parts]
  total = sum(weights)
  out = sum(
    p.out.astype(jnp.float32) * w[..., None]
    for p, w in zip(parts, weights, strict=True)
  )
  return _normalised(out, total, top, parts[0].out.dtype)


def merge_axis(part: Partial, axis: int, dtype=None) -> Partial:
  """Merges the partials stacked along one axis of `lse` (and of `out`)."""
  if axis < 0:
    axis += part.lse.ndim
  dtype = dtype or part.out.dtype
  part = Partial(part.out.astype(jnp.float32), part.lse)
  n = part.lse.shape[axis]
  if n <= _FEW:
    # As sums of slices: of a reduction over so few elements XLA makes three
    # kernels.
    slices = (
      Partial(*(jax.lax.index_in_dim(x, i, axis, False) for x in part))
      for i in range(n)
    )
    merged = merge(*slices)
    return Partial(merged.out.astype(dtype), merged.lse)
  top = _finite(jnp.max(part.lse, axis=axis))
  weight = jnp.exp(part.lse - jnp.expand_dims(top, axis))
  total = jnp.sum(weight, axis=axis)
  out = jnp.sum(part.out * weight[..., None], axis=axis)
  return _normalised(out, total, top, dtype)


def _finite(top):
  """All parts empty: subtract 0 instead of -inf, so that no NaN is born."""
  return jnp.where(jnp.isfinite(top), top, 0.0)


def _normalised(out, total, top, dtype) -> Partial:
  out = out / jnp.where(total > 0, total, 1.0)[..., None]
  return Partial(out.astype(dtype), jnp.log(total) + top)


def merge_over(part: Partial, axis_name: str | tuple[str, ...]) -> Partial:
  """Merges the partials that the shards of a mesh axis hold.

  One all-gather of (out, lse), as in APB's Algorithm 3 (arXiv:2502.12085).
  """
  gathered = jax.tree.map(
    lambda x: jax.lax.all_gather(x.astype(jnp.float32), axis_name), part
  )
  return merge_axis(gathered, axis=0, dtype=part.out.dtype)
