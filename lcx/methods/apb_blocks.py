"""Where a document's tokens live on APB's hosts.

Each row's document is cut by its own length, as l_b = l_d / H of
arXiv:2502.12085 (section 3.3) has it, so that an answer does not depend on the
rows beside it. Shapes follow the padded room of the batch: what a host has more
than its row's share is padding.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

from lcx.methods.base import Layout, Prompt

Order = Literal['contiguous', 'zigzag']
EVERY_TOKEN = -1  # passing: all of a block
# Blocks begin at its multiples: pages of a cache are then the same however many
# hosts a device plays, and positions in a page count on, in zigzag order, too.
PAGE = 64

Array = Any  # of NumPy or JAX: rows are cut on the host and in programs


class Widths(NamedTuple):
  """Shapes that a padded room gives.

  Attributes:
    block: document tokens a host has room for.
    anchor: tokens an anchor has room for.
    rows: anchor rows that a host computes.
    passing: keys a host has room to pass on, a kv head.
  """

  block: int
  anchor: int
  rows: int
  passing: int


def check_order(order: str) -> None:
  """Refuses an unknown order of hosts."""
  if order not in get_args(Order):
    raise ValueError(f'order={order!r} must be one of {get_args(Order)}')


def cut(length: Array, hosts: int, xp: Any = np) -> tuple[Array, Array]:
  """Cuts documents into nearly equal blocks of whole pages.

  Args:
    length: int [...] tokens of a row's document.
    hosts: H.
    xp: numpy, or jax.numpy.

  Returns:
    (first token, number of tokens), int [... H] of each host's block. Blocks
    differ by a page at most, but for what the last page lacks; the first one is
    the longest.
  """
  length = xp.asarray(length)[..., None]
  pages = -(-length // PAGE)
  each, more = pages // hosts, pages % hosts
  host = xp.arange(hosts + 1)
  edge = xp.minimum((host * each + xp.minimum(host, more)) * PAGE, length)
  return edge[..., :-1], edge[..., 1:] - edge[..., :-1]


def budgets(
  block: Array,
  hosts: int,
  anchor: int | None,
  passing: int | None,
  shared_anchor: bool,
  xp: Any = np,
) -> tuple[Array, Array]:
  """(anchor, passing) tokens of rows whose longest block is `block`.

  Of prompts too short for the numbers asked for, an anchor is cut to the block,
  and what is passed on to what a block has beside an anchor.

  Args:
    block: int [...].
    hosts: H.
    anchor: as `ApbPrefill.anchor`.
    passing: as `ApbPrefill.passing`.
    shared_anchor: whether anchors are multiples of `hosts`.
    xp: numpy, or jax.numpy.
  """
  if hosts == 1:  # nobody to pass to, nobody who lacks the start
    return 0 * block, 0 * block
  start = block // 4 if anchor is None else xp.minimum(anchor, block)
  if passing == EVERY_TOKEN:
    passed = block
  else:
    asked = block // 8 if passing is None else passing
    passed = xp.minimum(asked, block - start)
  return (start - start % hosts if shared_anchor else start), passed


def hosts_in_order(hosts: int, order: Order, shards: int) -> np.ndarray:
  """[shards H/shards] which hosts a device plays."""
  index = np.arange(hosts)
  if order == 'contiguous' or hosts == shards:
    return index.reshape(shards, -1)
  if hosts % (2 * shards):
    raise ValueError(
      f"order='zigzag' needs hosts={hosts} to be a multiple of twice "
      f'the mesh axis seq={shards}'
    )
  chunks = index.reshape(2 * shards, -1)
  return np.concatenate([chunks[:shards], chunks[: shards - 1 : -1]], axis=1)


def laid_out(
  prompt: Prompt,
  question: int | None,
  anchor: int,
  embedded: bool,
  widths: Widths,
  order: np.ndarray,
) -> Layout:
  """One row as [anchor rows | block] of each host, in the devices' order.

  Args:
    prompt: the request.
    question: index of the question that is read with it; None: none.
    anchor: tokens of this row's anchor, the last of their `widths.anchor`.
    embedded: whether the question stands in the anchor.
    widths: of the padded room.
    order: [shards H/shards] hosts that devices play.
  """
  hosts = order.size
  document, asked = prompt.whole(None), prompt.question(question)
  start, size = (x[:, None] for x in cut(len(document), hosts))
  index = start + np.arange(widths.block)
  local = np.where(index < start + size, index, -1)
  copies = _anchor(prompt, len(asked) if embedded else 0, len(asked), anchor)
  before = widths.anchor - anchor
  ahead = np.pad(copies, (before, 0), constant_values=-1)
  places = np.maximum(np.arange(widths.anchor) - before, 0)
  if widths.rows < widths.anchor:  # spread over the hosts
    ahead, places = (x.reshape(hosts, widths.rows) for x in (ahead, places))
  else:
    ahead, places = (np.tile(x, (hosts, 1)) for x in (ahead, places))
  token = np.concatenate([ahead, local], axis=1)
  source = np.concatenate([np.where(ahead < 0, -1, -2 - ahead), local], axis=1)
  positions = np.concatenate([places, index], axis=1)
  whole = np.concatenate([document, asked])
  by_host = order.reshape(-1)

  def flat(x, dtype=np.int32):
    return x[by_host].reshape(-1).astype(dtype)

  tokens = np.where(token < 0, 0, whole[np.maximum(token, 0)])
  return Layout(
    flat(tokens), flat(positions), flat(source), flat(token >= 0, bool)
  )


def _anchor(
  prompt: Prompt, embedded: int, question: int, anchor: int
) -> np.ndarray:
  """Indices [anchor] into document + question: system, question, start.

  Args:
    prompt: the request.
    embedded: tokens of the question to stand in the anchor, if they fit.
    question: tokens of the question.
    anchor: tokens; at most the document's.
  """
  embedded = min(embedded, anchor // 2)  # of a long question, its last tokens
  end = len(prompt.system) + len(prompt.context) + question
  system = min(len(prompt.system), anchor - embedded)
  return np.concatenate(
    [
      np.arange(system),
      np.arange(end - embedded, end),
      np.arange(system, anchor - embedded),
    ]
  )


def intervals(
  host: Array, passed_on: Array, filled: Array, widths: Widths
) -> tuple[Array, Array, Array]:
  """What each of [anchor rows | block] sees.

  Args:
    host: int32 [E].
    passed_on: int32 [E] keys of earlier hosts that came to it.
    filled: int32 [E] tokens of the row's anchor: the last of `widths.anchor`.
    widths: of the padded room.

  Returns:
    Keys passed on, first and last + 1 of the keys in [anchor | local], each
    int32 [E rows+block].
  """
  block, anchor, rows, _ = widths
  base = host * rows if rows < anchor else jnp.zeros_like(host)
  place = base[:, None] + jnp.arange(rows)
  empty = anchor - filled
  start = jnp.broadcast_to(empty[:, None], place.shape)
  # The first host's block has what its anchor has.
  local = jnp.where(host == 0, anchor, empty)[:, None]
  wide = (len(host), block)
  found = (
    (jnp.zeros_like(place), jnp.broadcast_to(passed_on[:, None], wide)),
    (start, jnp.broadcast_to(local, wide)),
    (
      jnp.maximum(place + 1, start),  # of padding: nothing
      jnp.broadcast_to(anchor + 1 + jnp.arange(block), wide),
    ),
  )
  more, low, high = (jnp.concatenate(x, 1).astype(jnp.int32) for x in found)
  return more, low, high


def follow(slot: Array, counts: Array, first: Array) -> Array:
  """Where the tokens of several runs lie, as if the runs followed one another.

  Args:
    slot: int32 [E S] number of a token, from 0.
    counts: int32 [E R] tokens of each run.
    first: int32 [E R] index of each run's first token.

  Returns:
    int32 [E S] its index; past the last run, some index.
  """
  end = jnp.cumsum(counts, axis=1)
  run = jnp.sum(slot[:, :, None] >= end[:, None], axis=2)
  run = jnp.minimum(run, counts.shape[1] - 1)
  return slot + jnp.take_along_axis(first - (end - counts), run, axis=1)
