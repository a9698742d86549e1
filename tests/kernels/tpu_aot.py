"""Compiles for TPU on a machine without one: libtpu as a compiler only.

`pip install 'libtpu==0.0.48.*'` (what jax 0.11.2 pins); the CPU stays the
default backend. A kernel that the compiler accepts here fits that chip's VMEM
and SMEM and its instruction set; nothing is said about time.
"""

import functools
import importlib.util
import os

os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
os.environ.setdefault('TPU_WORKER_ID', '0')
os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
# A second process would die on libtpu's lock file.
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

CHIPS = {
  'v5e': 'v5e:2x2',
  'v5p': 'v5p:2x2x1',
  'v6e': 'v6e:2x2',
  'tpu7x': 'tpu7x:2x2x1',
}


def missing() -> str | None:
  """Why this machine cannot compile for TPU, or None."""
  if importlib.util.find_spec('libtpu') is None:
    return "libtpu is missing: pip install 'libtpu==0.0.48.*'"
  return None


@functools.cache
def device(chip: str):
  return topologies.get_topology_desc(
    platform='tpu', topology_name=CHIPS[chip]
  ).devices[0]


def compile_for(chip: str, function, *args, options=None):
  """Compiles function(*args) for one chip.

  Args:
    chip: a key of CHIPS.
    function: to be jitted.
    *args: pytrees of ShapeDtypeStruct.
    options: compiler options.

  Returns:
    jax.stages.Compiled, with memory_analysis() and cost_analysis().
  """
  target = device(chip)
  args = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=SingleDeviceSharding(target)
    ),
    args,
  )
  # Kernels ask `pltpu.get_tpu_info` for the chip through the abstract mesh.
  mesh = Mesh(np.asarray([target]), ('_one',)).abstract_mesh
  with jax.sharding.use_abstract_mesh(mesh):
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=('tpu',))
    return lowered.compile(compiler_options=options)
