"""Which kv heads stream: a profile of one model, as a small JSON file.

A gate per (layer, kv head) says how much the head needs distant tokens: 1 for
a retrieval head, 0 for a head that sink and recent tokens suffice
(DuoAttention, arXiv:2410.10819; LServe, arXiv:2502.14866, section 3.3). Of all
heads the share with the lowest gates streams. Equal gates are told apart by
index, so a profile always gives the same heads.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from lcx.models.config import ModelConfig

Flags = tuple[tuple[bool, ...], ...]
ALTERNATE = 'alternate'


def fingerprint(config: ModelConfig) -> str:
  """What a profile's model must share: its numbers, but for the dtype."""
  numbers = dataclasses.asdict(config.replace(dtype='float32'))
  text = json.dumps(numbers, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class HeadProfile:
  """Gates of one model, and how they were found.

  Attributes:
    gates: [L][K], each within 0 and 1.
    architecture: `fingerprint` of the model's config.
    sha256: of the model's weight files.
    model: its name, for people.
    recipe: how the gates were found.
  """

  gates: tuple[tuple[float, ...], ...]
  architecture: str
  sha256: str
  model: str = ''
  recipe: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    widths = {len(row) for row in self.gates}
    if len(widths) != 1 or 0 in widths:
      raise ValueError(
        'gates must be [L][K], every layer with as many kv heads'
      )
    gates = np.asarray(self.gates, float)
    if not np.all((gates >= 0) & (gates <= 1)):
      raise ValueError('gates must lie within 0 and 1')

  def streaming(self, share: float, balanced: bool = False) -> Flags:
    """Flags [L][K] of the heads that stream.

    Args:
      share: of all heads, within 0 and 1; rounded to whole heads.
      balanced: the same number in every layer (equal shapes, equal load of the
        model shards) instead of a quantile over all heads (the paper's).
    """
    check_share(share)
    gates = np.asarray(self.gates, float)
    rows = gates if balanced else gates.reshape(1, -1)
    count = round(share * rows.shape[1])
    order = np.argsort(rows, axis=1, kind='stable')[:, :count]
    flags = np.zeros(rows.shape, bool)
    np.put_along_axis(flags, order, True, axis=1)
    return tuple(
      tuple(bool(f) for f in row) for row in flags.reshape(gates.shape)
    )

  def check(self, config: ModelConfig, sha256: str | None = None) -> None:
    """Refuses another model.

    Raises:
      ValueError: the numbers of the model, or its weights where `sha256` is
        given, are not those of the profile.
    """
    if self.architecture != fingerprint(config):
      raise ValueError(
        f'the head profile is of another model ({self.model or "unnamed"}, '
        f'{len(self.gates)} layers of {len(self.gates[0])} kv heads)'
      )
    if sha256 is not None and sha256 != self.sha256:
      raise ValueError(
        f'the head profile is of other weights: {self.sha256[:12]} '
        f'({self.model or "unnamed"}), not {sha256[:12]}'
      )

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + '\n'


@functools.lru_cache(maxsize=32)
def load(path: str) -> HeadProfile:
  """Reads a profile; one process reads a file once.

  Raises:
    ValueError: no such file, or it holds no profile.
  """
  try:
    found = json.loads(pathlib.Path(path).expanduser().read_text('utf-8'))
    gates = tuple(tuple(float(g) for g in row) for row in found.pop('gates'))
    return HeadProfile(gates=gates, **found)
  except OSError as error:
    raise ValueError(
      f'head profile {path!r} cannot be read: {error.strerror}; train one with '
      'configs/train_head_profile.py'
    ) from error
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(f'{path!r} is no head profile: {error}') from error


def alternate(layer: int, n_kv_heads: int, share: float) -> tuple[bool, ...]:
  """A rule for measurements without a profile: says nothing about a model.

  The same number of heads streams in every layer, spread evenly over the heads
  and moved on by one from layer to layer.
  """
  check_share(share)
  count = round(share * n_kv_heads)
  places = [(h + layer) % n_kv_heads for h in range(n_kv_heads)]
  return tuple(
    (p + 1) * count // n_kv_heads > p * count // n_kv_heads for p in places
  )


def check_share(share: float) -> None:
  """Raises ValueError outside 0 to 1."""
  if not 0 <= share <= 1:
    raise ValueError(f'streaming={share} must lie within 0 and 1')
