"""The launches of a step, one after the other."""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int8, Int32

from kernels_pallas.best_in_order import gpu as best_in_order
from kernels_pallas.selection_cache.lists import Counts, gathered, listed
from kernels_pallas.selection_cache.turn import turn
from kernels_pallas.selection_cache.votes import Source, logits, votes


@dataclasses.dataclass(frozen=True)
class Rules:
  """Static numbers of a step.

  Attributes:
    kind: of vote, 'soft' or 'top_k'.
    k: tokens to choose.
    scale: of the logits that vote.
    threshold: cosine below which a row selects.
    reuse: tokens that a list serves at most.
    sink: first tokens, always listed.
    window: last tokens, always listed by a selection.
    page: tokens of a page, of the cache and of its bounds.
    pages: whose tokens are candidates, the best by bounds; 0: all.
  """

  kind: str
  k: int
  scale: float
  threshold: float
  reuse: int
  sink: int
  window: int
  page: int
  pages: int = 0


class Keys(NamedTuple):
  """A contiguous cache.

  Attributes:
    k: keys.
    v: values.
    starts: position of each page's first token.
    used: tokens a row holds, the step's included.
    bounds: least and largest key of each page; None where `Rules.pages` is 0.
    copies: int8 codes of the keys and their scales, which are scored in their
      place; None: keys are scored.
  """

  k: Float[Array, 'B K S H']
  v: Float[Array, 'B K S H']
  starts: Int32[Array, 'B C']
  used: Int32[Array, 'B']
  bounds: tuple[Float[Array, 'B K C H'], Float[Array, 'B K C H']] | None = None
  copies: tuple[Int8[Array, 'B K S H'], Float[Array, 'B K S']] | None = None


class Working(NamedTuple):
  """A working set, all of which a step replaces in place.

  Attributes:
    query: queries of the last selection.
    k: keys of the list and of what came since.
    v: values.
    counts: of tokens.
  """

  query: Float[Array, 'B N H']
  k: Float[Array, 'B K W H']
  v: Float[Array, 'B K W H']
  counts: Counts


class Context(NamedTuple):
  """The tokens of a step.

  Attributes:
    positions: of the tokens.
    valid: which there are, a prefix of each row.
    lengths: of the rows, these included.
  """

  positions: Int32[Array, 'B T']
  valid: Bool[Array, 'B T']
  lengths: Int32[Array, 'B']


def refuse(
  heads: int, keys: Keys, width: int, rules: Rules, voters: int
) -> str | None:
  """Why the launches cannot serve; None if they can.

  Args:
    heads: of queries.
    keys: arrays or their shapes.
    width: of the working set.
    rules: static numbers.
    voters: queries that vote.
  """
  kv, length, dim = keys.k.shape[1:]
  most = best_in_order.MOST
  if dim not in (64, 128, 256):
    return f'head dim {dim} is not one of 64, 128, 256'
  if keys.k.size >= 2**31 and keys.k.dtype.itemsize == 1:
    return f'{keys.k.size} codes, whose offsets 32 bits do not hold'
  if heads * dim > 2**15 or voters // kv > 64:
    return f'{heads} heads of {dim}, {voters} voters: too many for a program'
  if width > 2**14:
    return f'a list of {width} tokens exceeds {2**14}'
  if rules.kind not in ('soft', 'top_k'):
    return f'votes of kind {rules.kind}'
  if rules.pages:
    if rules.page & (rules.page - 1):
      return f'{rules.page} tokens of a page are no power of 2'
    tokens = rules.pages * rules.page
    if tokens > most:
      return f'{tokens} tokens of pages exceed {most}'
    chosen, among = rules.pages, keys.starts.shape[1]
  else:
    chosen, among = rules.k, length
  if among > most and chosen * best_in_order.GROUP > most:
    return f'{chosen} of {among} exceed {most // best_in_order.GROUP}'
  return None


def step(
  query: Float[Array, 'B N H'],
  asked: Float[Array, 'B n H'],
  weight: Float[Array, 'B n'] | None,
  keys: Keys,
  working: Working,
  context: Context,
  rules: Rules,
  *,
  interpret: bool = False,
) -> tuple[Working, Bool[Array, 'B']]:
  """The working set after a step, and which rows selected.

  Args:
    query: pooled and unrotated, by which it is known who must select.
    asked: the queries that vote, in the frame of the keys.
    weight: of their votes; None: all alike.
    keys: the cache, in which the new tokens are.
    working: before the step.
    context: the tokens.
    rules: static numbers.
    interpret: runs on any device.
  """
  how = {'interpret': interpret}
  query, due, low, high = turn(
    query,
    working.query,
    working.counts.until,
    working.counts.age,
    *context,
    keys.starts,
    keys.used,
    threshold=rules.threshold,
    reuse=rules.reuse,
    sink=rules.sink,
    window=rules.window,
    page=rules.page,
    **how,
  )

  def voted(source: Source):
    """Votes of all heads, once they are known."""
    found = logits(
      asked,
      source,
      low,
      high,
      due,
      scale=rules.scale,
      page=rules.page,
      **how,
    )
    return votes(found, due, kind=rules.kind, weight=weight, **how)

  pages = None
  if rules.pages:
    assert keys.bounds is not None
    least, most = keys.bounds
    promise = voted(Source(most, least))
    pages, _ = best_in_order.best(promise, rules.pages, due, **how)
  scored, scale = keys.copies or (keys.k, None)
  found = voted(Source(scored, None, pages, scale))
  n = min(rules.k, found[0].shape[1])
  width = working.k.shape[2]
  tokens, counts = listed(
    best_in_order.narrowed(found, n, due, **how),
    pages,
    working.counts,
    low,
    high,
    keys.used,
    context.lengths,
    context.valid,
    due,
    n=n,
    width=width,
    page=rules.page,
    **how,
  )
  k, v = gathered(
    working.k,
    working.v,
    keys.k,
    keys.v,
    keys.used,
    tokens,
    counts.held,
    context.valid,
    due,
    **how,
  )
  return Working(query, k, v, counts), due
