"""The bundled model: small, trained here, finds needles in long contexts.

The folder holds a Hugging Face Llama model (config.json, model.safetensors,
tokenizer.json) and training.json, the record of its training: config, steps,
scores, and the SHA-256 of the weights. `configs/train_needle.py` makes it.
"""

import functools
import hashlib
import json
import pathlib
from typing import Any

from lcx.models import load as loader

FOLDER = pathlib.Path(__file__).parent


@functools.cache
def record() -> dict[str, Any]:
  """training.json.

  Raises:
    ValueError: the package was installed without it.
  """
  path = FOLDER / 'training.json'
  if not path.is_file():
    raise ValueError(f'{str(path)!r} is missing; install lcx with its data')
  return json.loads(path.read_text())


def load(dtype: str | None = None, mesh=None) -> loader.Model:
  """Loads the model, in under a second.

  Args:
    dtype: of the weights; None: bfloat16, as stored. CPUs are quicker with
      'float32'.
    mesh: of `lcx.sharding.make_mesh`; None: the default device.

  Raises:
    ValueError: the weights are not those of the training record, or damaged.
  """
  wanted = record()['sha256']
  raw = (FOLDER / 'model.safetensors').read_bytes()
  if (found := hashlib.sha256(raw).hexdigest()) != wanted:
    raise ValueError(
      f'{str(FOLDER)!r}: the weights have SHA-256 {found}, the training record '
      f'says {wanted}; install lcx again'
    )
  return loader.load(FOLDER, dtype, mesh)
