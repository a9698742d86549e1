"""One decoded token a row into a cache: everything that an append does.

On a GPU a decode step is a chain of small kernels, each of which costs time
however little it does: cursor, page table, page grant, keys, values and
statistics of one token are a dozen of them. `gpu.py` does all of it in one
launch, in place, which can score pages for the token's query meanwhile
(`kernels_pallas.page_choice`). It has no twin here: elsewhere, and for several
tokens, the caches' own `append` says the same in plain array operations
(lcx/cache), against which it is tested.
"""

import jax

from kernels_pallas import dispatch
from kernels_pallas.append_token import gpu
from kernels_pallas.append_token.gpu import Cursors, Heads, Joint, Rules

__all__ = [
  'MAX_QUERIES',
  'MAX_TILE',
  'Cursors',
  'Heads',
  'Joint',
  'Rules',
  'gpu',
  'serves',
  'serves_joint',
]

MAX_TILE = 64 * 128  # elements of all rows' keys: they are held in registers
MAX_QUERIES = 2 * MAX_TILE  # elements of queries that one program may copy


def serves(rows: int, head_dim: int, axis: str | None = None) -> bool:
  """Whether `gpu.py` can append one token on the default device.

  Args:
    rows: of the batch, times kv heads.
    head_dim: channels of a key.
    axis: mesh axis over which shards must agree about the append.
  """
  if not dispatch.prefers('gpu'):
    return False
  shared = axis is not None and jax.lax.axis_size(axis) > 1
  return not shared and rows * head_dim <= MAX_TILE


def serves_joint(q, k, axis: str | None = None) -> bool:
  """Whether `gpu.py` can take a token's queries, keys and values together.

  Args:
    q: [B T N H] queries.
    k: [B T K H] keys.
    axis: as in `serves`.
  """
  rows, tokens, heads, dim = k.shape
  fits = tokens == 1 and q.dtype == k.dtype and q.size <= MAX_QUERIES
  return fits and serves(rows * heads, dim, axis)
