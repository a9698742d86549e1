"""Star Attention: blocks see the first block and themselves; nothing is sent.

Acharya et al., "Star Attention: efficient LLM inference over long sequences",
arXiv:2411.17116. The anchor is the whole first block, without the question;
prefill holds no collective; the question and the answer attend to all blocks
exactly. It is APB without passing blocks.
"""

from typing import ClassVar

from lcx import cache as caches
from lcx.methods.apb import ApbPrefill
from lcx.methods.base import Method
from lcx.methods.dense import DenseDecode


class StarPrefill(ApbPrefill):
  """APB's geometry with the first block as anchor and nothing passed."""

  measured_as: ClassVar[str] = 'star'

  def at_full_budget(self, length: int) -> None:
    """Never exact: tokens between the first and the own block are not seen."""
    del length


# An anchor longer than any block: it is cut to the block.
METHOD = Method(
  'star',
  StarPrefill(
    anchor=2**30, passing=0, compressor='random', query_in_anchor=False
  ),
  caches.CONFIGS['dense'],
  DenseDecode(),
)
