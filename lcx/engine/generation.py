"""An answer, and what its attention did, from the sums of traces."""

import dataclasses
from collections.abc import Mapping

import numpy as np

# What has a field of its own, or is another field's denominator.
_APART = ('keys', 'pairs', 'mass')


@dataclasses.dataclass(frozen=True)
class Generation:
  """One answer and what it cost.

  Attributes:
    tokens: of the answer.
    status: 'ok', or why it ended early.
    prompt_tokens: question included.
    prefill_ms: reading of the prompt.
    decode_ms_per_token: of the answer.
    keys_attended: by a query of decode (question read apart, answer), mean over
      queries, layers and query heads; what prefill attended is in its density.
    density: keys attended over keys that dense attention attends: the smaller
      of prefill's and decode's, since a method may make only one of them
      sparse.
    prefill_density: of the prefill.
    decode_density: of what came after it.
    kv_bytes: of keys and values on the devices, a sequence of the batch.
    host_bytes: in host memory, likewise.
    peak_bytes: of the device, where it says so.
    compilations: while this was made.
    compile_s: their seconds.
    counters: what decode counted, by name (cache hits, fallbacks).
    masses: shares of softmax mass, means over the prefill's queries, layers and
      query heads; those alone that the method's prefill knows:
      `prefill_captured_mass`: in the keys that were attended to, exact for
      sampled queries; `prefill_estimated_mass`: the same as the selector
      estimates it; `prefill_cut_mass`: selected, but cut off by the width of
      its lists, by the same estimate.
  """

  tokens: list[int]
  status: str
  prompt_tokens: int
  prefill_ms: float
  decode_ms_per_token: float
  keys_attended: float
  density: float
  prefill_density: float
  decode_density: float
  kv_bytes: int
  host_bytes: int
  peak_bytes: int | None
  compilations: int
  compile_s: float
  counters: dict[str, float]
  masses: dict[str, float] = dataclasses.field(default_factory=dict)


Sums = Mapping[str, np.ndarray]


def density(sums: Sums, row: int) -> float:
  """Keys attended over those of dense attention; 1 where nothing is known."""
  pairs = float(sums['pairs'][row]) if 'pairs' in sums else 0.0
  return float(sums['keys'][row]) / pairs if pairs else 1.0


def counters(sums: Sums, row: int) -> dict[str, float]:
  """What a method counted of its own."""
  return {k: float(v[row]) for k, v in sums.items() if k not in _APART}


def prefill_masses(sums: Sums, row: int, queries: int) -> dict[str, float]:
  """The masses of a prefill, see `Generation`.

  Args:
    sums: of the prefill.
    row: of the batch.
    queries: that were summed over: tokens x layers x query heads.
  """
  masses = {k: v for k, v in sums.items() if k.endswith('_mass')}
  if 'mass' in sums:
    masses = {'captured_mass': sums['mass']} | masses
  return {
    f'prefill_{k}': float(v[row]) / max(queries, 1) for k, v in masses.items()
  }
