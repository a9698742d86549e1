"""How a program calls the host with one array, and gets one: two links.

`io` is `io_callback`. On a GPU it copies the array and waits, makes one of its
own on JAX's CPU device, runs the host's part, copies the result and waits again
(jaxlib/gpu/py_client_gpu.cc).

`buffer` is `buffer_callback`, which hands over the device's memory and its
stream: the copies are ours, by CUDA's driver, there is one wait, and no array
of JAX's. On a CPU, numpy sees the memory itself. No other device has it.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import io_callback
from jax.experimental.buffer_callback import buffer_callback

KINDS = ('io', 'buffer')
_CPU, _CUDA = 1, 2  # kDLCPU, kDLCUDA of DLPack


def call(
  kind: str,
  work: Callable[[np.ndarray], np.ndarray],
  shape: jax.ShapeDtypeStruct,
  x: jax.Array,
) -> jax.Array:
  """What `work`, which must not raise nor keep its array, makes of `x`.

  Args:
    kind: one of KINDS.
    work: what the host does.
    shape: of what it returns.
    x: what it gets.
  """
  if kind == 'io':
    return io_callback(work, shape, x)
  put = functools.partial(_put, work)
  return buffer_callback(put, shape, has_side_effect=True)(x)


def _put(work, context, out, x) -> None:
  """Writes what `work` makes of one buffer into another."""
  device, number = x.__dlpack_device__()
  if device == _CPU:
    np.asarray(out)[...] = work(np.asarray(x))
    return
  if device != _CUDA:
    raise NotImplementedError(f"link 'buffer' on a device of DLPack's {device}")
  stream, cuda = context.stream, _cuda()
  cuda.enter(number)
  taken = np.empty(x.shape, x.dtype)
  cuda.take(taken, x.__cuda_array_interface__['data'][0], stream)
  made = np.ascontiguousarray(work(taken), out.dtype)
  if made.shape != out.shape:
    raise ValueError(f'{made.shape} for an array {out.shape}')
  cuda.give(out.__cuda_array_interface__['data'][0], made, stream)


class _Cuda:
  """Copies by CUDA's driver, in the order of a stream."""

  def __init__(self, library: Any):
    self._library = library

  def _do(self, name: str, *args: Any) -> None:
    if code := getattr(self._library, name)(*args):
      raise RuntimeError(f'{name}: CUDA error {code}')

  def enter(self, number: int) -> None:
    """Makes the device's context the thread's, where it has none."""
    context = ctypes.c_void_p()
    self._do('cuCtxGetCurrent', ctypes.byref(context))
    if not context:
      # Never given back: XLA holds the same one as long as the process lives.
      retain = ctypes.byref(context), ctypes.c_int(number)
      self._do('cuDevicePrimaryCtxRetain', *retain)
      self._do('cuCtxSetCurrent', context)

  def take(self, host: np.ndarray, device: int, stream: int) -> None:
    """From the device, when all before it in the stream is done."""
    self._do(
      'cuMemcpyDtoHAsync_v2',
      ctypes.c_void_p(host.ctypes.data),
      ctypes.c_uint64(device),
      ctypes.c_size_t(host.nbytes),
      ctypes.c_void_p(stream),
    )
    self._do('cuStreamSynchronize', ctypes.c_void_p(stream))

  def give(self, device: int, host: np.ndarray, stream: int) -> None:
    """To the device, before all that follows in the stream.

    Memory that is not pinned is staged before the call returns (CUDA driver
    API, "API synchronization behavior"): it may go then, and nobody waits.
    """
    self._do(
      'cuMemcpyHtoDAsync_v2',
      ctypes.c_uint64(device),
      ctypes.c_void_p(host.ctypes.data),
      ctypes.c_size_t(host.nbytes),
      ctypes.c_void_p(stream),
    )


@functools.cache
def _cuda() -> _Cuda:
  return _Cuda(ctypes.CDLL('libcuda.so.1'))  # its calls release Python's lock
