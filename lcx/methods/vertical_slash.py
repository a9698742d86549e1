"""MInference: prompt blocks on the best columns and diagonals, dense decoding.

Jiang et al., arXiv:2407.02490; see `lcx.select.vertical_slash`. One setting for
all heads, (1000, 6096): the released default for heads that no search has
assigned, and the most frequent one in the released tables.

On P sequence shards all get the last w queries, an all-reduce of
2 (P - 1) / P 4 B (w (N H + 1) + 1) bytes a layer, and each scores the keys that
the attention gathers anyway.

A prompt is read whole: its last queries choose for all of it, so a chunk that
comes before them cannot be selected for.
"""

import dataclasses
from typing import Any

from lcx import cache as caches
from lcx.methods.base import Context, Method
from lcx.methods.block_prefill import BlockPrefill
from lcx.methods.dense import DenseDecode
from lcx.select.block_rows import Selected
from lcx.select.vertical_slash import vertical_slash
from lcx.select.window import last_queries

# Last queries that chose where it was timed (experiments/selector_bench.py).
MEASURED_WINDOW = 64


@dataclasses.dataclass(frozen=True)
class VerticalSlashPrefill(BlockPrefill):
  """Blocks that chosen columns and diagonals cross.

  Attributes:
    columns: keys chosen a head.
    diagonals: offsets chosen a head.
    window: last queries that choose.
  """

  columns: int = 1000
  diagonals: int = 6096
  window: int = 64

  @property
  def measured_as(self) -> str:
    if self.window != MEASURED_WINDOW:
      return ''
    return f'vertical_slash_{self.columns}_{self.diagonals}'

  def full_budget(self, length: int) -> dict[str, Any]:
    return {'columns': max(length, 1)}

  def tight_budget(self, length: int) -> dict[str, Any]:
    return {'columns': length // 8, 'diagonals': length // 8}

  def check(self, config, capacity: int) -> None:
    super().check(config, capacity)
    for name in ('columns', 'diagonals', 'window'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'prefill.{name}={getattr(self, name)} must be at least 1'
        )

  def select(self, q, k, keys, *, q_start, ctx: Context) -> Selected:
    del k
    last, at = last_queries(
      q, ctx.positions, ctx.valid, self.window, ctx.axes.seq
    )
    return vertical_slash(
      last,
      at,
      keys,
      n_queries=q.shape[1],
      q_start=q_start,
      lengths=ctx.lengths,
      columns=self.columns,
      diagonals=self.diagonals,
      width=self.width,
      dense_below=self.listed_whole,
    )


METHOD = Method(
  'vertical_slash',
  VerticalSlashPrefill(),
  caches.CONFIGS['dense'],
  DenseDecode(),
)
