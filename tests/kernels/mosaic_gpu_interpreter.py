"""Runs the Hopper kernels on a CPU, in Pallas' interpreter for Mosaic GPU.

JAX 0.11.2's interpreter lacks three things that the kernels use, and
`installed()` adds them for a while: a matrix product whose left operand lies in
registers, a store to an accumulator, and `pl.run_state` over one. A copy that
is never waited for shows as NaN: shared memory starts as NaN.

It gives each member of a RefUnion memory of its own, so the int4 path, which
writes words and reads them as bfloat16, cannot run here.
"""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import callback
from jax._src import core as jax_core
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as calls
from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret, shared_memory
from jax._src.state import discharge
from jax._src.state import types as state_types
from jax.experimental.pallas import mosaic_gpu as plgpu

Interpreter = jaxpr_interpret.JaxprInterpreter
_shared_operands = Interpreter._interpret_wgmma_ref_p
_interpret = Interpreter.interpret


@contextlib.contextmanager
def installed():
  """Hopper kernels that are traced in here are interpreted."""
  with (
    mock.patch.object(Interpreter, '_interpret_wgmma_ref_p', _wgmma),
    mock.patch.object(Interpreter, 'interpret', _with_accumulators),
    mock.patch.object(shared_memory.Barrier, 'deallocate', _deallocate),
    plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()),
  ):
    yield


def _deallocate(self):
  """Without the wish that every thread has seen every phase.

  The ring's last tiles are given back and nobody refills them.
  """
  with self.cv:
    self.ref_count -= 1
    if self.ref_count == 0 and self.arrivals_count:
      raise ValueError(f'{self.arrivals_count} arrivals are pending')


def _wgmma(self, eqn, token, get_invals):
  """acc += a @ b; a may be a value in registers."""
  if isinstance(eqn.invars[1].aval, state_types.AbstractRef):
    return _shared_operands(self, eqn, token, get_invals)
  acc, a, b, *leaves = get_invals()
  transforms = jax.tree.unflatten(eqn.params['b_transforms_tree'], leaves)
  b, transforms = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, b, transforms)
  token = callback.io_callback(
    calls.fail_on_exception(_multiply),
    calls.TOKEN_SHAPE_DTYPE,
    token=token,
    mesh_location=self.mesh_location,
    thread=self.thread,
    acc=acc,
    a=a,
    b=b,
    transforms=transforms,
  )
  return token, []


def _multiply(*, token, mesh_location, thread, acc, a, b, transforms):
  memory = calls._get_shared_memory()
  told = shared_memory.GPULoggingInfo(mesh_location, thread, None)
  acc, b = (calls.HostAllocationKey.from_array(x) for x in (acc, b))
  there = memory.access(
    b, jax.tree.map(int, calls._remove_noop_transforms(transforms))
  )
  here = memory.access(acc, ())
  read = functools.partial(memory.get_buffer_content, logging_info=told)
  right, _, _ = read(b, there, thread)
  old, _, _ = read(acc, here, thread)
  new = old + np.matmul(np.asarray(a), right, dtype=old.dtype)
  memory.store_buffer_content(acc, here, new, thread, logging_info=told)
  return token


def _store(self, eqn, token, invals):
  """acc = value."""
  acc, value = invals
  token = callback.io_callback(
    calls.fail_on_exception(_put),
    calls.TOKEN_SHAPE_DTYPE,
    token=token,
    mesh_location=self.mesh_location,
    thread=self.thread,
    acc=acc,
    value=value,
  )
  return token, [value]


def _put(*, token, mesh_location, thread, acc, value):
  memory = calls._get_shared_memory()
  told = shared_memory.GPULoggingInfo(mesh_location, thread, None)
  acc = calls.HostAllocationKey.from_array(acc)
  memory.store_buffer_content(
    acc, memory.access(acc, ()), np.asarray(value), thread, logging_info=told
  )
  return token


def _with_accumulators(self, jaxpr, token, *args):
  """`interpret`, between the equations that it lacks, and those themselves."""
  if not any(e.primitive in _LACKING for e in jaxpr.eqns):
    return _interpret(self, jaxpr, token, *args)
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], args))

  def read(x):
    return x.val if isinstance(x, jax_core.Literal) else env[x]

  def flush(token, eqns):
    made = {v for e in eqns for v in e.outvars}
    used = {
      v
      for e in eqns
      for v in e.invars
      if not isinstance(v, jax_core.Literal) and v not in made
    }
    invars = list(used)
    outvars = [v for v in made if not isinstance(v, jax_core.DropVar)]
    piece = jax_core.Jaxpr((), invars, outvars, eqns, jaxpr.effects)
    token, out = _interpret(self, piece, token, *map(read, invars))
    env.update(zip(outvars, out))
    return token

  between = []
  for eqn in jaxpr.eqns:
    if eqn.primitive not in _LACKING:
      between.append(eqn)
      continue
    token = flush(token, between)
    between = []
    run = _LACKING[eqn.primitive]
    token, out = run(self, eqn, token, list(map(read, eqn.invars)))
    env.update(zip(eqn.outvars, out))
  token = flush(token, between)
  return token, list(map(read, jaxpr.outvars))


def _run_state(self, eqn, token, invals):
  """Operands that are values become accumulators, and are read in the end."""
  inner = eqn.params['jaxpr']
  here = {
    'mesh_location': self.mesh_location,
    'thread': self.thread,
    'source_info': eqn.source_info,
  }
  space = shared_memory.get_memory_space_idx(gpu_core.MemorySpace.REGS)
  keys, own = [], []
  for var, value in zip(eqn.invars, invals):
    if isinstance(var.aval, state_types.AbstractRef):
      keys.append(value)
      own.append(False)
      continue
    token, request = calls.call_make_allocation_request_array(
      token=token,
      compute_unit=self.thread,
      memory_space_id=space,
      initial_ref_count=1,
    )
    token, key = calls.call_allocate_buffer(
      token=token,
      allocation_request_as_array=request,
      value=jnp.asarray(value),
      **here,
    )
    keys.append(key)
    own.append(True)
  token, _ = self.interpret(inner, token, *keys)
  out = []
  for var, key, mine in zip(eqn.outvars, keys, own):
    if not mine:
      out.append(key)
      continue
    token, value = callback.io_callback(
      functools.partial(
        calls.wgmma_accumulator_deref, source_info=eqn.source_info
      ),
      (calls.TOKEN_SHAPE_DTYPE, var.aval),
      token=token,
      mesh_location=self.mesh_location,
      thread=self.thread,
      acc_allocation_key_as_array=key,
      wait_n=None,
    )
    token = calls.call_deallocate_buffer(
      token=token, allocation_key_as_array=key, **here
    )
    out.append(value)
  return token, out


_LACKING = {
  discharge.run_state_p: _run_state,
  primitives.wgmma_accumulator_store_p: _store,
}
