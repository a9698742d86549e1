"""A Hugging Face folder: config.json, safetensors, tokenizer.json."""

import json
import pathlib

import numpy as np
import safetensors

from lcx.models.config import ModelConfig, RopeConfig
from lcx.models.tokenizer import Tokenizer, from_folder

# What sets a family apart from plain Llama.
_FAMILIES: dict[str, dict[str, bool]] = {
  'LlamaForCausalLM': {},
  'MistralForCausalLM': {},
  'Qwen2ForCausalLM': {'qkv_bias': True},
  'Qwen3ForCausalLM': {'qk_norm': True},
}

# Fields that change the computation, with the only value that is supported.
_ONLY = {
  'hidden_act': 'silu',
  'mlp_bias': False,
  'attention_bias': False,
  'partial_rotary_factor': 1.0,
  'quantization_config': None,
  'is_encoder_decoder': False,
}

_DTYPES = ('F32', 'F16', 'BF16')


def open_folder(path: pathlib.Path, dtype: str | None = None) -> 'Folder':
  """Opens a folder; reads its config and the headers of its weights.

  Raises:
    ValueError: a file is missing or damaged, or the model is not supported.
  """
  raw = read_json(path / 'config.json')
  return Folder(path, parse_config(raw, str(path / 'config.json'), dtype))


def read_json(path: pathlib.Path) -> dict:
  """A JSON object of a file.

  Raises:
    ValueError: the file is missing or no JSON object.
  """
  if not path.is_file():
    raise ValueError(
      f'{str(path)!r} is missing; download the whole model folder'
    )
  try:
    value = json.loads(path.read_text('utf-8'))
  except (ValueError, RecursionError) as e:
    raise ValueError(
      f'{str(path)!r} is not JSON ({_line(e)}); download it again'
    ) from e
  if not isinstance(value, dict):
    raise ValueError(f'{str(path)!r} is not a JSON object; download it again')
  return value


def parse_config(
  raw: dict, where: str, dtype: str | None = None
) -> ModelConfig:
  """`ModelConfig` of a config.json.

  Raises:
    ValueError: the architecture, or something that it asks for, is not
      supported.
  """
  family = (raw.get('architectures') or [None])[0]
  if family not in _FAMILIES:
    raise ValueError(
      f'{where}: architecture {family!r} is not supported; supported: '
      f'{sorted(_FAMILIES)}'
    )
  for name, only in _ONLY.items():
    if raw.get(name, only) not in (only, None):
      raise ValueError(
        f'{where}: {name}={raw[name]!r} is not supported; only {only!r} is'
      )
  dtype = dtype or raw.get('dtype') or raw.get('torch_dtype') or 'float32'
  try:
    n_heads, d_model = raw['num_attention_heads'], raw['hidden_size']
    max_position = raw['max_position_embeddings']
    return ModelConfig(
      vocab_size=raw['vocab_size'],
      d_model=d_model,
      n_layers=raw['num_hidden_layers'],
      n_heads=n_heads,
      n_kv_heads=raw.get('num_key_value_heads') or n_heads,
      head_dim=raw.get('head_dim') or d_model // n_heads,
      d_ff=raw['intermediate_size'],
      norm_eps=float(raw['rms_norm_eps']),
      # The default of transformers' LlamaConfig and its kin.
      tie_embeddings=bool(raw.get('tie_word_embeddings', False)),
      sliding_window=_sliding_window(raw, family, where),
      max_position=max_position,
      rope=_rope(raw, max_position, where),
      dtype=dtype,
      **_FAMILIES[family],
    )
  except KeyError as e:
    raise ValueError(
      f'{where} lacks the field {e}; download the whole model folder'
    ) from e
  except (TypeError, AttributeError, ZeroDivisionError) as e:
    raise ValueError(
      f'{where}: a field has the wrong type ({_line(e)}); download it again'
    ) from e
  except ValueError as e:
    raise ValueError(e if where in str(e) else f'{where}: {e}') from e


def _sliding_window(raw, family, where):
  window = raw.get('sliding_window')
  kinds = raw.get('layer_types')
  if family == 'LlamaForCausalLM' or window is None:
    return None
  if kinds is None and family in ('Qwen2ForCausalLM', 'Qwen3ForCausalLM'):
    if not raw.get('use_sliding_window', False):
      return None
    first = raw.get('max_window_layers', 28)
    layers = range(raw['num_hidden_layers'])
    kinds = ['full' if i < first else 'sliding' for i in layers]
  sliding = {str(kind).startswith('sliding') for kind in kinds or ['sliding']}
  if len(sliding) > 1:
    raise ValueError(
      f'{where}: layers with and without a sliding window are not supported; '
      'set use_sliding_window to false to attend to everything'
    )
  return window if sliding == {True} else None


def _rope(raw, max_position, where):
  # transformers 5 has rope_parameters; before, rope_theta and rope_scaling.
  given = raw.get('rope_parameters') or raw.get('rope_scaling') or {}
  kind = given.get('rope_type') or given.get('type') or 'default'
  kind = {'default': 'none'}.get(kind, kind)
  if kind not in ('none', 'linear', 'dynamic', 'yarn', 'llama3'):
    raise ValueError(
      f'{where}: rope scaling {kind!r} is not supported; supported: '
      'linear, dynamic, yarn, llama3'
    )
  theta = given.get('rope_theta', raw.get('rope_theta', 10000.0))
  if kind == 'none':
    return RopeConfig(theta=float(theta))
  original = given.get('original_max_position_embeddings')
  if kind == 'dynamic' or original is None:
    original = max_position
  # A null factor: the ratio of the lengths (transformers' yarn).
  factor = given.get('factor') or max_position / original
  same = {
    name: given[name]
    for name in (
      'beta_fast', 'beta_slow', 'truncate', 'attention_factor', 'mscale',
      'mscale_all_dim', 'low_freq_factor', 'high_freq_factor',
    )
    if given.get(name) is not None
  }  # fmt: skip
  return RopeConfig(
    theta=float(theta),
    kind=kind,
    factor=float(factor),
    original_max=int(original),
    **same,
  )


class Folder:
  """The tensors and the tokenizer of a Hugging Face folder."""

  def __init__(self, path: pathlib.Path, config: ModelConfig):
    self.path, self.config = path, config
    self.where = str(path)
    self.files = _weight_files(path)
    self._handles: dict[str, safetensors.safe_open] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    for file in self.files:
      self._open(file)

  def _open(self, file):
    try:
      handle = safetensors.safe_open(file, 'numpy')
      for name in handle.keys():  # noqa: SIM118 (it is no dict)
        part = handle.get_slice(name)
        if part.get_dtype() not in _DTYPES:
          raise ValueError(
            f'{str(file)!r}: tensor {name} has dtype {part.get_dtype()}; '
            f'supported: {", ".join(_DTYPES)}'
          )
        if name in self._handles:
          raise ValueError(f'{self.where}: tensor {name} is in two files')
        self._handles[name] = handle
        self.shapes[name] = tuple(part.get_shape())
    except (safetensors.SafetensorError, OSError) as e:
      raise ValueError(
        f'{str(file)!r} is cut or damaged ({_line(e)}); download it again'
      ) from e

  def label(self, name: str) -> str:
    return name

  def read(self, name: str, rows: slice) -> np.ndarray:
    try:
      return self._handles[name].get_slice(name)[rows]
    except safetensors.SafetensorError as e:
      raise ValueError(
        f'{self.where}: tensor {name} cannot be read ({_line(e)}); download '
        'the folder again'
      ) from e

  def tokenizer(self) -> Tokenizer:
    return from_folder(self.path)


def _weight_files(path):
  index = path / 'model.safetensors.index.json'
  if index.is_file():
    table = read_json(index).get('weight_map')
    if not isinstance(table, dict):
      raise ValueError(f'{str(index)!r} lacks weight_map; download it again')
    names = sorted(set(map(str, table.values())))
  else:
    names = ['model.safetensors']
  files = [path / pathlib.Path(name).name for name in names]
  missing = [file.name for file in files if not file.is_file()]
  if missing:
    hint = (
      '; pickled weights (.bin) are not read: convert them to safetensors'
      if any(path.glob('*.bin'))
      else '; download the whole model folder'
    )
    raise ValueError(f'{str(path)!r} lacks {", ".join(missing)}{hint}')
  return files


def _line(error):
  return ' '.join(str(error).split())[:200]
