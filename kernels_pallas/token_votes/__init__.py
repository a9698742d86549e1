"""The tokens with most votes of a few queries' heads, in their order.

  v_i = sum_n weight_n softmax_i(s_n)      'soft'
  v_i = sum_n weight_n s_ni                'top_k'

with s_ni the logit of query head n and token i; softmax and choice are over the
candidates of a query (TokenSelect, arXiv:2411.02886, section 5.1). A call costs
2 R n S H FLOPs and reads keys: all of a row's queries share one pass over them,
as far as registers allow. It is bound by bytes.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kernels_pallas import dispatch

__all__ = ['KINDS', 'best_voted']

KINDS = ('soft', 'top_k')


def best_voted(
  q: Float[Array, 'B R N H'],
  k: Float[Array, 'B K S H'],
  low: Int32[Array, 'B R'],
  high: Int32[Array, 'B R'],
  n: int,
  *,
  kind: str,
  scale: float,
  weight: Float[Array, 'B R N'] | None = None,
  implementation: str | None = None,
) -> tuple[Int32[Array, 'B R n'], Int32[Array, 'B R']]:
  """The n candidates with most votes of each query, ascending.

  Args:
    q: queries in the frame of the keys; head h reads kv head h // (N / K).
    k: keys.
    low: first candidate of each query.
    high: one past its last, at most S.
    n: tokens to choose, at most S.
    kind: of vote, 'soft' or 'top_k'.
    scale: of logits.
    weight: of each head's vote; None: all alike.
    implementation: 'reference', 'xla', 'gpu', or None.

  Returns:
    (indices, NEVER behind the last; how many there are). Of equal votes the
    earlier token wins.

  Raises:
    ValueError: an argument does not fit; the message names it.
  """
  if q.ndim != 4 or k.ndim != 4:
    raise ValueError(f'{q.shape=} must be [B R N H] and {k.shape=} [B K S H]')
  b, rows, heads, h = q.shape
  if (k.shape[0], k.shape[3]) != (b, h) or heads % k.shape[1]:
    raise ValueError(
      f'{k.shape=} must be [B K S H] with B = {b}, H = {h}, K dividing '
      f'N = {heads}'
    )
  for name, x, shape, dtype in (
    ('low', low, (b, rows), jnp.int32),
    ('high', high, (b, rows), jnp.int32),
    ('weight', weight, (b, rows, heads), jnp.float32),
  ):
    if x is not None and (x.shape != shape or x.dtype != dtype):
      raise ValueError(
        f'{name} is {x.dtype}{list(x.shape)}; it must be '
        f'{jnp.dtype(dtype)}{list(shape)}'
      )
  if not 0 < n <= k.shape[2]:
    raise ValueError(f'{n=} must be within 1 and S={k.shape[2]}')
  if kind not in KINDS:
    raise ValueError(f'{kind=} must be in {KINDS}')
  how = {'kind': kind, 'scale': float(scale), 'weight': weight}
  run = dispatch.choose(
    implementation, 'token_votes', 'best_voted', q, k, low, high, n, **how
  )
  return run(q, k, low, high, n, **how)
