"""Saves and restores a model's weights with orbax.

A checkpoint is a folder: the weights (orbax, one array a weight) in a folder of
their own, and `model.json`, the config, which names that folder and is written
last and at once: a kill during a save leaves the checkpoint before it.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil

import jax
import orbax.checkpoint as ocp

from lcx import sharding
from lcx.models import transformer
from lcx.models.config import ModelConfig, RopeConfig
from lcx.models.transformer import Weights

_CONFIG, _WEIGHTS = 'model.json', 'weights-'


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
  before = sorted(path.glob(f'{_WEIGHTS}*'))
  taken = {folder.name for folder in before}
  name = next(
    n for i in itertools.count() if (n := f'{_WEIGHTS}{i}') not in taken
  )
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path / name, _tree(weights))
  text = json.dumps(dataclasses.asdict(config) | {'weights': name}, indent=2)
  part = path / f'{_CONFIG}.part'
  part.write_text(text + '\n', 'utf-8')
  os.replace(part, path / _CONFIG)
  for folder in before:  # the checkpoint before, and what kills left
    shutil.rmtree(folder)


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
    rope, name = fields.pop('rope'), pathlib.Path(fields.pop('weights')).name
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
      tree = checkpointer.restore(path / name, _tree(target))
  except Exception as e:  # of a cut file, orbax says so by a bare Exception
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
