"""Wall time of an engine's work, its compilations apart."""

import time
from typing import Any

import jax


class Meter:
  """Wall time in milliseconds, compilation taken out and counted apart."""

  def __init__(self, engine: Any):
    self._engine = engine
    self._programs = engine.compilations
    self._compile = engine.compile_s
    self._reset()

  def _reset(self):
    self._start = time.perf_counter()
    self._before = self._engine.compile_s

  def lap(self, ready: Any) -> float:
    """Milliseconds since the last lap, once `ready` is computed."""
    jax.block_until_ready(ready)
    wall = time.perf_counter() - self._start
    wall -= self._engine.compile_s - self._before
    self._reset()
    return 1e3 * wall

  @property
  def compilations(self) -> int:
    return self._engine.compilations - self._programs

  @property
  def compile_s(self) -> float:
    return self._engine.compile_s - self._compile
