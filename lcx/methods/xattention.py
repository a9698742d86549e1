"""XAttention: prompt blocks chosen by antidiagonal scores, dense decoding.

Xu et al., arXiv:2503.16428; see `lcx.select.xattention`. Stride 16 and one
threshold of 0.9 for all heads are the paper's plain setting (its tables use a
threshold per head, searched offline).

On P sequence shards of T tokens each, scores are computed where the keys live:
queries travel, block masses come back. Beside the attention's keys and values
(`lcx.methods.block_prefill`) a device receives a layer, for stride s and blocks
of 128,

  all-gather  (P - 1) B T N H E        the queries, E bytes an element
              (P - 1) B (T / s) 4      their positions
  all-to-all  (P - 1) B N (T / 128)^2 4           masses of key blocks
  all-reduce  2 (P - 1) / P 2 B N (P T / s) 4     normalisers

These queries are N / K times the bytes of the keys that the attention gathers
anyway: a selector alone would move fewer bytes by gathering keys. No device
scores keys of others, and each scores the same share.
"""

import dataclasses
from typing import Any

from lcx import cache as caches
from lcx.methods.base import Context, Method
from lcx.methods.block_prefill import BlockPrefill
from lcx.methods.dense import DenseDecode
from lcx.select.block_rows import Selected, check_budget
from lcx.select.xattention import xattention


@dataclasses.dataclass(frozen=True)
class XAttentionPrefill(BlockPrefill):
  """Blocks that reach the threshold, or a fixed share of them.

  Attributes:
    threshold: share of the antidiagonal mass; None: `density` decides.
    density: share of the causal blocks of each row; None: `threshold` decides.
    stride: of the antidiagonals, a divisor of 128.
    per: 'head' or 'group': a list per query head or per kv head.
  """

  threshold: float | None = 0.9
  density: float | None = None
  stride: int = 16
  per: str = 'head'

  @property
  def measured_as(self) -> str:
    return f'xattention_{self.stride}' if self.per == 'head' else ''

  def full_budget(self, length: int) -> dict[str, Any]:
    return {'threshold': 1.0, 'density': None}

  def check(self, config, capacity: int) -> None:
    super().check(config, capacity)
    check_budget(self.threshold, self.density)
    if self.stride < 1 or 128 % self.stride:
      raise ValueError(f'prefill.stride={self.stride} must divide 128')
    if self.per not in ('head', 'group'):
      raise ValueError(f"prefill.per={self.per!r} must be 'head' or 'group'")

  def select(self, q, k, keys, *, q_start, ctx: Context) -> Selected:
    del keys
    return xattention(
      q,
      k,
      q_start=q_start,
      lengths=ctx.lengths,
      threshold=self.threshold,
      density=self.density,
      stride=self.stride,
      width=self.width,
      dense_below=self.listed_whole,
      per=self.per,
      axis=ctx.axes.seq,
    )


METHOD = Method(
  'xattention', XAttentionPrefill(), caches.CONFIGS['dense'], DenseDecode()
)
