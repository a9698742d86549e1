"""Dense prefills that several engines share.

Methods that differ in decode alone read a prompt alike: what enters each layer
is the same, and only caches and what the decode part observes differ. One
engine keeps the layers' inputs; the others fill their caches from them, a
projection a layer instead of attention over the prompt.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcx.methods.dense import DensePrefill


@dataclasses.dataclass(frozen=True)
class Reading:
  """What a prefill made.

  Attributes:
    filled: caches and states of all layers.
    scores: logits of the next token.
    sums: what attention did, by name, float [B].
    inputs: of each layer, where they are shared; else ().
    shared_ms: time that somebody else spent on it.
  """

  filled: Any
  scores: Float[Array, 'B V']
  sums: dict[str, np.ndarray]
  inputs: tuple[jax.Array, ...] = ()
  shared_ms: float = 0.0


class Readings:
  """Keeps layer inputs of dense prefills, up to a number of bytes.

  Engines that share it must have the same weights, batch and mesh.

  Args:
    limit: bytes; L B T D elements a prompt. What does not fit is not shared.
  """

  def __init__(self, limit: float):
    self._limit = limit
    self._kept: dict[Any, Reading] = {}
    self._bytes = 0

  def fits(self, plan: Any, shape: tuple[int, int]) -> bool:
    """Whether prompts [B T] of a plan's method can be shared."""
    # Exactly the dense prefill: a subclass may attend in another way.
    if type(plan.method.prefill) is not DensePrefill:
      return False
    config = plan.config
    size = np.prod(shape) * config.d_model * config.n_layers
    return size * np.dtype(config.dtype).itemsize <= self._limit

  def get(self, key: Any) -> Reading | None:
    """The reading of these tokens, its caches apart."""
    return self._kept.get(key)

  def put(
    self, key: Any, found: Reading, inputs: tuple[jax.Array, ...], ms: float
  ) -> None:
    """Keeps what a dense prefill made, if there is room."""
    size = sum(x.nbytes for x in inputs)
    if self._bytes + size <= self._limit:
      self._bytes += size
      self._kept[key] = Reading(
        (),
        jnp.copy(found.scores),  # a session gives its own away
        found.sums,
        inputs,
        ms,
      )

  @property
  def newest(self) -> Reading | None:
    """What was kept last."""
    return next(reversed(self._kept.values()), None)

  def clear(self) -> None:
    """Forgets all."""
    self._kept, self._bytes = {}, 0
