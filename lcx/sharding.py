"""One table of logical axes over the mesh axes ("data", "seq", "model")."""

import jax
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
    ValueError: an axis is not positive, or there are too few devices.
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
  return jax.make_mesh(
    shape, MESH_AXES, (AxisType.Auto,) * 3, devices=devices[:size]
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
