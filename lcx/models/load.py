"""Import of real models: a Hugging Face folder, or one GGUF file.

Each tensor goes from its file straight into its (sharded) array, one weight at
a time and one shard at a time; the host never holds a second copy of a model.
Every tensor of a file is used and every weight is filled, or the load fails
with their names. Nothing is ever unpickled.
"""

import concurrent.futures
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import numpy as np

from lcx import sharding
from lcx.models import gguf, hf, transformer
from lcx.models.config import ModelConfig
from lcx.models.tokenizer import Tokenizer
from lcx.models.transformer import Weights

# Tensors that some files store although they follow from the config.
_DERIVED = ('rotary_emb.inv_freq', 'attn.masked_bias')


@dataclasses.dataclass(frozen=True)
class Model:
  """A model that can run.

  Attributes:
    config: its numbers.
    weights: its arrays.
    tokenizer: text to tokens and back.
    sha256: of the weight files, hexadecimal.
  """

  config: ModelConfig
  weights: Weights
  tokenizer: Tokenizer
  sha256: str


class Source(Protocol):
  """Tensors of a model file, by their Hugging Face names."""

  @property
  def where(self) -> str:
    """The file or folder, for messages."""
    ...

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor, [outputs inputs] for matrices."""
    ...

  def label(self, name: str) -> str:
    """The name that the file itself uses."""
    ...

  def read(self, name: str, rows: slice) -> np.ndarray:
    """The tensor's rows, [outputs inputs]."""
    ...


def load(path: str | pathlib.Path, dtype: str | None = None, mesh=None):
  """Loads a model.

  Args:
    path: a Hugging Face folder (config.json, safetensors, tokenizer.json) or a
      .gguf file (llama, qwen2 and qwen3 architectures).
    dtype: name of the weights' dtype; None: the one that the folder's config
      names, float32 for a GGUF file.
    mesh: of `lcx.sharding.make_mesh`; None: the default device.

  Returns:
    `Model(config, weights, tokenizer, sha256)`.

  Raises:
    ValueError: the files are missing, cut, damaged or of an unsupported kind;
      one line that says what, where, and what to do.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    source = hf.open_folder(path, dtype)
  elif path.is_file():
    source = gguf.open_file(path, dtype)
  else:
    raise ValueError(
      f'model {str(path)!r} does not exist; give a Hugging Face folder or a '
      '.gguf file'
    )
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    digest = pool.submit(_sha256, source.files)
    tokenizer = source.tokenizer()
    if tokenizer.vocab_size > source.config.vocab_size:
      raise ValueError(
        f'{source.where}: the tokenizer has {tokenizer.vocab_size} tokens, the '
        f'model {source.config.vocab_size}; they are not of one model'
      )
    weights = fill(source, source.config, mesh)
    return Model(source.config, weights, tokenizer, digest.result())


def fill(source: Source, config: ModelConfig, mesh=None) -> Weights:
  """The weights of a source, each made where it lives.

  Raises:
    ValueError: a tensor is missing, left over, or of another shape.
  """
  names = _names(config)
  if config.n_layers > len(source.shapes):  # before anything is sized by it
    raise ValueError(
      f'{source.where}: {config.n_layers} layers, but only '
      f'{len(source.shapes)} tensors; file and config do not belong together'
    )
  _check(source, config, names)
  shapes = transformer.abstract(config)
  specs = transformer.weight_specs(config, mesh)

  def build(group, layer=None):
    part = getattr(shapes, group)
    spec = getattr(specs, group)
    if layer is not None:
      part, spec = part[layer], spec[layer]
    out = {}
    for leaf, shape in part.items():
      full = [n.format(layer) for n in names[group][leaf]]
      reader = _READERS.get(leaf, _plain)
      out[leaf] = _place(reader, source, full, config, shape, spec[leaf], mesh)
    return out

  return Weights(
    embed=build('embed'),
    layers=tuple(build('layers', i) for i in range(config.n_layers)),
    head=build('head'),
  )


def _names(config: ModelConfig) -> dict[str, dict[str, list[str]]]:
  """The source's tensors of each weight."""
  layer = 'model.layers.{}.'
  attention = layer + 'self_attn.'
  layers = {
    'attention_norm': [layer + 'input_layernorm.weight'],
    'qkv': [attention + f'{x}_proj.weight' for x in 'qkv'],
    'o': [attention + 'o_proj.weight'],
    'ff_norm': [layer + 'post_attention_layernorm.weight'],
    'gate_up': [layer + f'mlp.{x}_proj.weight' for x in ('gate', 'up')],
    'down': [layer + 'mlp.down_proj.weight'],
  }
  if config.qkv_bias:
    layers['qkv_bias'] = [attention + f'{x}_proj.bias' for x in 'qkv']
  if config.qk_norm:
    layers['q_norm'] = [attention + 'q_norm.weight']
    layers['k_norm'] = [attention + 'k_norm.weight']
  head = {'norm': ['model.norm.weight']}
  if not config.tie_embeddings:
    head['table'] = ['lm_head.weight']
  return {
    'embed': {'table': ['model.embed_tokens.weight']},
    'layers': layers,
    'head': head,
  }


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Every tensor that the model needs, by its Hugging Face name."""
  d, f, h, v = (
    config.d_model,
    config.d_ff,
    config.head_dim,
    config.vocab_size,
  )
  q, kv = config.n_heads * h, config.n_kv_heads * h
  shapes: dict[str, list[tuple[int, ...]]] = {
    'attention_norm': [(d,)],
    'qkv': [(q, d), (kv, d), (kv, d)],
    'qkv_bias': [(q,), (kv,), (kv,)],
    'q_norm': [(h,)],
    'k_norm': [(h,)],
    'o': [(d, q)],
    'ff_norm': [(d,)],
    'gate_up': [(f, d), (f, d)],
    'down': [(d, f)],
    'table': [(v, d)],
    'norm': [(d,)],
  }
  out: dict[str, tuple[int, ...]] = {}
  for group, leaves in _names(config).items():
    for i in range(config.n_layers if group == 'layers' else 1):
      for leaf, templates in leaves.items():
        for template, shape in zip(templates, shapes[leaf]):
          out[template.format(i)] = shape
  return out


def _check(source, config, names):
  needed, have = tensor_shapes(config), dict(source.shapes)
  tied = 'lm_head.weight'
  if config.tie_embeddings and have.get(tied) is not None:
    _check_tied(source, tied, names['embed']['table'][0])
    del have[tied]
  have = {n: s for n, s in have.items() if not n.endswith(_DERIVED)}
  missing = [source.label(n) for n in needed if n not in have]
  unused = [source.label(n) for n in have if n not in needed]
  if missing or unused:
    said = [f'lacks {_some(missing)}'] if missing else []
    said += [f'has {_some(unused)}, unused'] if unused else []
    raise ValueError(
      f'{source.where}: the model {" and ".join(said)}; the file is damaged '
      'or of another architecture than it says'
    )
  for name, shape in needed.items():
    if have[name] != shape:
      raise ValueError(
        f'{source.where}: tensor {source.label(name)} has shape '
        f'{have[name]}, the config needs {shape}; file and config do not '
        'belong together'
      )


def _check_tied(source, name, embedding, rows=4096):
  """A tied model may store its table twice: the copies must be equal."""
  equal = source.shapes[name] == source.shapes.get(embedding)
  total = source.shapes[name][0] if equal else 0
  for start in range(0, total, rows):
    part = slice(start, min(start + rows, total))
    if not np.array_equal(
      source.read(name, part), source.read(embedding, part)
    ):
      equal = False
      break
  if not equal:
    raise ValueError(
      f'{source.where}: {source.label(name)} differs from '
      f'{source.label(embedding)} although the config ties them; set '
      'tie_word_embeddings to false'
    )


def _some(names, most=8):
  shown = ', '.join(names[:most])
  return shown if len(names) <= most else f'{shown} ... ({len(names)} tensors)'


def _place(reader, source, names, config, shape, spec, mesh):
  """Reads one weight into its array, shard by shard."""
  dtype = np.dtype(shape.dtype)
  done: dict[tuple, np.ndarray] = {}  # replicas read their shard once

  def shard(index):
    index = tuple(s.indices(n)[:2] for s, n in zip(index, shape.shape))
    if index not in done:
      part = reader(source, names, config, [slice(*i) for i in index])
      # A copy in any case: arrays must not keep a file mapped.
      done[index] = np.array(part, dtype, order='C')
    return done[index]

  if mesh is None:
    return jax.device_put(shard([slice(None)] * len(shape.shape)))
  target = sharding.named(mesh, spec)
  return jax.make_array_from_callback(shape.shape, target, shard)


def _plain(source, names, config, index):
  del config
  part = source.read(names[0], index[0])
  return part[:, index[1]] if len(index) == 2 else part


def _qkv(source, names, config, index):
  heads, _, dims, inputs = index
  parts = []
  for name, width in zip(names, (config.group, 1, 1)):
    size = width * config.head_dim
    rows = source.read(name, slice(heads.start * size, heads.stop * size))
    rows = rows.reshape(-1, width, config.head_dim, config.d_model)
    parts.append(rows[:, :, dims, inputs])
  return np.concatenate(parts, axis=1)


def _qkv_bias(source, names, config, index):
  heads, _, dims = index
  parts = []
  for name, width in zip(names, (config.group, 1, 1)):
    size = width * config.head_dim
    rows = source.read(name, slice(heads.start * size, heads.stop * size))
    parts.append(rows.reshape(-1, width, config.head_dim)[:, :, dims])
  return np.concatenate(parts, axis=1)


def _gate_up(source, names, config, index):
  del config
  outputs, which, inputs = index
  parts = [source.read(name, outputs)[:, inputs] for name in names[which]]
  return np.stack(parts, axis=1)


def _o(source, names, config, index):
  outputs, heads, dims = index
  rows = source.read(names[0], outputs)
  return rows.reshape(-1, config.n_heads, config.head_dim)[:, heads, dims]


_READERS: dict[str, Callable] = {
  'qkv': _qkv,
  'qkv_bias': _qkv_bias,
  'gate_up': _gate_up,
  'o': _o,
}


def _sha256(files: Sequence[pathlib.Path]) -> str:
  """Of one file, its SHA-256; of several, that of their digests in order."""
  digests = []
  for path in files:
    with open(path, 'rb') as file:
      digests.append(hashlib.file_digest(file, 'sha256'))
  if len(digests) == 1:
    return digests[0].hexdigest()
  joint = hashlib.sha256()
  for digest in digests:
    joint.update(digest.digest())
  return joint.hexdigest()
