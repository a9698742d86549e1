"""A step of TokenSelect's Selection Cache in launches that end at once.

Wu et al., arXiv:2411.02886, algorithm 1: a row whose query has turned selects
anew, the others take the new token behind their list. As plain array operations
it is a conditional in front of some twenty small kernels. Here it is a fixed
chain, in place:

  turn      who selects, and among which tokens; the query that it is for
  logits    of candidates, and what their softmax needs, tile by tile
  votes     of all heads for each candidate (with maxima, where there are many)
  list      the best, in order, with the ends of the context; what was counted
  gather    keys and values of the list, or the new token

Where nobody selects, `logits`, `votes` and what narrows many of them end at
once. With page bounds, launches of the same kinds first choose the pages whose
tokens are candidates.

It has no twin here: elsewhere, over several shards and for what `refuse` names,
`lcx.methods.tokenselect` says the same in array operations, against which it is
tested.
"""

from kernels_pallas.selection_cache.copies import copied
from kernels_pallas.selection_cache.step import (
  Context,
  Counts,
  Keys,
  Rules,
  Working,
  refuse,
  step,
)

__all__ = [
  'Context',
  'Counts',
  'Keys',
  'Rules',
  'Working',
  'copied',
  'refuse',
  'step',
]
