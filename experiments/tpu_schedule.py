"""The TPU compiler's own schedule of our kernel beside JAX's splash attention.

  python -m experiments.tpu_schedule

compiles both ahead of time (libtpu as a compiler, no TPU needed) with the same
block sizes, reads the VLIW bundles that the compiler dumped and writes
experiments/results/tpu_schedule.jsonl. A bundle is one instruction word, one
cycle without stalls: a report of static schedules, not a speed (it leaves out
DMA and counts each branch once).

Row: kernel, chip, block_q, block_k, bundles (whole kernel), bundles_block (of
an unmasked visit of block_q x block_k), bundles_masked (None where there is no
second branch), mxu_ideal (matmul cycles of a block at the chip's peak),
spill_stores, vmem_bytes (declared buffers), versions, date.
"""

import datetime
import glob
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

RESULTS = pathlib.Path(__file__).parent / 'results' / 'tpu_schedule.jsonl'
HEADS, KV_HEADS, HEAD_DIM, TOKENS = 32, 8, 128, 8192
CASES = [
  (chip, block_q, block_k)
  for chip in ('v5e', 'v6e')
  for block_q, block_k in ((512, 512), (256, 256))
]
NAMES = {'lcx': 'lcx_block_attention', 'splash': 'splash_mha_fwd'}
# bfloat16 FLOPs a cycle: MXUs x rows x columns x 2 (v5e 4 of 128 x 128, v6e 2
# of 256 x 256).
FLOPS_PER_CYCLE = {'v5e': 4 * 128 * 128 * 2, 'v6e': 2 * 256 * 256 * 2}


def _compile(kernel: str, chip: str, block_q: int, block_k: int) -> None:
  """In a child process: the dump is asked for before libtpu starts."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.experimental import topologies
  from jax.experimental.pallas.ops.tpu import splash_attention as splash
  from jax.sharding import Mesh, SingleDeviceSharding

  from kernels_pallas import block_sparse as family

  device = topologies.get_topology_desc(
    platform='tpu', topology_name=f'{chip}:2x2'
  ).devices[0]

  def shape(dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(
      dims, dtype, sharding=SingleDeviceSharding(device)
    )

  if kernel == 'lcx':

    def run(q, k, v):
      blocks = family.mixed(
        jnp.zeros(HEADS, jnp.int32),
        jnp.full(HEADS, family.EVERYTHING, jnp.int32),
        *(1, TOKENS),
        block_q=block_q,
        block_k=block_k,
      )
      return family.block_sparse(
        q,
        k,
        v,
        blocks,
        implementation='tpu',
        block_sizes={'step_keys': block_k},
      )

    args = (
      shape((1, TOKENS, HEADS, HEAD_DIM)),
      *[shape((1, KV_HEADS, TOKENS, HEAD_DIM))] * 2,
    )
  else:
    mask = splash.splash_attention_mask
    run = splash.splash_attention_kernel.make_splash_mha(
      mask.MultiHeadMask([mask.CausalMask((TOKENS, TOKENS))] * HEADS),
      block_sizes=splash.splash_attention_kernel.BlockSizes(
        block_q=block_q, block_kv=block_k, block_kv_compute=block_k
      ),
      head_shards=1,
      q_seq_shards=1,
      save_residuals=True,
    )
    args = (
      shape((HEADS, TOKENS, HEAD_DIM)),
      *[shape((KV_HEADS, TOKENS, HEAD_DIM))] * 2,
    )
  mesh = Mesh(np.asarray([device]), ('_one',)).abstract_mesh
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(run).trace(*args)
    traced.lower(lowering_platforms=('tpu',)).compile()


def read(path: str) -> dict:
  """Summarises one per-bundle utilisation dump.

  Our kernel holds two copies of a block's work, without and with the mask; the
  matmuls of a kernel are about as many in both, so that one ends at the longest
  idle time of the matrix units near the half of them. Splash has one.
  """
  lines = pathlib.Path(path).read_text().split('\n')
  columns = [name.strip() for name in lines[1].split(',')]
  rows = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
  mxu = columns.index('MXU')
  work = [(i, row[mxu]) for i, row in enumerate(rows) if row[mxu]]
  seen, split, longest = 0, 0, 0
  for at, (i, busy) in enumerate(work[:-1]):
    seen += busy
    idle = work[at + 1][0] - i
    if 0.4 < seen / sum(w for _, w in work) < 0.6 and idle > longest:
      split, longest = at, idle
  first, last = work[0][0], work[-1][0]
  spill = columns.index('VSTORE:SPILL')
  return {
    'bundles': len(rows),
    'span': last - first + 1,
    'branches': sorted(
      (work[split][0] - first + 1, last - work[split + 1][0] + 1)
    ),
    'spill_stores': sum(row[spill] for row in rows),
  }


def row(kernel: str, chip: str, block_q: int, block_k: int) -> dict:
  """Compiles in a child and reads its dump."""
  with tempfile.TemporaryDirectory() as folder:
    env = {
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'TPU_SKIP_MDS_QUERY': '1',
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'TPU_WORKER_ID': '0',
      'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      'LIBTPU_INIT_ARGS': f'--xla_jf_dump_to={folder} '
      '--xla_jf_dump_llo_text=true',
    }
    case = [kernel, chip, str(block_q), str(block_k)]
    subprocess.run(
      [sys.executable, '-m', 'experiments.tpu_schedule', *case],
      env=env,
      check=True,
      timeout=900,
    )
    (dump,) = glob.glob(
      f'{folder}/*-{NAMES[kernel]}*-final_hlo-static-per-bundle-utilization.txt'
    )
    found = read(dump)
  ours = kernel == 'lcx'
  cycles = 4 * block_q * block_k * HEAD_DIM / FLOPS_PER_CYCLE[chip]
  return {
    'kernel': kernel,
    'chip': chip,
    'block_q': block_q,
    'block_k': block_k,
    'bundles': found['bundles'],
    'bundles_block': found['branches'][0] if ours else found['span'],
    'bundles_masked': found['branches'][1] if ours else None,
    'mxu_ideal': cycles,
    'spill_stores': found['spill_stores'],
    # Two stages of keys and values, two of q and out, the accumulator, a
    # row's maximum and sum; ours has its two bounds, too.
    'vmem_bytes': (4 * block_k + 4 * block_q) * HEAD_DIM * 2
    + 4 * block_q * (HEAD_DIM + (4 if ours else 2) * 128),
    'versions': {
      name: importlib.metadata.version(name) for name in ('jax', 'libtpu')
    },
    'command': 'python -m experiments.tpu_schedule',
    'date': datetime.date.today().isoformat(),
  }


def main(argv: list[str]) -> None:
  """Writes all rows; with a case as arguments, compiles that one."""
  if len(argv) == 5:
    _compile(argv[1], argv[2], int(argv[3]), int(argv[4]))
    return
  RESULTS.parent.mkdir(exist_ok=True)
  rows = []
  for case in CASES:
    for kernel in NAMES:
      rows.append(row(kernel, *case))
      print(json.dumps(rows[-1]), flush=True)
      RESULTS.write_text(''.join(json.dumps(r) + '\n' for r in rows))


if __name__ == '__main__':
  main(sys.argv)
