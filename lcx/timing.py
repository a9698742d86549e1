"""Steady-state time on the device.

Work on an accelerator is asynchronous, and one dispatch from Python costs
about as much as a small kernel. So several calls go into one program, on
different inputs (else XLA runs equal calls once, and a cache may hold what the
next call reads), programs are queued until a sample is long against the
dispatch, and only the last is waited for.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

# A sample this long makes one host synchronisation (0.1 ms) negligible.
SAMPLE_MS = 20.0


@dataclasses.dataclass(frozen=True)
class Timing:
  """Times of one function.

  Attributes:
    repeats_ms: one call's milliseconds, a sample each, in order of taking.
    compile_s: seconds to trace and compile.
  """

  repeats_ms: tuple[float, ...]
  compile_s: float

  @property
  def ms(self) -> float:
    """The median call, in milliseconds."""
    return statistics.median(self.repeats_ms)


def compiled(
  function: Callable,
  inputs: Sequence[tuple[Any, ...]],
  shared: tuple[Any, ...] = (),
) -> tuple[Callable, float]:
  """One program that calls function(*inputs[i], *shared) for every i.

  Returns:
    The program, a function of (inputs, shared), and the seconds it took to
    trace and compile.
  """

  @jax.jit
  def program(inputs, shared):
    return [function(*each, *shared) for each in inputs]

  begin = time.perf_counter()
  program = program.lower(list(inputs), shared).compile()
  return program, time.perf_counter() - begin


def measure(
  function: Callable,
  inputs: Sequence[tuple[Any, ...]],
  *,
  shared: tuple[Any, ...] = (),
  repeats: int = 10,
) -> Timing:
  """Times function(*inputs[i], *shared), averaged over i.

  Args:
    function: traceable; its result is computed in full.
    inputs: argument tuples, one a call; they must differ. Together they should
      pass the last-level cache, or read different parts of `shared`.
    shared: arguments of every call (a pool of pages, say), not copied.
    repeats: samples.

  Returns:
    Timing, a call each.
  """
  program, compile_s = compiled(function, inputs, shared)
  return Timing(sample(program, inputs, shared, repeats), compile_s)


def sample(program, inputs, shared, repeats: int) -> tuple[float, ...]:
  """Milliseconds a call of a program of `compiled`, a sample each."""
  inputs = list(inputs)

  def run(count):
    begin = time.perf_counter()
    for _ in range(count):
      out = program(inputs, shared)
    jax.block_until_ready(out)
    return (time.perf_counter() - begin) * 1e3

  run(1)
  once = min(run(1), run(1))
  count = max(1, round(SAMPLE_MS / once))
  run(count)  # warm: clocks, allocator
  calls = count * len(inputs)
  return tuple(run(count) / calls for _ in range(repeats))
