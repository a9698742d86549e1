"""Which pages of a pool are free.

The table is the one truth: a page's holders are the table entries that name it
(`holders`), and a page without one is free. `Vacancy` is a list of free pages
made from that, so that an append only moves a cursor.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

_FEW = 32  # flags whose prefix sums are windows


def holders(table: Int32[Array, '*n'], pages: int) -> Int32[Array, 'P']:
  """How many table entries name each page."""
  ids = table.reshape(-1)
  ids = jnp.where(ids < 0, pages, ids)
  return jnp.zeros((pages,), jnp.int32).at[ids].add(1, mode='drop')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vacancy:
  """The free pages of a pool, in the order in which they are handed out.

  Attributes:
    order: int32 [P] page ids; those from `taken` on are free.
    taken: int32 [1] cursor.
  """

  order: Int32[Array, 'P']
  taken: Int32[Array, '1']

  @classmethod
  def all_free(cls, pages: int, shards: int = 1) -> 'Vacancy':
    """Every page is free; `shards` pools of `pages`, each with local ids."""
    return cls(
      jnp.tile(jnp.arange(pages, dtype=jnp.int32), shards),
      jnp.zeros((shards,), jnp.int32),
    )

  @classmethod
  def without(cls, held: Int32[Array, 'P']) -> 'Vacancy':
    """The pages that nobody holds, in ascending order."""
    used = held > 0
    order = jnp.argsort(~used, stable=True).astype(jnp.int32)
    return cls(order, jnp.sum(used, dtype=jnp.int32, keepdims=True))

  def grant(self, wanted: Bool[Array, 'B *n']) -> Bool[Array, 'B']:
    """Which rows get all the pages they want, together.

    The modest come first (ties: lower rows), so that as many rows as possible
    go on and a row that wants nothing always does.
    """
    need = _per_row(wanted)
    row = jnp.arange(need.shape[0])
    before = (need < need[:, None]) | (
      (need == need[:, None]) & (row <= row[:, None])
    )
    ahead = jnp.sum(jnp.where(before, need, 0), axis=1)
    return ahead <= self.order.shape[0] - self.taken[0]

  def take(
    self, wanted: Bool[Array, 'B *n'], granted: Bool[Array, 'B']
  ) -> tuple[Int32[Array, 'B *n'], 'Vacancy']:
    """A page for every True of the rows that `grant` allows, -1 elsewhere."""
    rows = granted.reshape(-1, *[1] * (wanted.ndim - 1))
    flat = (wanted & rows).reshape(-1)
    ids = self.order.at[self.taken[0] + _before(flat)].get(mode='clip')
    ids = jnp.where(flat, ids, -1).reshape(wanted.shape)
    # Of the sums that `grant` made: one more sum would be one more launch.
    total = jnp.sum(jnp.where(granted, _per_row(wanted), 0), dtype=jnp.int32)
    return ids, dataclasses.replace(self, taken=self.taken + total)


def _before(flags: Bool[Array, 'n']) -> Int32[Array, 'n']:
  """How many flags before each are True.

  Windows, where there are few, or sums over triangles in two levels, which fuse
  with their neighbours: a cumulative sum is a library call of its own on GPUs,
  several launches in every layer of every decoded token.
  """
  n = flags.size
  if n <= _FEW:
    window = (n,), (1,), ((n - 1, 0),)
    flags = flags.astype(jnp.int32)
    return jax.lax.reduce_window(flags, 0, jax.lax.add, *window) - flags
  width = min(n, 128)
  rows = jnp.pad(flags, (0, -n % width)).reshape(-1, width)

  def earlier(size):
    return jnp.tril(jnp.ones((size, size), bool), -1)

  inside = jnp.sum(rows[:, None] & earlier(width), axis=2, dtype=jnp.int32)
  each = jnp.sum(rows, axis=1, dtype=jnp.int32)
  above = jnp.sum(jnp.where(earlier(each.size), each, 0), axis=1)
  return (above[:, None] + inside).reshape(-1)[:n]


def _per_row(wanted: Bool[Array, 'B *n']) -> Int32[Array, 'B']:
  axes = tuple(range(1, wanted.ndim))
  return jnp.sum(wanted, axis=axes, dtype=jnp.int32)
