"""Steady-state time on the device.

Work on an accelerator is asynchronous, and one dispatch from Python costs
about as much as a small kernel. So several calls go into one program, on
different inputs (else XLA runs equal calls once, and a cache may hold what the
next call reads), programs are queued until a sample is long against the
dispatch, and only the last is waited for.
"""

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

_LOG = logging.getLogger(__name__)
# A sample this long makes one host synchronisation (0.1 ms) negligible.
SAMPLE_MS = 20.0


@dataclasses.dataclass(frozen=True)
class Timing:
  """Times of one function.

  Attributes:
    repeats_ms: one call's milliseconds, a sample each, in order of taking.
    compile_s: seconds to trace and compile.
    kernel_ms: one call's milliseconds inside kernels, a sample each; empty
      where the profiler is not to be had. It leaves out the gaps between
      launches, which a host that is busy otherwise makes long.
  """

  repeats_ms: tuple[float, ...]
  compile_s: float
  kernel_ms: tuple[float, ...] = ()

  @property
  def ms(self) -> float:
    """The median call on the device, in milliseconds."""
    return statistics.median(self.kernel_ms or self.repeats_ms)


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
    outs = []
    for each in inputs:
      outs.append(function(*each, *shared))
      # One after the other: XLA would join products that share an operand.
      shared, outs[-1] = jax.lax.optimization_barrier((shared, outs[-1]))
    return outs

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
  samples = sample(program, inputs, shared, repeats)
  kernels = sample_kernels(program, inputs, shared, repeats)
  return Timing(samples, compile_s, kernels)


def sample(program, inputs, shared, repeats: int) -> tuple[float, ...]:
  """Milliseconds a call of a program of `compiled`, a sample each."""
  inputs = list(inputs)

  def run(count):
    begin = time.perf_counter()
    out = None
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


def sample_kernels(program, inputs, shared, repeats: int) -> tuple[float, ...]:
  """Milliseconds a call spends in kernels, by CUPTI; () where it is absent."""
  if jax.default_backend() != 'gpu':
    return ()
  try:
    from jax.experimental.mosaic.gpu import profiler

    run = profiler.Cupti().measure(program, aggregate=True, iterations=repeats)
    _, times = run(list(inputs), shared)
  except (ImportError, AttributeError, RuntimeError) as error:
    _LOG.warning('kernel times are not to be had: %s', error)
    return ()
  if times is None:
    return ()
  times = times if isinstance(times, list) else [times]
  return tuple(float(x) / len(inputs) for x in times)
