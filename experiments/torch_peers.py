"""Peers outside JAX: PyTorch's attention, and FlashInfer on top of it.

Times are taken with CUDA events, as the libraries themselves do; calls that
are short against a launch from Python are replayed as one CUDA graph. Where a
package is not installed there are no peers of it.
"""

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable

import numpy as np

# Calls shorter than this (ms) are replayed as a graph, this many at once: the
# host's time to launch one is not the kernel's.
_SHORT_MS, _CALLS = 1.0, 16


@dataclasses.dataclass(frozen=True)
class Times:
  """What a peer took.

  Attributes:
    repeats_ms: one call's milliseconds, a sample each.
    plan_ms: milliseconds on the host to plan what the calls then repeat, which
      is not in `repeats_ms`; None where nothing is planned.
  """

  repeats_ms: tuple[float, ...]
  plan_ms: float | None = None


# Samples wanted -> what was measured.
Timed = Callable[[int], Times]


def dense(tokens: int, heads: int, kv_heads: int, dim: int) -> dict[str, Timed]:
  """Causal attention of a whole prompt, by name."""
  shapes = (
    (heads, tokens, dim),
    (kv_heads, tokens, dim),
    (kv_heads, tokens, dim),
  )
  found = _torch(1, shapes)
  if _is_there('flashinfer'):
    found['flashinfer fa3'] = functools.partial(_flashinfer_dense, shapes)
  return found


def blocks(
  mask: Callable[[], np.ndarray], block: int, heads: int, dim: int
) -> dict[str, Timed]:
  """Causal attention over listed blocks, by name.

  Args:
    mask: makes bool [K, tiles, tiles]: the blocks that a tile of queries reads.
      FlashInfer lists blocks by kv head. A tile's own block is its last, and
      the one of which it sees the causal half.
    block: tokens of a tile and of a block.
    heads: query heads.
    dim: of a head.
  """
  if not _is_there('flashinfer'):
    return {}
  timed = functools.partial(_flashinfer_blocks, mask, block, heads, dim)
  return {'flashinfer fa3': timed}


def decode(
  tokens: int, heads: int, kv_heads: int, dim: int, batch: int = 1
) -> dict[str, Timed]:
  """One query a sequence over `tokens` keys, by name.

  torch reads contiguous keys, FlashInfer pages of 64 in random order.
  """
  shapes = (heads, 1, dim), (kv_heads, tokens, dim), (kv_heads, tokens, dim)
  found = _torch(batch, shapes)
  if _is_there('flashinfer'):
    found['flashinfer'] = functools.partial(
      _flashinfer_pages, tokens, heads, kv_heads, dim, batch
    )
  return found


def _is_there(package: str) -> bool:
  return importlib.util.find_spec(package) is not None


def _torch(batch: int, shapes) -> dict[str, Timed]:
  if not _is_there('torch'):
    return {}
  return {
    f'torch {name}': functools.partial(_sdpa, name, batch, shapes)
    for name in ('flash', 'cudnn')
  }


def _sdpa(name: str, batch: int, shapes, repeats: int) -> Times:
  import torch
  from torch.nn import attention
  from torch.nn.functional import scaled_dot_product_attention

  q, k, v = (_normal(batch, *shape) for shape in shapes)
  backend = {
    'flash': attention.SDPBackend.FLASH_ATTENTION,
    'cudnn': attention.SDPBackend.CUDNN_ATTENTION,
  }[name]
  causal = q.shape[2] > 1

  def run():
    with attention.sdpa_kernel(backend), torch.no_grad():
      scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

  return Times(_time(run, repeats))


def _flashinfer_dense(shapes, repeats: int) -> Times:
  import flashinfer

  # [tokens, heads, dim], its layout NHD.
  q, k, v = (_normal(*shape).transpose(0, 1).contiguous() for shape in shapes)
  attend = flashinfer.single_prefill_with_kv_cache
  run = functools.partial(attend, q, k, v, causal=True, backend='fa3')
  return Times(_time(run, repeats))


def _flashinfer_blocks(mask, block, heads, dim, repeats: int) -> Times:
  mask = mask()
  kv_heads, tiles, _ = mask.shape
  q = _normal(heads, tiles * block, dim)
  k, v = (_normal(kv_heads, tiles * block, dim) for _ in range(2))
  run, plan_ms = listed(mask, block, q, k, v)
  return Times(_time(run, repeats), plan_ms)


def listed(mask: np.ndarray, block: int, q, k, v) -> tuple[Callable, float]:
  """FlashInfer's attention over listed blocks, planned.

  Args:
    mask: bool [K, tiles, tiles], as `blocks` wants it.
    block: tokens of a tile and of a block.
    q: torch tensor [N, S, H].
    k: [K, S, H].
    v: [K, S, H].

  Returns:
    What gives the output [N, S, H], and milliseconds of the plan.
  """
  import flashinfer
  import torch

  listed = torch.from_numpy(mask).cuda()
  kv_heads, tiles, _ = mask.shape
  sizes = torch.full((kv_heads, tiles), block, dtype=torch.int32, device='cuda')
  wrapper = flashinfer.VariableBlockSparseAttentionWrapper(
    _workspace(), backend='fa3'
  )

  def plan():
    # Every (kv head, tile) becomes a sequence whose keys are the listed blocks,
    # so that the causal mask falls on the last of them.
    wrapper.plan(
      listed,
      sizes,
      sizes,
      q.shape[0],
      kv_heads,
      q.shape[2],
      causal=True,
      q_data_type=q.dtype,
    )

  plan_ms = _plan(plan)
  return functools.partial(wrapper.run, q, k, v), plan_ms


def _flashinfer_pages(
  tokens, heads, kv_heads, dim, batch, repeats: int
) -> Times:
  import flashinfer
  import torch

  page = 64
  count = tokens // page
  # Keys and values of a page side by side, its layout NHD.
  pool = _normal(batch * count, 2, page, kv_heads, dim)
  # Large groups and Hopper are served by the tensor-core kernel.
  wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
    _workspace(), 'NHD', use_tensor_cores=True
  )
  starts = torch.arange(batch + 1, dtype=torch.int32, device='cuda') * count
  ids = torch.randperm(batch * count, dtype=torch.int32, device='cuda')
  last = torch.full((batch,), page, dtype=torch.int32, device='cuda')

  def plan():
    wrapper.plan(
      starts,
      ids,
      last,
      heads,
      kv_heads,
      dim,
      page,
      q_data_type=torch.bfloat16,
      kv_data_type=torch.bfloat16,
    )

  plan_ms = _plan(plan)
  run = functools.partial(wrapper.run, _normal(batch, heads, dim), pool)
  return Times(_time(run, repeats), plan_ms)


def _workspace():
  import torch

  # 128 MiB: what FlashInfer's documentation recommends.
  return torch.zeros(2**27, dtype=torch.uint8, device='cuda')


def _plan(plan: Callable[[], None]) -> float:
  """Milliseconds of a second plan: the first one loads the kernel."""
  import torch

  plan()
  torch.cuda.synchronize()
  begin = time.perf_counter()
  plan()
  torch.cuda.synchronize()
  return (time.perf_counter() - begin) * 1e3


def _normal(*shape: int):
  import torch

  return torch.randn(shape, device='cuda', dtype=torch.bfloat16)


def _time(run: Callable, repeats: int) -> tuple[float, ...]:
  """Milliseconds of a call; as many calls a sample as take 20 ms."""
  import torch

  def sample(run, count: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
      run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / count

  sample(run, 1)
  each, calls = sample(run, 2), 1
  if each < _SHORT_MS:
    run, calls = _captured(run), _CALLS
    each = sample(run, 2)
  count = max(1, round(20 / each))
  sample(run, count)
  times = tuple(sample(run, count) / calls for _ in range(repeats))
  torch.cuda.empty_cache()
  return times


def _captured(run: Callable) -> Callable:
  """A graph of `_CALLS` calls, one after the other."""
  import torch

  # Capture wants calls made before it on a stream of their own.
  side = torch.cuda.Stream()
  side.wait_stream(torch.cuda.current_stream())
  with torch.cuda.stream(side):
    run()
  torch.cuda.current_stream().wait_stream(side)
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph):
    for _ in range(_CALLS):
      run()
  return graph.replay
