"""page_choice in plain XLA: a product, a top-k and a sort, when due."""

import jax
import jax.numpy as jnp

from kernels_pallas.page_choice.scores import (
  ascending,
  forced_scores,
  kv_page_scores,
  scored_heads,
  when_due,
)


def refuse(function: str, *args, **kwargs) -> str | None:
  """XLA takes every call that the public function lets through."""
  del function, args, kwargs
  return None


def choose_pages(
  q, low, high, starts, newest, valid, *, n, sink, recent, page, group,
  loose, unscored, held, due
):  # fmt: skip
  """See `kernels_pallas.page_choice.choose_pages`."""
  kv, width = starts.shape[1:]
  heads = None
  if unscored is not None:
    heads = scored_heads(unscored, low.shape[1])
  own = starts if heads is None else starts[:, jnp.maximum(heads, 0)]

  def everything():
    used = own[:, :, :n] <= newest[:, None, None]
    return jnp.where(used, jnp.arange(n, dtype=jnp.int32), -1)

  def best():
    shape = {'width': width, 'kv_heads': kv}
    scores = kv_page_scores(
      q, low, high, valid, group=group, loose=loose, heads=heads, **shape
    )
    rule = {'sink': sink, 'recent': recent, 'page': page}
    scores = forced_scores(scores, own, newest, **rule)
    best, slots = jax.lax.top_k(scores, n)
    return ascending(slots, best > -jnp.inf, width)

  def choose():
    # Scores are idle where the lists have room for all pages.
    return jax.lax.cond(jnp.all(newest < n * page), everything, best)

  return when_due(choose, valid, kv_heads=kv, heads=heads, held=held, due=due)
