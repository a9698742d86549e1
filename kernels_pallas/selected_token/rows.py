"""A contiguous cache as lists of pages, for implementations that read lists."""

import jax.numpy as jnp
from jaxtyping import Array, Int32

from kernels_pallas.keys import Pages


def kv_heads(pages: Pages, starts: Int32[Array, 'B W']) -> int:
  """K, of which each has W pages a row."""
  return pages.k.shape[0] // starts.size


def row_lists(
  pages: Pages, starts: Int32[Array, 'B W'], used: Int32[Array, 'B']
) -> tuple[Int32[Array, 'B K W'], Int32[Array, 'B K W']]:
  """(ids, starts) of `attend_pages`; -1 where a page holds no token."""
  b, width = starts.shape
  shape = b, kv_heads(pages, starts), width
  ids = jnp.arange(pages.k.shape[0], dtype=jnp.int32).reshape(shape)
  first = jnp.arange(width, dtype=jnp.int32) * pages.page
  ids = jnp.where(first < used[:, None, None], ids, -1)
  return ids, jnp.broadcast_to(starts[:, None], shape)
