"""Measured crossover lengths: below which tokens a method stays dense.

One JSON file of entries with their evidence, written from measured rows
(`python -m experiments.fit_policy`), that every method reads. Nothing is
guessed: where no entry fits, there is no crossover, and the caller decides.

  {"entries": [{"op": "step", "method": "lserve", "device": "NVIDIA H100 80GB",
    "heads": 32, "kv_heads": 8, "head_dim": 128, "bits": 16,
    "crossover": 65536, "evidence": [[32768, 0.93], [65536, 1.2]]}]}

`evidence` is [length, speed-up over dense] as measured, ascending; `crossover`
is the first length from which on every measured speed-up is above 1.
"""

import dataclasses
import json
import pathlib
from typing import Any

DEFAULT = pathlib.Path(__file__).parent / 'policy.json'
_IDENTITY = (
  'op', 'method', 'device', 'heads', 'kv_heads', 'head_dim', 'bits',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
  """One measured crossover.

  Attributes:
    op: 'prefill' (the whole prompt), 'step' (a decoded token) or 'layer'.
    method: name of the method.
    device: as JAX names it.
    heads: query heads of the model.
    kv_heads: its kv heads.
    head_dim: its head dim.
    bits: of the cache.
    crossover: tokens; None: never faster in what was measured.
    evidence: (length, speed-up over dense) as measured, ascending.
  """

  op: str
  method: str
  device: str
  heads: int
  kv_heads: int
  head_dim: int
  bits: int
  crossover: int | None
  evidence: tuple[tuple[int, float], ...]

  def __post_init__(self):
    lengths = [length for length, _ in self.evidence]
    if not lengths or lengths != sorted(set(lengths)):
      raise ValueError('evidence must be [length, ratio], lengths ascending')
    if self.crossover != crossover_of(self.evidence):
      raise ValueError(
        f'crossover={self.crossover} does not follow from its evidence, which '
        f'gives {crossover_of(self.evidence)}'
      )


def crossover_of(evidence: tuple[tuple[int, float], ...]) -> int | None:
  """The first length from which on every measured speed-up is above 1."""
  found = None
  for length, ratio in sorted(evidence, reverse=True):
    if ratio <= 1:
      break
    found = length
  return found


@dataclasses.dataclass(frozen=True)
class Policy:
  """All measured crossovers."""

  entries: tuple[Entry, ...] = ()

  def crossover(self, op: str, method: str, **where: Any) -> int | None:
    """Tokens below which `method` should stay dense; None: not measured.

    Args:
      op: see `Entry`.
      method: its name.
      **where: device, heads, kv_heads, head_dim, bits; what is left out may be
        anything, but then all entries that fit must agree.

    Returns:
      A length; 2**30 where it was measured and never faster.
    """
    fits = [
      e
      for e in self.entries
      if e.op == op
      and e.method == method
      and all(getattr(e, name) == value for name, value in where.items())
    ]
    found = {2**30 if e.crossover is None else e.crossover for e in fits}
    return found.pop() if len(found) == 1 else None

  def with_entry(self, entry: Entry) -> 'Policy':
    """With `entry` in place of an older one of the same identity."""

    def same(other):
      return all(getattr(other, n) == getattr(entry, n) for n in _IDENTITY)

    kept = tuple(e for e in self.entries if not same(e))
    return Policy((*kept, entry))

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + '\n'


def load(path: str | pathlib.Path = DEFAULT) -> Policy:
  """Reads a policy; the default one may not exist yet: then it is empty.

  Raises:
    ValueError: the file is no policy, or an entry contradicts its evidence.
  """
  path = pathlib.Path(path)
  if path == DEFAULT and not path.exists():
    return Policy()
  try:
    found = json.loads(path.read_text('utf-8'))['entries']
    entries = []
    for fields in found:
      evidence = tuple((int(n), float(r)) for n, r in fields.pop('evidence'))
      entries.append(Entry(**fields, evidence=evidence))
    return Policy(tuple(entries))
  except OSError as error:
    raise ValueError(
      f'policy {path} cannot be read: {error.strerror}'
    ) from error
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(f'{path} is no policy: {error}') from error


def measured(op: str, method: str, config: Any, device: str) -> int:
  """The crossover of a model's shape on a device; 0 where none was measured.

  Args:
    op: see `Entry`.
    method: its name.
    config: an `lcx.models.config.ModelConfig`.
    device: as JAX names it, with the number of devices before it ('4 x NAME')
      for what runs on several.
  """
  found = load().crossover(
    op,
    method,
    device=device,
    heads=config.n_heads,
    kv_heads=config.n_kv_heads,
    head_dim=config.head_dim,
    bits=16,
  )
  return found or 0
