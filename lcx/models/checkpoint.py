"""Saves and restores a model's weights with orbax.

A checkpoint is a folder: `weights/` (orbax, one array a weight) and
`model.json`, the config, which is written last: without it the checkpoint is
not whole.
"""

import dataclasses
import json
import os
import pathlib

import jax
import orbax.checkpoint as ocp

from lcx import sharding
from lcx.models import transformer
from lcx.models.config import ModelConfig, RopeConfig
from lcx.models.transformer import Weights

_CONFIG = 'model.json'


def save(
  path: str | pathlib.Path, config: ModelConfig, weights: Weights
) -> None:
  """Writes a checkpoint; an older one at the same place is replaced.

  Args:
    path: the folder; made where it is missing.
    config: the model.
    weights: its arrays, on one device or spread over a mesh.

  Raises:
    OSError: the folder cannot be written.
  """
  path = pathlib.Path(path).absolute()
  path.mkdir(parents=True, exist_ok=True)
  (path / _CONFIG).unlink(missing_ok=True)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path / 'weights', _tree(weights), force=True)
  text = json.dumps(dataclasses.asdict(config), indent=2)
  part = path / f'{_CONFIG}.part'
  part.write_text(text + '\n', 'utf-8')
  os.replace(part, path / _CONFIG)


def restore(path: str | pathlib.Path, mesh=None) -> tuple[ModelConfig, Weights]:
  """Reads a checkpoint, each array straight to where it lives.

  Args:
    path: the folder.
    mesh: spreads the weights over it; None: the default device.

  Raises:
    ValueError: the checkpoint is missing, not whole, or does not fit its
      config.
  """
  path = pathlib.Path(path).absolute()
  file = path / _CONFIG
  if not file.is_file():
    raise ValueError(
      f'{str(path)!r} holds no whole checkpoint ({_CONFIG} is missing); save '
      'it again'
    )
  try:
    fields = json.loads(file.read_text('utf-8'))
    rope = fields.pop('rope')
    rope['table'] = tuple(rope['table'])
    config = ModelConfig(**fields, rope=RopeConfig(**rope))
  except (ValueError, TypeError, KeyError, AttributeError) as e:
    raise ValueError(f'{str(file)!r} is damaged ({_line(e)})') from e
  if mesh is None:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = jax.tree.map(lambda _: one, transformer.abstract(config))
  else:
    where = sharding.named(mesh, transformer.weight_specs(config, mesh))
  target = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    transformer.abstract(config),
    where,
  )
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      tree = checkpointer.restore(path / 'weights', _tree(target))
  except (ValueError, KeyError, TypeError, OSError) as e:
    raise ValueError(
      f'{str(path)!r}: the weights are missing, damaged or do not fit the '
      f'config ({_line(e)}); save them again'
    ) from e
  return config, Weights(
    embed=tree['embed'], layers=tuple(tree['layers']), head=tree['head']
  )


def _tree(weights):
  return {
    'embed': weights.embed,
    'layers': list(weights.layers),
    'head': weights.head,
  }


def _line(error):
  return ' '.join(str(error).split())[:200]
