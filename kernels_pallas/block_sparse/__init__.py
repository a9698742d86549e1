"""Prompt queries over a list of key blocks per (query head, query block)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kernels_pallas.partial import Partial

EVERYTHING = 2**30  # a window that holds every key: dense causal attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockList:
  """Which keys a tile of query rows may see, beside causality and lengths.

  The query at position p of head n, in query block i, sees key s iff
    s <= p  and  s < lengths[b]  and
    (s < sink[n]  or  s > p - window[n]  or  s // block_k in ids[b, n, i])
  A listed block is visible whole, but for the causal edge. The three sets may
  overlap; a key counts once.

  Attributes:
    ids: [B N Tb W] int32, the first `count` of a row sorted ascending, unique.
    count: [B N Tb] int32, how many ids of a row are used. 0 <= count <= W.
    sink: [N] int32, tokens at the start that every query of head n sees.
    window: [N] int32, last tokens that a query sees, itself included; 0: none;
      EVERYTHING: dense causal.
    block_q: query rows a list row stands for (static).
    block_k: keys a block holds (static).
  """

  ids: Int32[Array, 'B N Tb W']
  count: Int32[Array, 'B N Tb']
  sink: Int32[Array, 'N']
  window: Int32[Array, 'N']
  block_q: int = dataclasses.field(default=128, metadata={'static': True})
  block_k: int = dataclasses.field(default=128, metadata={'static': True})
