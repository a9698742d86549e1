"""A-shape: prompt queries see first and last tokens, decoding is dense.

Jiang et al., "MInference 1.0", arXiv:2407.02490, section 3.1: 1,024 first and
4,096 last tokens. As `streaming`, but decoding sees everything: what the prompt
loses by a fixed pattern alone.
"""

import dataclasses

from lcx import cache as caches
from lcx.methods.base import Method
from lcx.methods.dense import DenseDecode
from lcx.methods.streaming import StreamingPrefill


@dataclasses.dataclass(frozen=True)
class AShapePrefill(StreamingPrefill):
  """Each prompt query sees the sink and its own window.

  Attributes:
    sink: first tokens that are always seen.
    recent: last tokens that are always seen, the query's own included.
  """

  sink: int = 1024
  recent: int = 4096


METHOD = Method(
  'a_shape', AShapePrefill(), caches.CONFIGS['dense'], DenseDecode()
)
