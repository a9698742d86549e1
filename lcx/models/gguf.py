"""GGUF files (llama.cpp's format, versions 2 and 3).

The header is read here, strictly: every count, length and offset is checked
against the file, so that a damaged file is refused instead of read wrongly.
The format is described in ggml's docs/gguf.md. Dequantisation is the `gguf`
package's.
"""

import pathlib
import re
import struct
from typing import Any, NamedTuple

import numpy as np

from lcx.models.config import ModelConfig, RopeConfig
from lcx.models.rope import attention_factor
from lcx.models.tokenizer import Tokenizer, from_gguf

# Architecture -> whether q and k rows are permuted: llama files pair dimension
# 2i with 2i + 1 in rotation (llama.cpp's convert_hf_to_gguf.py, `permute`).
_ARCHITECTURES = {'llama': True, 'qwen2': False, 'qwen3': False}

_QUANTISATIONS = (
  'F32', 'F16', 'BF16', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'Q2_K',
  'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K',
)  # fmt: skip

_TENSORS = {
  'token_embd': 'model.embed_tokens',
  'output_norm': 'model.norm',
  'output': 'lm_head',
}
_LAYER_TENSORS = {
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_q_norm': 'self_attn.q_norm',
  'attn_k_norm': 'self_attn.k_norm',
  'attn_output': 'self_attn.o_proj',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}

_SCALARS = {
  0: '<u1', 1: '<i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4',
  7: '?', 10: '<u8', 11: '<i8', 12: '<f8',
}  # fmt: skip
_STRING, _ARRAY = 8, 9

_KNOWN_KEYS = (
  'attention.head_count',
  'attention.head_count_kv',
  'attention.key_length',
  'attention.layer_norm_rms_epsilon',
  'attention.sliding_window',
  'attention.value_length',
  'block_count',
  'context_length',
  'embedding_length',
  'expert_count',
  'expert_used_count',
  'feed_forward_length',
  'rope.dimension_count',
  'rope.freq_base',
  'rope.scaling.attn_factor',
  'rope.scaling.factor',
  'rope.scaling.finetuned',
  'rope.scaling.original_context_length',
  'rope.scaling.type',
  'vocab_size',
)


class Tensor(NamedTuple):
  """Where a tensor lies in the file."""

  shape: tuple[int, ...]  # [outputs inputs]
  kind: str  # quantisation
  start: int  # first byte, from the file's start
  size: int  # bytes


class _Header:
  """A cursor over the header that never reads past the file."""

  def __init__(self, data: memoryview, where: str):
    self.data, self.where, self.at = data, where, 0

  def fail(self, what: str):
    return ValueError(
      f'{self.where} is cut or damaged ({what} at byte {self.at}); download '
      'it again'
    )

  def take(self, size: int) -> memoryview:
    if size > len(self.data) - self.at:
      raise self.fail(f'{size} bytes expected, {len(self.data)} in all')
    part = self.data[self.at : self.at + size]
    self.at += size
    return part

  def number(self, code: str):
    return struct.unpack('<' + code, self.take(struct.calcsize('<' + code)))[0]

  def string(self) -> str:
    size = self.number('Q')
    try:
      return str(self.take(size), 'utf-8')
    except UnicodeDecodeError as e:
      raise self.fail('text that is not UTF-8') from e

  def value(self, kind: int):
    if kind == _STRING:
      return self.string()
    if kind in _SCALARS:
      return self.numbers(kind, 1)[0]
    if kind != _ARRAY:
      raise self.fail(f'metadata of unknown type {kind}')
    kind, count = self.number('I'), self.number('Q')
    if kind == _STRING:
      if count > (len(self.data) - self.at) // 8:
        raise self.fail(f'a list of {count} texts')
      return [self.string() for _ in range(count)]
    if kind in _SCALARS:
      return self.numbers(kind, count)
    raise self.fail(f'a list of unknown type {kind}')

  def numbers(self, kind, count):
    dtype = np.dtype(_SCALARS[kind])
    part = self.take(count * dtype.itemsize)
    if kind == 7:  # a bool is one byte, 0 or 1
      raw = np.frombuffer(part, np.uint8)
      if raw.max(initial=0) > 1:
        raise self.fail('a truth value that is neither 0 nor 1')
    return np.frombuffer(part, dtype).tolist()


def read_header(
  data: memoryview, where: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """Metadata and tensors of a GGUF file.

  Raises:
    ValueError: it is no GGUF file, or it is cut or damaged.
  """
  head = _Header(data, where)
  if bytes(data[:4]) != b'GGUF':
    raise ValueError(
      f'{where} is not a GGUF file (it does not start so); give '
      'a .gguf file or a Hugging Face folder'
    )
  head.at = 4
  version = head.number('I')
  if version not in (2, 3):
    raise ValueError(
      f'{where}: GGUF version {version} is not supported; '
      'supported: 2 and 3; convert the model again'
    )
  n_tensors, n_fields = head.number('Q'), head.number('Q')
  fields: dict[str, Any] = {}
  for _ in range(n_fields):
    key = head.string()
    if key in fields:
      raise head.fail(f'metadata {key!r} twice')
    fields[key] = head.value(head.number('I'))
  tensors = {}
  for _ in range(n_tensors):
    name = head.string()
    if name in tensors:
      raise head.fail(f'tensor {name!r} twice')
    tensors[name] = _tensor(head, name)
  align = fields.get('general.alignment', 32)
  if not isinstance(align, int) or align <= 0:
    raise head.fail(f'alignment {align!r}')
  start = -(-head.at // align) * align
  # Tensors follow each other without holes: any wrong offset, size or type
  # shows here.
  end = start
  for name, tensor in sorted(tensors.items(), key=lambda t: t[1].start):
    expected = -(-(end - start) // align) * align
    if tensor.start != expected:
      raise head.fail(f'tensor {name} at {tensor.start}, not {expected}')
    end = start + expected + tensor.size
  if tensors and end > len(data):
    raise ValueError(
      f'{where} is cut: {len(data)} bytes of at least {end}; download it again'
    )
  placed = {n: t._replace(start=start + t.start) for n, t in tensors.items()}
  return fields, placed


def _tensor(head, name):
  package = _package()
  dims = head.number('I')
  if not 1 <= dims <= 4:
    raise head.fail(f'tensor {name} of {dims} dimensions')
  shape = tuple(head.number('Q') for _ in range(dims))
  number, start = head.number('I'), head.number('Q')
  try:
    kind = package.GGMLQuantizationType(number)
  except ValueError as e:
    raise head.fail(f'tensor {name} of unknown type {number}') from e
  if kind.name not in _QUANTISATIONS:
    raise ValueError(
      f'{head.where}: tensor {name} is quantised as {kind.name}; supported: '
      f'{", ".join(_QUANTISATIONS)}'
    )
  block, size = package.GGML_QUANT_SIZES[kind]
  if shape[0] % block:
    raise head.fail(f'tensor {name}: {shape[0]} values in blocks of {block}')
  count = 1
  for n in shape:
    count *= n
  return Tensor(shape[::-1], kind.name, start, count // block * size)


def _package():
  try:
    import gguf
  except ImportError as e:
    raise ValueError(
      "GGUF files need the package gguf: pip install 'lcx[gguf]'"
    ) from e
  return gguf


def open_file(path: pathlib.Path, dtype: str | None = None) -> 'File':
  """Opens a GGUF file and reads its header.

  Raises:
    ValueError: it is damaged, or holds a model that is not supported.
  """
  return File(path, dtype)


class File:
  """The tensors, the config and the tokenizer of a GGUF file."""

  def __init__(self, path: pathlib.Path, dtype: str | None = None):
    self.where = repr(str(path))
    self.files = [path]
    if path.stat().st_size == 0:
      raise ValueError(f'{self.where} is empty; download it again')
    self._data = np.memmap(path, np.uint8, 'r')
    self.fields, tensors = read_header(memoryview(self._data), self.where)
    table = self._rope_table(tensors)
    self._tensors = {_hf_name(name): t for name, t in tensors.items()}
    self._labels = {_hf_name(name): name for name in tensors}
    self.shapes = {n: t.shape for n, t in self._tensors.items()}
    self.config = parse_config(
      self.fields, self.shapes, table, self.where, dtype
    )
    self._permuted = _ARCHITECTURES[self.fields['general.architecture']]

  def _rope_table(self, tensors):
    """Llama 3.1's scaling: a tensor of divisors of the frequencies."""
    tensor = tensors.pop('rope_freqs.weight', None)
    if tensor is None:
      return ()
    if tensor.kind != 'F32' or len(tensor.shape) != 1:
      raise ValueError(
        f'{self.where}: rope_freqs.weight is no float32 vector; download the '
        'file again'
      )
    return tuple(self._dequantised(tensor, slice(None)).tolist())

  def label(self, name: str) -> str:
    return self._labels.get(name) or _gguf_name(name)

  def read(self, name: str, rows: slice) -> np.ndarray:
    tensor = self._tensors[name]
    out = self._dequantised(tensor, rows)
    if self._permuted and re.search(r'\.[qk]_proj\.', name):
      half = self.config.head_dim // 2
      heads = out.reshape(-1, half, 2, *out.shape[1:])
      out = heads.swapaxes(1, 2).reshape(out.shape)
    return out

  def _dequantised(self, tensor, rows):
    package = _package()
    raw = self._data[tensor.start : tensor.start + tensor.size]
    kind = package.GGMLQuantizationType[tensor.kind]
    if len(tensor.shape) == 1:
      return package.quants.dequantize(raw, kind)[rows]
    raw = raw.reshape(tensor.shape[0], -1)[rows]
    return package.quants.dequantize(raw, kind)

  def tokenizer(self) -> Tokenizer:
    return from_gguf(self.fields, self.where)


def _hf_name(name: str) -> str:
  stem, _, kind = name.rpartition('.')
  if stem in _TENSORS:
    return f'{_TENSORS[stem]}.{kind}'
  match = re.fullmatch(r'blk\.(\d+)\.(\w+)', stem)
  if match and match[2] in _LAYER_TENSORS:
    return f'model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.{kind}'
  return name


def _gguf_name(name: str) -> str:
  stem, _, kind = name.rpartition('.')
  for ours, theirs in _TENSORS.items():
    if theirs == stem:
      return f'{ours}.{kind}'
  match = re.fullmatch(r'model\.layers\.(\d+)\.([\w.]+)', stem)
  for ours, theirs in _LAYER_TENSORS.items():
    if match and theirs == match[2]:
      return f'blk.{match[1]}.{ours}.{kind}'
  return name


def parse_config(
  fields: dict[str, Any],
  shapes: dict[str, tuple[int, ...]],
  rope_table: tuple[float, ...],
  where: str,
  dtype: str | None,
) -> ModelConfig:
  """`ModelConfig` of a GGUF file's metadata and tensors.

  Raises:
    ValueError: a field is missing, or asks for what is not supported.
  """
  family = fields.get('general.architecture')
  if family not in _ARCHITECTURES:
    raise ValueError(
      f'{where}: architecture {family!r} is not supported; supported: '
      f'{sorted(_ARCHITECTURES)}'
    )
  prefix = f'{family}.'
  mine = {k.removeprefix(prefix) for k in fields if k.startswith(prefix)}
  unknown = sorted(mine.difference(_KNOWN_KEYS))
  if unknown:
    raise ValueError(
      f'{where}: metadata {", ".join(prefix + k for k in unknown)} are '
      'unknown; they may change what the model computes'
    )

  def get(name, kind=int, default=None):
    value = fields.get(prefix + name, default)
    if isinstance(value, list) or not isinstance(value, kind):
      raise ValueError(
        f'{where}: metadata {prefix}{name} is {value!r}; the file is damaged '
        'or of an unsupported kind'
      )
    return value

  if get('expert_count', int, 0):
    raise ValueError(f'{where}: mixtures of experts are not supported')
  n_heads, d_model = get('attention.head_count'), get('embedding_length')
  embedding = shapes.get('model.embed_tokens.weight', (0,))
  head_dim = get('attention.key_length', int, d_model // max(n_heads, 1))
  max_position = get('context_length')
  for name in ('rope.dimension_count', 'attention.value_length'):
    if get(name, int, head_dim) != head_dim:
      raise ValueError(
        f'{where}: {prefix}{name}={get(name)} is not supported; only '
        f'{head_dim=} is'
      )
  try:
    return ModelConfig(
      vocab_size=get('vocab_size', int, embedding[0]),
      d_model=d_model,
      n_layers=get('block_count'),
      n_heads=n_heads,
      n_kv_heads=get('attention.head_count_kv', int, n_heads),
      head_dim=head_dim,
      d_ff=get('feed_forward_length'),
      # A float32 of the file: 1e-5 is meant, not 9.99999974e-06.
      norm_eps=float(f'{get("attention.layer_norm_rms_epsilon", float):.6g}'),
      tie_embeddings='lm_head.weight' not in shapes,
      qkv_bias='model.layers.0.self_attn.q_proj.bias' in shapes,
      qk_norm='model.layers.0.self_attn.q_norm.weight' in shapes,
      sliding_window=get('attention.sliding_window', int, 0) or None,
      max_position=max_position,
      rope=_rope(get, max_position, rope_table, where),
      dtype=dtype or 'float32',
    )
  except ValueError as e:
    raise ValueError(e if where in str(e) else f'{where}: {e}') from e


def _rope(get, max_position, table, where):
  theta = get('rope.freq_base', float, 10000.0)
  kind = get('rope.scaling.type', str, 'none')
  factor = get('rope.scaling.factor', float, 1.0)
  if table:
    if kind != 'none':
      raise ValueError(
        f'{where}: rope scaling {kind!r} and rope_freqs.weight together are '
        'not supported'
      )
    return RopeConfig(theta=theta, kind='table', table=table)
  if kind == 'none' or (kind == 'linear' and factor == 1.0):
    return RopeConfig(theta=theta)
  if kind == 'linear':
    return RopeConfig(theta=theta, kind='linear', factor=factor)
  if kind != 'yarn':
    raise ValueError(
      f'{where}: rope scaling {kind!r} is not supported; supported: linear, '
      'yarn'
    )
  original = get('rope.scaling.original_context_length', int, max_position)
  rope = RopeConfig(
    theta=theta, kind='yarn', factor=factor, original_max=original
  )
  scale = get('rope.scaling.attn_factor', float, 1.0)
  # llama.cpp multiplies yarn's own factor by it.
  if scale != 1.0:
    whole = scale * attention_factor(rope)
    return RopeConfig(
      theta=theta,
      kind='yarn',
      factor=factor,
      original_max=original,
      attention_factor=whole,
    )
  return rope
