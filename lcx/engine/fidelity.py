"""What a decode step sees of a prompt: softmax mass captured, needles found.

Attention is linear in the values. With values that are 1 at chosen tokens and 0
elsewhere, a method's output is the weight that it gives these tokens, whatever
it selects and however. It divides by the softmax mass that it saw, so the ratio
of a seen token's weight under dense attention to that under the method is this
mass. Tokens are taken in blocks, of which some may be seen in part: the least
ratio is the mass where one block that carries weight is seen whole, and an
upper bound elsewhere.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from lcx.cache import CacheShape
from lcx.engine.plan import Plan
from lcx.methods.base import Tail
from lcx.models.transformer import attention_inputs, make_rope


class Fidelity(NamedTuple):
  """How much of dense attention a decode step keeps, layer by layer.

  Attributes:
    mass: share of the softmax mass that was seen, mean over query heads (or an
      upper bound of it, see above).
    recall: of dense attention's weight on the marked tokens, the share that
      was seen; heads count by that weight; 1 where there is none.
  """

  mass: Float[Array, 'L B']
  recall: Float[Array, 'L B']


def weights_of(
  plan: Plan,
  layer_weights: Any,
  x: Float[Array, 'B T D'],
  lengths: Int32[Array, 'B'],
  marked: Bool[Array, 'B T'],
  layer: Int32[Array, ''],
) -> Float[Array, 'B N H']:
  """Weights of each row's last token: marked tokens, itself, blocks of tokens.

  The tokens before it are the prompt, which the method's prefill stores; its
  decode reads them. One device.

  Args:
    plan: of the method.
    layer_weights: of one layer.
    x: what enters the layer.
    lengths: tokens of each row; the rest of T is padding.
    marked: the tokens to look for.
    layer: its index.
  """
  config, method, rope = plan.config, plan.method, make_rope(plan.config)
  batch, room, _ = x.shape
  index = jnp.broadcast_to(jnp.arange(room, dtype=jnp.int32), (batch, room))
  last = lengths - 1
  own = index == last[:, None]
  q, k, _ = attention_inputs(layer_weights, x, config)
  n_blocks = config.head_dim - 2
  size = 1 << (-(-room // n_blocks) - 1).bit_length()
  blocks = index[..., None] // size == jnp.arange(n_blocks)
  v = jnp.concatenate([marked[..., None], own[..., None], blocks], axis=2)
  v = jnp.broadcast_to(v.astype(k.dtype)[:, :, None], k.shape)
  shape = CacheShape(
    batch, config.n_kv_heads, config.head_dim, room + 64, config.dtype
  )

  def attend(q, k, v):
    key = jax.random.key(0)
    seen = index < last[:, None]
    ctx = plan.context(
      positions=index,
      source=jnp.where(seen, index, -1),
      valid=seen,
      lengths=last,
      layer=layer,
      key=key,
      room=room,
    )
    cache, state = method.cache.init(shape), method.decode.init_state(shape)
    _, cache, _ = method.prefill.attend(q, k, v, rope, cache, ctx)
    state = method.decode.observe(q, k, v, rope, state, ctx)
    cache = method.prefill.finish(cache)
    state = method.decode.start(cache, state)
    at = last[:, None]
    ctx = plan.context(
      positions=at,
      source=at,
      valid=at >= 0,
      lengths=lengths,
      tail=Tail(jnp.zeros_like(last), last),
      layer=layer,
      key=key,
    )
    q, k, v = (
      jnp.take_along_axis(a, at[..., None, None], axis=1) for a in (q, k, v)
    )
    return method.decode.attend(q, k, v, rope, cache, state, ctx)[0]

  spec = jax.sharding.PartitionSpec()
  out = plan.sharded(attend, (spec,) * 3, spec)(q, k, v)
  return out[:, 0].astype(jnp.float32)


def compare(
  method: Float[Array, 'L B N H'], dense: Float[Array, 'L B N H']
) -> Fidelity:
  """Fidelity from the weights of a method and of dense attention."""
  # A weight of 1e-6 is still exact to six digits in float32.
  seen = method[..., 1:] > 1e-6
  share = jnp.where(seen, dense[..., 1:] / method[..., 1:], jnp.inf)
  share = jnp.clip(jnp.min(share, axis=-1), 0.0, 1.0)
  found = jnp.sum(method[..., 0] * share, axis=-1)
  there = jnp.sum(dense[..., 0], axis=-1)
  recall = jnp.where(there > 1e-9, found / jnp.maximum(there, 1e-9), 1.0)
  return Fidelity(jnp.mean(share, axis=-1), jnp.minimum(recall, 1.0))
