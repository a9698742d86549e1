"""Measured crossover lengths: below which tokens a method stays dense.

One JSON file of entries with their evidence, written from measured rows alone
(`python -m experiments.fit_policy`), that every method reads. Nothing is
guessed: where no entry fits, there is no crossover, and the caller decides.

  {"entries": [{"op": "step", "method": "lserve", "device": "NVIDIA H100 80GB",
    "heads": 32, "kv_heads": 8, "head_dim": 128, "bits": 16,
    "crossover": 65536, "evidence": [
      [32768, 0.93, "budget=4096"], [65536, 1.2, "budget=4096"]]}]}

`evidence` is [length, speed-up over dense, setting] as measured, ascending;
`crossover` is the smallest measured length that is longer than every one at
which some setting was no faster than dense. So in the gap between a length that
lost and the next one, which won, a method stays dense; and where every measured
length won, or the longest one lost, nothing brackets a crossover: no entry.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

DEFAULT = pathlib.Path(__file__).parent / 'policy.json'
AS_MEASURED = -1  # in place of a length: what this file says, else 0

Evidence = tuple[tuple[int, float, str], ...]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One measured crossover.

  Attributes:
    op: 'prefill' (the whole prompt), 'step' (a decoded token), 'layer' (its
      attention in one layer) or 'attention' (a prompt's in one layer, what
      selects included).
    method: name of the method; of 'attention', of the selector.
    device: as JAX names it, the number of devices before it where several work
      together ('4 x NAME').
    heads: query heads of the model.
    kv_heads: its kv heads.
    head_dim: its head dim.
    bits: of the cache; of 'attention', of the keys.
    crossover: tokens.
    evidence: (length, speed-up over dense, the budget it was measured at),
      ascending, lengths that lost and lengths that won.
  """

  op: str
  method: str
  device: str
  heads: int
  kv_heads: int
  head_dim: int
  bits: int
  crossover: int
  evidence: Evidence

  def __post_init__(self):
    places = [(length, setting) for length, _, setting in self.evidence]
    if places != sorted(set(places)):
      raise ValueError('evidence must be [length, ratio, setting], ascending')
    if self.crossover != crossover_of(self.evidence):
      raise ValueError(
        f'crossover={self.crossover} does not follow from its evidence, which '
        f'gives {crossover_of(self.evidence)}'
      )


def crossover_of(evidence: Evidence) -> int | None:
  """The smallest measured length past all that lost; None: not bracketed."""
  lost = max((n for n, ratio, _ in evidence if ratio <= 1), default=None)
  if lost is None:
    return None
  return min((n for n, *_ in evidence if n > lost), default=None)


@dataclasses.dataclass(frozen=True)
class Policy:
  """All measured crossovers."""

  entries: tuple[Entry, ...] = ()

  def crossover(self, op: str, method: str, **where: Any) -> int | None:
    """Tokens below which `method` should stay dense; None: no such entry.

    Args:
      op: see `Entry`.
      method: its name.
      **where: device, heads, kv_heads, head_dim, bits; what is left out may be
        anything, but then all entries that fit must agree.
    """
    fits = [
      e
      for e in self.entries
      if e.op == op
      and e.method == method
      and all(getattr(e, name) == value for name, value in where.items())
    ]
    found = {e.crossover for e in fits}
    return found.pop() if len(found) == 1 else None

  def to_json(self) -> str:
    """One entry a line."""
    lines = [json.dumps(dataclasses.asdict(entry)) for entry in self.entries]
    return '{"entries": [\n' + ',\n'.join(lines) + '\n]}\n'


@functools.cache
def load(path: str | pathlib.Path = DEFAULT) -> Policy:
  """Reads a policy, once a process: methods ask in every layer.

  Raises:
    ValueError: the file is no policy, or an entry contradicts its evidence.
  """
  path = pathlib.Path(path)
  try:
    found = json.loads(path.read_text('utf-8'))['entries']
    entries = []
    for fields in found:
      evidence = tuple(
        (int(n), float(r), str(at)) for n, r, at in fields.pop('evidence')
      )
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
