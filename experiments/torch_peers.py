"""Peers outside JAX: PyTorch's attention, and FlashInfer on top of it.

Times are taken with CUDA events, as the libraries themselves do. Where a
package is not installed there are no peers of it.
"""

import functools
import importlib.util
from collections.abc import Callable

# Samples wanted -> milliseconds of a call, a sample each.
Timed = Callable[[int], tuple[float, ...]]


def dense(tokens: int, heads: int, kv_heads: int, dim: int) -> dict[str, Timed]:
  """Causal attention of a whole prompt, by name."""
  return _peers(tokens, tokens, heads, kv_heads, dim)


def decode(
  tokens: int, heads: int, kv_heads: int, dim: int
) -> dict[str, Timed]:
  """One query over `tokens` keys, by name."""
  return _peers(1, tokens, heads, kv_heads, dim)


def _peers(queries, keys, heads, kv_heads, dim) -> dict[str, Timed]:
  shapes = (heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, dim)
  found: dict[str, Timed] = {}
  if importlib.util.find_spec('torch'):
    for name in ('flash', 'cudnn'):
      found[f'torch {name}'] = functools.partial(_sdpa, name, shapes)
  if importlib.util.find_spec('flashinfer'):
    found['flashinfer'] = functools.partial(_flashinfer, shapes)
  return found


def _sdpa(name: str, shapes, repeats: int) -> tuple[float, ...]:
  import torch
  from torch.nn import attention
  from torch.nn.functional import scaled_dot_product_attention

  q, k, v = (_normal(1, *shape) for shape in shapes)
  backend = {
    'flash': attention.SDPBackend.FLASH_ATTENTION,
    'cudnn': attention.SDPBackend.CUDNN_ATTENTION,
  }[name]
  causal = q.shape[2] > 1

  def run():
    with attention.sdpa_kernel(backend), torch.no_grad():
      scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

  return _time(run, repeats)


def _flashinfer(shapes, repeats: int) -> tuple[float, ...]:
  import flashinfer

  q, k, v = (_normal(*shape).transpose(0, 1).contiguous() for shape in shapes)
  if q.shape[0] == 1:
    attend = flashinfer.single_decode_with_kv_cache
    run = functools.partial(attend, q[0], k, v, use_tensor_cores=True)
  else:
    attend = flashinfer.single_prefill_with_kv_cache
    run = functools.partial(attend, q, k, v, causal=True, backend='fa3')
  return _time(run, repeats)


def _normal(*shape: int):
  import torch

  return torch.randn(shape, device='cuda', dtype=torch.bfloat16)


def _time(run: Callable, repeats: int) -> tuple[float, ...]:
  """Milliseconds of a call; as many calls a sample as take 20 ms."""
  import torch

  def sample(count: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
      run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / count

  sample(1)
  count = max(1, round(20 / sample(2)))
  sample(count)
  times = tuple(sample(count) for _ in range(repeats))
  torch.cuda.empty_cache()
  return times
