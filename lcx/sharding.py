"""One table of logical axes over the mesh axes ("data", "seq", "model")."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ('data', 'seq', 'model')

# Which mesh axis splits a logical axis. None: every device holds it whole.
LOGICAL_AXES: dict[str, str | None] = {
  'batch': 'data',
  'seq': 'seq',
  'heads': 'model',
  'kv_heads': 'model',
  'ff': 'model',
  'vocab': 'model',
  'embed': None,
  'head_dim': None,
}


def make_mesh(data: int = 1, seq: int = 1, model: int = 1) -> Mesh:
  """A mesh over the first data * seq * model devices.

  Axes are Auto: the default of jax 0.11, Explicit, rejects unsharded inputs.

  Raises:
    ValueError: an axis is not positive, there are too few devices, or, with
      several processes, the mesh leaves some of their devices out.
  """
  shape = (data, seq, model)
  if min(shape) < 1:
    raise ValueError(f'mesh {data=} {seq=} {model=} must all be at least 1')
  size = data * seq * model
  devices = jax.devices()
  if size > len(devices):
    raise ValueError(
      f'mesh {data=} x {seq=} x {model=} needs {size} devices; '
      f'this process has {len(devices)}'
    )
  if size != len(devices) and jax.process_count() > 1:
    raise ValueError(
      f'mesh {data=} x {seq=} x {model=} has {size} devices, the '
      f'{jax.process_count()} processes have {len(devices)}: use all of them'
    )
  return jax.make_mesh(
    shape, MESH_AXES, (AxisType.Auto,) * 3, devices=devices[:size]
  )


def one_device() -> Mesh:
  """A mesh of this process' first device: each process for itself."""
  return jax.make_mesh(
    (1, 1, 1),
    MESH_AXES,
    (AxisType.Auto,) * 3,
    devices=jax.local_devices()[:1],
  )


def spec(*logical_axes: str | None) -> PartitionSpec:
  """The partition of an array whose axes have these logical names.

  Raises:
    ValueError: a name that the table lacks.
  """
  for axis in logical_axes:
    if axis is not None and axis not in LOGICAL_AXES:
      raise ValueError(
        f'logical axis {axis!r} is unknown; known: {sorted(LOGICAL_AXES)}'
      )
  return PartitionSpec(
    *(None if axis is None else LOGICAL_AXES[axis] for axis in logical_axes)
  )


def named(mesh: Mesh, specs):
  """A pytree of `PartitionSpec` as a pytree of `NamedSharding`."""
  return jax.tree.map(
    lambda s: NamedSharding(mesh, s),
    specs,
    is_leaf=lambda s: isinstance(s, PartitionSpec),
  )


def fitted(mesh: Mesh, specs, arrays):
  """`named`, for arrays of which several may stand for one.

  What stands for an array, as codes and scales do for a matrix of low-bit
  weights, lives where it would, but for the axes that the mesh does not divide.
  """

  def one(spec, part):
    def fit(x):
      axes = (*spec, *(None,) * (x.ndim - len(spec)))
      kept = [
        axis if axis is None or n % mesh.shape[axis] == 0 else None
        for axis, n in zip(axes, x.shape, strict=True)
      ]
      return NamedSharding(mesh, PartitionSpec(*kept))

    return jax.tree.map(fit, part)

  return jax.tree.map(
    one, specs, arrays, is_leaf=lambda s: isinstance(s, PartitionSpec)
  )


def place(x, shardings):
  """Arrays of this host, the same on every process, spread over a mesh.

  `jax.device_put` compares hosts' copies by sending them round; this does not.
  """

  def one(x, where):
    if where.is_fully_addressable:
      return jax.device_put(x, where)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return jax.device_put(x, where)  # lives on the mesh already
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda i: x[i])

  if isinstance(shardings, NamedSharding):
    return jax.tree.map(lambda x: one(x, shardings), x)
  return jax.tree.map(one, x, shardings)


def to_host(x) -> np.ndarray:
  """The whole array in every process, wherever its pieces live."""
  if (
    isinstance(x, jax.Array)
    and isinstance(x.sharding, NamedSharding)
    and not (x.is_fully_addressable or x.is_fully_replicated)
  ):
    whole = NamedSharding(x.sharding.mesh, PartitionSpec())
    x = jax.jit(lambda x: x, out_shardings=whole)(x)
  return np.asarray(x)
