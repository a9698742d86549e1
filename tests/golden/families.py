"""Small random models, one a family: configs, weights, tokens from seeds.

Used by make.py (with torch) and by the tests (without): numpy alone.
"""

import zlib

import numpy as np

LENGTH = 192  # tokens; longer than the lengths in training below
POSITIONS = 64
COLUMNS = 512

_BASE = {
  'vocab_size': 512,
  'hidden_size': 64,
  'intermediate_size': 160,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 256,
  'rms_norm_eps': 1e-5,
  'hidden_act': 'silu',
  'rope_theta': 10000.0,
  'tie_word_embeddings': False,
  'attention_bias': False,
  'torch_dtype': 'float32',
}


def _family(architecture, model_type, **changes):
  names = {'architectures': [architecture], 'model_type': model_type}
  return {**_BASE, **names, **changes}


def _llama(**changes):
  return _family('LlamaForCausalLM', 'llama', **changes)


# config.json of each family, as its models are published.
FAMILIES = {
  'llama2': _llama(num_key_value_heads=4),
  'llama3': _llama(rope_theta=500000.0, num_key_value_heads=1),
  'llama3_1': _llama(
    rope_theta=500000.0,
    rope_scaling={
      'rope_type': 'llama3',
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 32,
    },
  ),
  'smollm2': _llama(
    hidden_size=72,
    num_attention_heads=9,
    num_key_value_heads=3,
    rope_theta=100000.0,
    tie_word_embeddings=True,
  ),
  'qwen2': _family(
    'Qwen2ForCausalLM',
    'qwen2',
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    use_sliding_window=False,
    sliding_window=32,
    max_window_layers=3,
  ),
  'qwen3': _family(
    'Qwen3ForCausalLM',
    'qwen3',
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
    head_dim=32,
    use_sliding_window=False,
    sliding_window=None,
  ),
  'mistral': _family('MistralForCausalLM', 'mistral', sliding_window=24),
  'yarn': _family(
    'Qwen2ForCausalLM',
    'qwen2',
    rope_scaling={
      'type': 'yarn',
      'factor': 4.0,
      'original_max_position_embeddings': 64,
    },
  ),
  'linear': _llama(rope_scaling={'type': 'linear', 'factor': 4.0}),
  'dynamic': _llama(
    max_position_embeddings=64,
    rope_scaling={'type': 'dynamic', 'factor': 4.0},
  ),
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A tensor of every random model: by its name and its shape."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  draw = rng.standard_normal(shape).astype(np.float32)
  if name.endswith('norm.weight'):
    return np.float32(1) + np.float32(0.1) * draw
  if name.endswith('bias'):
    return np.float32(0.5) * draw
  # Queries and keys are drawn wide, so that attention is far from uniform.
  wide = 3.0 if 'q_proj' in name or 'k_proj' in name else 1.0
  return draw * np.float32(wide * shape[-1] ** -0.5)


def tokens(name: str, raw: dict) -> np.ndarray:
  """The prompt, int64 [LENGTH]."""
  rng = np.random.default_rng(zlib.crc32(name.encode()) + 1)
  return rng.integers(0, raw['vocab_size'], LENGTH)


def sample(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The positions, the columns and the logits that a golden file keeps."""
  length, vocab = logits.shape
  rows = np.linspace(0, length - 1, POSITIONS).round().astype(np.int64)
  columns = np.linspace(0, vocab - 1, COLUMNS).round().astype(np.int64)
  return rows, columns, logits[np.ix_(rows, columns)]


def pack(logits: np.ndarray) -> dict[str, np.ndarray]:
  """Logits as 16-bit steps: an error of 1e-4 of their standard deviation."""
  step = np.abs(logits).max() / 32767
  return {
    'steps': np.round(logits / step).astype(np.int16),
    'step': np.float64(step),
    'std': np.float64(logits.std()),
  }
