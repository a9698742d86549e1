"""SpargeAttn's first stage: prompt blocks chosen by means, dense decoding.

Zhang et al., arXiv:2502.18137; see `lcx.select.sparge`. Without its second
stage (skipping P V inside the kernel) and without its quantisation.

On P sequence shards of T tokens each, means are taken where the keys live and
gathered; scores of block means are computed where the queries live. Beside the
attention's keys and values (`lcx.methods.block_prefill`) a device receives
(P - 1) B K (T / 128) (4 H + 1) bytes a layer: float32 means of blocks and
whether they are similar, 1 / 64 of what bfloat16 keys take. Scoring where the
keys live would send means of queries in their place, N / K times the bytes, and
the scores back.
"""

import dataclasses
from typing import Any

from lcx import cache as caches
from lcx.methods.base import Context, Method
from lcx.methods.block_prefill import BlockPrefill
from lcx.methods.dense import DenseDecode
from lcx.select.block_rows import Selected, check_budget
from lcx.select.sparge import sparge

# Similarity at which every block's mean is trusted, as it was measured
# (experiments/selector_bench.py); above it, other blocks are listed, too.
ALL_TRUSTED = -0.1


@dataclasses.dataclass(frozen=True)
class SpargePrefill(BlockPrefill):
  """Blocks whose means promise most, and those whose means say nothing.

  Attributes:
    threshold: share of the compressed softmax; None: `density` decides.
    density: share of the causal blocks of each row; None: `threshold` decides.
    similarity: least self-similarity of a block whose mean is trusted.
  """

  threshold: float | None = 0.98
  density: float | None = None
  similarity: float = 0.6

  @property
  def measured_as(self) -> str:
    if self.similarity <= ALL_TRUSTED:
      return 'sparge'
    return f'sparge_{100 * self.similarity:g}'

  def full_budget(self, length: int) -> dict[str, Any]:
    return {'threshold': 1.0, 'density': None}

  def check(self, config, capacity: int) -> None:
    super().check(config, capacity)
    check_budget(self.threshold, self.density)
    if not -1 <= self.similarity <= 1:
      raise ValueError(
        f'prefill.similarity={self.similarity} must lie in [-1, 1]'
      )

  def select(self, q, k, keys, *, q_start, ctx: Context) -> Selected:
    del keys
    return sparge(
      q,
      k,
      q_start=q_start,
      lengths=ctx.lengths,
      threshold=self.threshold,
      density=self.density,
      similarity=self.similarity,
      width=self.width,
      dense_below=self.listed_whole,
      axis=ctx.axes.seq,
    )


METHOD = Method(
  'spargeattn', SpargePrefill(), caches.CONFIGS['dense'], DenseDecode()
)
