"""What every method does alike: store, gather, merge over sequence shards.

Prompt tokens live where the prefill's layout put them. New tokens of decode
fill the prompt's last page, then live on the last sequence shard (as in APB and
Star Attention), or on all shards by turns, a page each.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.append_token import Joint
from kernels_pallas.page_choice.gpu import Scoring
from kernels_pallas.partial import Partial, merge_over
from lcx import policy
from lcx.methods.base import Axes, Context, Rope


def store(cache, k, rotated, v, ctx: Context):
  """Appends the prompt's keys of this shard, rotated or not as the cache wants.

  Args:
    cache: this layer's cache.
    k: [B T K H] unrotated keys.
    rotated: [B T K H] the same, rotated.
    v: [B T K H].
    ctx: its valid tokens must be a prefix of each row.
  """
  keys = rotated if cache.rotated else k
  return cache.append(keys, v, ctx.positions, ctx.count)


def append(cache, k, rotated, v, ctx: Context):
  """Appends decoded tokens, each on the one sequence shard it belongs to."""
  keys = rotated if cache.rotated else k
  if jax.lax.axis_size(ctx.axes.seq) == 1:
    return cache.append(keys, v, ctx.positions, ctx.count)
  # A shard's tokens of one call follow one another (`Engine` sees to it).
  here = belong_here(ctx)
  first = jnp.argmax(here, axis=1)
  count = jnp.sum(here, axis=1, dtype=jnp.int32)
  own = jax.vmap(lambda x, n: jnp.roll(x, -n, axis=0))
  return cache.append(
    own(keys, first), own(v, first), own(ctx.positions, first), count
  )


def append_rotated(q, k, v, rope: Rope, cache, ctx: Context):
  """Rotates a decode step's queries and keys and appends: (queries, cache).

  Args:
    q: [B T N H] unrotated queries.
    k: [B T K H] unrotated keys.
    v: [B T K H].
    rope: rotation.
    cache: of rotated keys.
    ctx: the context.
  """
  return append_scored(q, k, v, rope, cache, ctx, None)[:2]


def append_scored(
  q, k, v, rope: Rope, cache, ctx: Context, scoring: Scoring | None
):
  """`append_rotated`, and `scoring` in its launch: (queries, cache, scored).

  Scored is what `scoring` found, or None where the append is not one launch, or
  has no queries beside it.
  """
  rotated = rope(q, ctx.positions), rope(k, ctx.positions)
  takes = getattr(cache, 'takes_joint', None)
  alone = jax.lax.axis_size(ctx.axes.seq) == 1
  if takes is None or not alone or not cache.rotated or not takes(q, k, v):
    return rotated[0], append(cache, k, rotated[1], v, ctx), None
  joint = ctx.joint or Joint.of(*rotated, v)
  return cache.append_joint(joint, ctx.positions, ctx.count, scoring)


def belong_here(ctx: Context) -> Bool[Array, 'B T']:
  """Which new tokens live on this sequence shard."""
  size = jax.lax.axis_size(ctx.axes.seq)
  if size == 1:
    return ctx.valid
  tail = ctx.tail
  assert tail is not None, 'decode knows where new tokens go'
  until, holder = tail.until[:, None], jnp.int32(size - 1)
  if tail.turn is not None:
    turn = (ctx.positions - until) // tail.turn[:, None]
    holder = (tail.shard[:, None] + 1 + turn) % size
  holder = jnp.where(ctx.positions < until, tail.shard[:, None], holder)
  return ctx.valid & (holder == jax.lax.axis_index(ctx.axes.seq))


def gather_sequence(
  k: Float[Array, 'B T K H'], v: Float[Array, 'B T K H'], axes: Axes
) -> tuple[Float[Array, 'B K S H'], Float[Array, 'B K S H']]:
  """All shards' keys and values in cache layout, in the shards' order."""

  def gather(x):
    if jax.lax.axis_size(axes.seq) > 1:
      x = jax.lax.all_gather(x, axes.seq, axis=1, tiled=True)
    return jnp.swapaxes(x, 1, 2)

  return gather(k), gather(v)


def first_query(length: int, batch: int, axes: Axes) -> Int32[Array, 'B']:
  """Index of this shard's first token in the contiguous layout."""
  first = jax.lax.axis_index(axes.seq) * length
  return jnp.full((batch,), first, jnp.int32)


def seen_until(cache, ctx: Context) -> Int32[Array, 'B T']:
  """Query positions, cut to the last token that this shard holds.

  A shard's last page may be half full while later tokens live elsewhere; its
  unused slots must not become visible when positions pass them. One shard alone
  holds the tokens of all queries that count, so there is nothing to cut.
  """
  if jax.lax.axis_size(ctx.axes.seq) == 1:
    return ctx.positions
  return jnp.minimum(ctx.positions, cache.last_position()[:, None])


def window(n_kv_heads: int, sliding_window: int | None) -> dict[str, Any]:
  """The model's own sliding window as arguments of the decode kernels."""
  if sliding_window is None:
    return {}
  return {
    'sink': jnp.zeros((n_kv_heads,), jnp.int32),
    'window': jnp.full((n_kv_heads,), sliding_window, jnp.int32),
  }


def dense_up_to(
  op: str,
  method: str,
  axes: Axes,
  *,
  heads: int,
  kv_heads: int,
  head_dim: int,
  bits: int,
) -> int:
  """Tokens up to which `method` should stay dense here, as was measured.

  Args:
    op: as in `lcx.policy.Entry`, like the following.
    method: whose crossover.
    axes: devices that share one attention; entries are of as many.
    heads: of this shard.
    kv_heads: of this shard.
    head_dim: H.
    bits: of the cache or the keys.

  Returns:
    One less than the crossover; 0 where none was measured.
  """
  across = jax.lax.axis_size(axes.model)
  devices = across * jax.lax.axis_size(axes.seq)
  kind = jax.devices()[0].device_kind
  found = policy.load().crossover(
    op,
    method,
    device=kind if devices == 1 else f'{devices} x {kind}',
    heads=heads * across,
    kv_heads=kv_heads * across,
    head_dim=head_dim,
    bits=bits,
  )
  return (found or 1) - 1


def sees_all(
  crossover: int, op: str, method: str, q, cache, ctx: Context
) -> bool:
  """Whether a decode step attends to the whole of this cache.

  It does where the cache has room for at most `crossover` tokens: the capacity
  counts and not what a row holds, so that no step asks.

  Args:
    crossover: tokens; AS_MEASURED: those of `dense_up_to`.
    op: as in `lcx.policy.Entry`.
    method: whose crossover; '': of none that was measured.
    q: [B 1 N H], of this shard.
    cache: of this shard, in pages.
    ctx: of the step.
  """
  ids, pages = cache.page_ids(), cache.pages()
  if crossover == policy.AS_MEASURED:
    crossover = dense_up_to(
      op,
      method,
      ctx.axes,
      heads=q.shape[2],
      kv_heads=ids.shape[1],
      head_dim=q.shape[3],
      bits=pages.bits,
    )
  tokens = ids.shape[2] * pages.page
  return tokens * jax.lax.axis_size(ctx.axes.seq) <= crossover


def part_dtype(q: Float[Array, 'B T N H'], axes: Axes):
  """Of a shard's output: the queries' where it is all, else float32."""
  return q.dtype if jax.lax.axis_size(axes.seq) == 1 else jnp.float32


def merged(part: Partial, axes: Axes) -> Float[Array, 'B T N H']:
  """The output over all sequence shards."""
  if jax.lax.axis_size(axes.seq) > 1:
    part = merge_over(part, axes.seq)
  return part.out
