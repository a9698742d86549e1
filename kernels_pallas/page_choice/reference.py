"""page_choice by full sorts in float32: the definition, for tests."""

import jax.numpy as jnp


def choose_pages(
  q, low, high, starts, newest, valid, *, n, sink, recent, page, group,
  loose, unscored, held, due
):  # fmt: skip
  """See `kernels_pallas.page_choice.choose_pages`."""
  b, t, _, h = q.shape
  kv, width = starts.shape[1:]
  heads = jnp.arange(kv)
  if unscored is not None:
    (heads,) = jnp.nonzero(~unscored, size=low.shape[1], fill_value=-1)
  if held is None:
    held, due = jnp.full((b, kv, n), -1, jnp.int32), True
  q = q.astype(jnp.float32).reshape(b, t, kv, -1, h)
  chosen = jnp.full((b, kv, n), -1, jnp.int32)
  for row, head in enumerate(heads):
    at = q[:, :, head, :, None]  # [B T G 1 H]
    products = [
      at * x[:, None, None, row].astype(jnp.float32) for x in (low, high)
    ]
    score = jnp.maximum(*products).sum(axis=-1)  # [B T G C]
    if loose is not None:
      off = jnp.abs(at) * loose[:, None, None, row, None]
      score -= off.sum(axis=-1)
    score = score.max(axis=2) if group == 'max' else score.sum(axis=2)
    score = jnp.where(valid[..., None], score, -jnp.inf).max(axis=1)  # [B C]
    score = score.reshape(b, width, -1).max(axis=-1)
    own, last = starts[:, head], newest[:, None]
    forced = (own < sink) | (own + page > last - recent + 1)
    score = jnp.where(forced, jnp.inf, score)
    score = jnp.where(own <= last, score, -jnp.inf)
    best = jnp.argsort(-score, axis=-1, stable=True)[:, :n]
    kept = jnp.take_along_axis(score, best, axis=1) > -jnp.inf
    best = jnp.sort(jnp.where(kept, best, width), axis=-1)
    best = jnp.where(best < width, best, -1)
    chosen = jnp.where(head < 0, chosen, chosen.at[:, head].set(best))
  now = due & jnp.any(valid, axis=1)
  return jnp.where(now[:, None, None], chosen, held).astype(jnp.int32)
