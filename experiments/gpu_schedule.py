r"""What the CUDA compiler makes of our Hopper kernels, without a GPU.

  python -m experiments.gpu_schedule

compiles each for an H100 ahead of time, at the sizes of an 8B model, and writes
experiments/results/gpu_schedule.jsonl: registers of a thread, spills, shared
memory of a program, instructions of the kernel. It is a report of what the
compiler did, not a speed. Needs a compiler without a device:

  pip install --no-deps jax-cuda13-plugin==JAX jax-cuda13-pjrt==JAX \
      nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-nvdisasm     (JAX: its version)
"""

import datetime
import glob
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

RESULTS = pathlib.Path(__file__).parent / 'results' / 'gpu_schedule.jsonl'
HEADS, KV_HEADS, TOKENS, PAGE = 32, 8, 2**17, 64
# Kernel, then its numbers: head dim of prompts (block_lse: of XAttention's
# stride 16); bits and queries of decode.
CASES = (
  *(('block_sparse', h) for h in (64, 128, 256)),
  ('passing_block', 128),
  ('block_lse', 128),
  *(('attend_pages', bits, t) for bits in (16, 8, 4) for t in (1, 16)),
  ('attend_tokens', 16, 1),
)
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def missing() -> str | None:
  """What is not installed of the compiler; None: nothing."""
  for name in ('jax_cuda13_plugin', 'jax_plugins.xla_cuda13', 'nvidia.cu13'):
    try:
      if importlib.util.find_spec(name) is None:
        return name
    except ModuleNotFoundError:
      return name
  return None


def _run(kernel: str, numbers: tuple[int, ...]):
  """The kernel's call, and the shapes and dtypes that it takes."""
  import jax.numpy as jnp

  from kernels_pallas import (
    block_scores,
    block_sparse,
    passing_block,
    selected_token,
  )
  from kernels_pallas.keys import Pages

  wide, count = jnp.bfloat16, jnp.int32
  if kernel == 'block_sparse':
    (h,) = numbers
    blocks = TOKENS // 128

    def run(q, k, v, ids, n, row):
      edges = jnp.full((HEADS,), 128, count)
      lists = block_sparse.BlockList(ids, n, edges, edges)
      return block_sparse.block_sparse(
        q, k, v, lists, q_start=row, lengths=row + TOKENS, implementation='gpu'
      )

    keys = ((1, KV_HEADS, TOKENS, h), wide)
    listed = ((1, HEADS, blocks, 64), count), ((1, HEADS, blocks), count)
    return run, (
      ((1, TOKENS, HEADS, h), wide), keys, keys, *listed, ((1,), count)
    )  # fmt: skip
  if kernel == 'passing_block':
    (h,) = numbers
    t, s = 20480, 26624

    def run(q, k, v, start, stop):
      return passing_block.passing_block(
        q, k, v, start, stop, implementation='gpu'
      )

    keys, row = ((1, KV_HEADS, s, h), wide), ((1, t), count)
    return run, (((1, t, HEADS, h), wide), keys, keys, row, row)
  if kernel == 'block_lse':
    (h,) = numbers
    rows = HEADS // KV_HEADS, 512, 16 * h

    def run(rows, cells, last, factor):
      return block_scores.block_lse(
        rows, cells, last, factor, per_block=8, implementation='gpu'
      )

    cells = (1, KV_HEADS, TOKENS // 16, 16 * h), wide
    each = (1, rows[1])
    operands = ((1, KV_HEADS, *rows), wide), cells
    return run, (*operands, (each, count), (each, jnp.float32))
  bits, t = numbers
  kind = {16: wide, 8: jnp.int8, 4: jnp.uint8}[bits]
  pages = TOKENS // PAGE
  pool = KV_HEADS * pages
  codes = ((pool, PAGE, 64 if bits == 4 else 128), kind)
  scales = [((pool, PAGE), jnp.float32)] * {16: 0, 8: 2, 4: 4}[bits]
  width = pages if kernel == 'attend_pages' else 2048
  listed = ((1, KV_HEADS, width), count)
  attend = getattr(selected_token, kernel)

  def run(q, ids, at, q_at, *pool):
    return attend(
      q, Pages(*pool), ids, at, q_positions=q_at, implementation='gpu'
    )

  shapes = ((1, t, HEADS, 128), wide), listed, listed, ((1, t), count)
  return run, (*shapes, codes, codes, *scales)


def _compile(kernel: str, numbers: tuple[int, ...]) -> None:
  """In a child process: the dumps are asked for before the compiler starts."""
  import jax
  from jax.experimental import topologies

  chip = topologies.get_topology_desc(
    platform='cuda', topology_name='h100', topology='1x1x1', target_config=H100
  ).devices[0]
  where = jax.sharding.SingleDeviceSharding(chip)
  device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('one',), abstract_device=device)
  run, specs = _run(kernel, numbers)
  args = [jax.ShapeDtypeStruct(*spec, sharding=where) for spec in specs]
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(run).trace(*args)
    traced.lower(lowering_platforms=('cuda',)).compile()


def read(folder: str) -> dict:
  """What the compiler said of the one kernel that it dumped there."""
  (said,) = glob.glob(f'{folder}/*.ptxas')
  (code,) = glob.glob(f'{folder}/*.sass*')
  (memory,) = glob.glob(f'{folder}/*.resources.txt')
  text = pathlib.Path(said).read_text()
  registers = re.search(r'Used (\d+) registers', text)
  spills = re.search(r'(\d+) bytes spill stores', text)
  shared = re.search(
    r'smem_scratch_bytes=(\d+)', pathlib.Path(memory).read_text()
  )
  if not registers or not spills or not shared:
    raise ValueError(f'{said} is no report of the CUDA assembler: {text[:200]}')
  lines = pathlib.Path(code).read_text().split('\n')
  address = re.compile(r'/\*[0-9a-f]{4,}\*/')
  return {
    'registers': int(registers[1]),
    'spill_stores_bytes': int(spills[1]),
    'shared_bytes': int(shared[1]),
    'instructions': sum(bool(address.search(line)) for line in lines),
  }


def row(kernel: str, *numbers: int) -> dict:
  """Compiles in a child and reads its dumps."""
  nvidia = importlib.util.find_spec('nvidia.cu13')
  if nvidia is None or not nvidia.submodule_search_locations:
    raise ValueError('nvidia-cuda-nvcc is not installed')
  (cuda,) = nvidia.submodule_search_locations
  with tempfile.TemporaryDirectory() as folder:
    subprocess.run(
      [sys.executable, '-m', 'experiments.gpu_schedule', kernel]
      + [str(n) for n in numbers],
      env={
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'MOSAIC_GPU_DUMP_TO': folder,
        'MOSAIC_GPU_DUMP_PTXAS': '1',
        'MOSAIC_GPU_DUMP_SASS': '1',
        'PATH': f'{cuda}/bin:{os.environ["PATH"]}',
      },
      check=True,
      timeout=600,
      capture_output=True,
    )
    found = read(folder)
  names = ('head_dim',) if len(numbers) == 1 else ('bits', 'queries')
  return {
    'kernel': kernel,
    'chip': 'H100',
    **dict(zip(names, numbers, strict=True)),
    **found,
    'versions': {
      name: importlib.metadata.version(name)
      for name in ('jax', 'jax-cuda13-pjrt', 'nvidia-cuda-nvcc')
    },
    'command': 'python -m experiments.gpu_schedule',
    'date': datetime.date.today().isoformat(),
  }


def main(argv: list[str]) -> None:
  """Writes all rows; with a case as arguments, compiles that one."""
  if len(argv) > 1:
    _compile(argv[1], tuple(int(n) for n in argv[2:]))
    return
  if absent := missing():
    sys.exit(f'error: {absent} is not installed: see the head of this file')
  rows = []
  for case in CASES:
    rows.append(row(*case))
    print(json.dumps(rows[-1]), flush=True)
  RESULTS.write_text(''.join(json.dumps(r) + '\n' for r in rows))


if __name__ == '__main__':
  main(sys.argv)
