"""What block-selecting prefills share: store, select, attend, audit.

On P sequence shards of T tokens each, keys and values are all-gathered for the
attention, as in the dense prefill: a device receives

  2 (P - 1) B T K H E bytes a layer, E those of an element.

Selection does not wait for them: a selector gets this shard's queries and keys,
and, as a method says, moves what its scores need, or reads the gathered keys.

Selectors take a chunk of a prompt's queries (`q_start`). The engine reads a
prompt whole, so here a chunk is what one sequence shard holds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.block_sparse import block_sparse, dense_blocks
from lcx.methods import prompt_tail, shards
from lcx.methods.base import Context, Prefill, Rope, Trace
from lcx.methods.dense import dense_pairs
from lcx.policy import AS_MEASURED
from lcx.select.audit import listed_keys, sampled_mass
from lcx.select.block_rows import Selected


@dataclasses.dataclass(frozen=True)
class BlockPrefill(Prefill):
  """Prompt queries see the key blocks that `select` lists.

  The query blocks of a prompt are selected for together, so a list depends on
  all tokens of its query block (and, in vertical_slash, of the prompt); values
  of later tokens never reach an output.

  Attributes:
    width: most blocks of a list row; None: what keeps a layer's lists under
      256 MiB. What it cuts off is counted as `cut_mass`.
    dense_below: prompts of at most so many tokens are read densely: below the
      crossover, estimating costs more than it saves. In a batch with longer
      ones, their rows list everything. -1: a batch all of whose prompts are
      below the crossover that was measured on this device for these heads
      (lcx/policy.json) is read densely; never, where none was measured.
    tail: last tokens of a prompt that see everything (prompt_tail.py), beside
      what was selected for their blocks. 0, as published: none.
  """

  width: int | None = None
  dense_below: int = AS_MEASURED
  tail: int = 0

  @property
  def measured_as(self) -> str:
    """The selector's name in measured rows (experiments/selector_bench.py)."""
    return ''

  @property
  def listed_whole(self) -> int:
    """Rows of a batch with at most so many keys list everything."""
    return max(self.dense_below, 0)

  def at_full_budget(self, length: int) -> Self:
    """Lists wide enough for every block of `length` tokens, and full."""
    wide = -(-length // 128) + 3
    return dataclasses.replace(self, width=wide, **self.full_budget(length))

  def full_budget(self, length: int) -> dict[str, Any]:
    """The fields that make every list full up to `length` tokens."""
    raise NotImplementedError

  def at_tight_budget(self, length: int) -> Self:
    """Lists of the fewest blocks: sink, diagonal, and one to choose."""
    return dataclasses.replace(
      self, width=4, dense_below=0, **self.tight_budget(length)
    )

  def tight_budget(self, length: int) -> dict[str, Any]:
    """The fields that make lists sparse at `length` tokens."""
    del length
    return {'threshold': None, 'density': 0.25}

  def check(self, config, capacity: int) -> None:
    del config
    blocks = -(-capacity // 128)
    if self.width is not None and self.width < min(3, blocks):
      raise ValueError(
        f'prefill.width={self.width} must be at least 3: a row always lists '
        'the sink block and the blocks that its diagonal may cross'
      )
    if self.tail < 0:
      raise ValueError(f'prefill.tail={self.tail} must be at least 0')
    if self.dense_below < AS_MEASURED:
      raise ValueError(
        f'prefill.dense_below={self.dense_below} must be at least -1, which '
        'stands for what was measured'
      )

  def select(self, q, k, keys, *, q_start, ctx: Context) -> Selected:
    """Lists for this shard's queries.

    Args:
      q: [B T N H] rotated.
      k: [B K T H] rotated, of this shard.
      keys: [B K S H] the same of all shards; `k` itself where there is one.
      q_start: int32 [B] position of this shard's first query.
      ctx: the context.
    """
    raise NotImplementedError

  def attend(self, q, k, v, rope: Rope, cache, ctx: Context):
    batch, length, heads, _ = q.shape
    rotated = rope(k, ctx.positions)
    cache = shards.store(cache, k, rotated, v, ctx)
    pairs = dense_pairs(q, ctx)
    q = rope(q, ctx.positions)
    keys, values = shards.gather_sequence(rotated, v, ctx.axes)
    q_start = shards.first_query(length, batch, ctx.axes)
    where = {
      'q_start': q_start,
      'lengths': ctx.lengths,
      'sliding_window': ctx.sliding_window,
    }

    def dense():
      lists = dense_blocks(batch, heads, length)
      out, _ = block_sparse(q, keys, values, lists, **where)
      mass = whole_mass(q, ctx)
      return out, (pairs, mass, mass, 0 * mass) if ctx.trace else ()

    def sparse():
      local = jnp.swapaxes(rotated, 1, 2)
      selected = self.select(q, local, keys, q_start=q_start, ctx=ctx)
      out, lse = block_sparse(q, keys, values, selected.blocks, **where)
      again = None
      if self.tail:
        out, lse, again = prompt_tail.read_densely(
          out, lse, q, keys, values, self.tail, **where
        )
      if not ctx.trace:
        return out, ()
      seen = listed_keys(selected.blocks, **where)
      if again is not None:  # both readings of the tail are paid for
        seen = jnp.minimum(seen + heads * jnp.sum(again, axis=1), pairs)
      mass = sampled_mass(q, keys, lse, **where)
      estimated, cut = _over_queries(selected, where)
      return out, (seen, mass, estimated, cut)

    out, found = self.unless_short(
      dense, sparse, heads, keys.shape[1], keys, ctx
    )
    return out, cache, _trace(pairs, found)

  def unless_short[T](
    self,
    dense: Callable[[], T],
    sparse: Callable[[], T],
    heads: int,
    kv_heads: int,
    k: Float[Array, 'B K S H'],
    ctx: Context,
  ) -> T:
    """`dense()` where all prompts are as short as `dense_below`, or `sparse()`.

    Args:
      dense: reads everything.
      sparse: reads what is selected.
      heads: that are selected for, on this shard.
      kv_heads: that they read.
      k: keys of these and of other heads, of all sequence shards.
      ctx: the context.
    """
    up_to = self.dense_below
    if up_to == AS_MEASURED:
      up_to = shards.dense_up_to(
        'attention',
        self.measured_as,
        ctx.axes,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=k.shape[3],
        bits=8 * k.dtype.itemsize,
      )
    if not up_to:
      return sparse()
    if k.shape[2] <= up_to:  # no prompt in it is longer
      return dense()
    return jax.lax.cond(jnp.max(ctx.lengths) <= up_to, dense, sparse)


def whole_mass(q: Float[Array, 'B T N H'], ctx: Context) -> Float[Array, 'B']:
  """The captured mass of who sees everything: 1 a valid query and head."""
  return ctx.count.astype(jnp.float32) * q.shape[2]


def _trace(pairs, found) -> Trace | None:
  if not found:
    return None
  seen, mass, estimated, cut = found
  counters = {'estimated_mass': estimated, 'cut_mass': cut}
  return Trace(keys=seen, pairs=pairs, mass=mass, counters=counters)


def _over_queries(selected: Selected, where):
  """Shares of query blocks, summed over valid queries and heads: [B] each."""
  block = selected.blocks.block_q
  first = where['q_start'][:, None]
  first = first + jnp.arange(selected.captured.shape[2]) * block
  queries = jnp.clip(where['lengths'][:, None] - first, 0, block)
  return [
    jnp.sum(x * queries[:, None], axis=(1, 2))
    for x in (selected.captured, selected.cut)
  ]
