"""Retaining heads: trained scores of which keys later tokens will attend to.

Huang et al., "Locret", arXiv:2410.01805; the compressor of APB (2502.12085,
section 3.4). One small network a layer, shared by its heads, reads each token's
queries, keys and values before rotation and gives one score a kv head:

  score = silu([q, k, v] first) second          first: (N + 2 K) H -> W, W -> K

both without bias, W = 1024 in the released code. `lcx/train/retaining_head.py`
trains them; a file holds those of one model.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from lcx.head_profile import fingerprint
from lcx.models.config import ModelConfig
from lcx.models.transformer import merge_qkv

Heads = dict[str, Any]


def score(
  heads: Heads,
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T K H'],
  model_axis: str | None = None,
) -> Float[Array, 'B T K']:
  """float32 scores of each token, a kv head.

  Args:
    heads: 'first' [K G+2 H W] and 'second' [W K] of one layer.
    q: unrotated queries.
    k: unrotated keys.
    v: values.
    model_axis: mesh axis that splits the heads inside `shard_map`.
  """
  inputs = merge_qkv(q, k, v)
  first, second = (heads[n].astype(inputs.dtype) for n in ('first', 'second'))
  hidden = jnp.einsum(
    'btkch,kchw->btw', inputs, first, preferred_element_type=jnp.float32
  )
  if model_axis is not None and jax.lax.axis_size(model_axis) > 1:
    hidden = jax.lax.psum(hidden, model_axis)
  hidden = jax.nn.silu(hidden).astype(inputs.dtype)
  return jnp.einsum(
    'btw,wk->btk', hidden, second, preferred_element_type=jnp.float32
  )


def specs(model_axis: str) -> Heads:
  """Where one layer's arrays live."""
  return {'first': P(model_axis), 'second': P(None, model_axis)}


def init(config: ModelConfig, width: int, key: jax.Array) -> Heads:
  """Random heads of all layers: 'first' [L K G+2 H W], 'second' [L W K]."""
  a, b = jax.random.split(key)
  layers, kv, dim = config.n_layers, config.n_kv_heads, config.head_dim
  inputs = (config.n_heads + 2 * kv) * dim
  first = (layers, kv, config.group + 2, dim, width)
  return {
    'first': jax.random.normal(a, first) * inputs**-0.5,
    'second': jax.random.normal(b, (layers, width, kv)) * width**-0.5,
  }


@dataclasses.dataclass(frozen=True, eq=False)
class RetainingHeads:
  """The heads of one model, as in a file.

  Attributes:
    arrays: 'first' [L K G+2 H W], 'second' [L W K].
    about: 'architecture' and 'sha256' of the model, its name, the recipe.
  """

  arrays: dict[str, np.ndarray]
  about: dict[str, Any]

  def check(self, config: ModelConfig) -> None:
    """Raises ValueError where the heads are another model's."""
    if self.about['architecture'] != fingerprint(config):
      raise ValueError(
        'the retaining heads are of another model '
        f'({self.about.get("model") or "unnamed"}): train some for this one'
      )

  def layers(self) -> tuple[Heads, ...]:
    """One dict a layer."""
    return tuple(
      {name: x[i] for name, x in self.arrays.items()}
      for i in range(len(self.arrays['first']))
    )

  def to_bytes(self) -> bytes:
    """The file's content (safetensors)."""
    about = {'lcx': json.dumps(self.about, sort_keys=True)}
    return safetensors.numpy.save(self.arrays, about)


@functools.lru_cache(maxsize=4)
def load(path: str) -> RetainingHeads:
  """Reads a file; one process reads it once.

  Raises:
    ValueError: no such file, or it holds no retaining heads.
  """
  where = pathlib.Path(path).expanduser()
  if not path or not where.is_file():
    raise ValueError(
      f'retaining heads {path!r} do not exist; train some with '
      'configs/train_retaining_head.py'
    )
  try:
    with safetensors.safe_open(str(where), 'np') as file:
      about = json.loads(file.metadata()['lcx'])
      arrays = {n: file.get_tensor(n) for n in ('first', 'second')}
    about['architecture'], about['sha256']
    if len(arrays['first']) != len(arrays['second']):
      raise ValueError('layers differ')
  except (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    safetensors.SafetensorError,
  ) as error:
    raise ValueError(f'{path!r} holds no retaining heads: {error}') from error
  return RetainingHeads(arrays, about)
