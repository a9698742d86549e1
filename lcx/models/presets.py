"""Published model shapes, by name. The numbers are the models' config.json."""

from lcx.models.config import ModelConfig, RopeConfig

_LLAMA31_ROPE = RopeConfig(
  theta=500000.0,
  kind='llama3',
  factor=8.0,
  original_max=8192,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
)

PRESETS: dict[str, ModelConfig] = {
  # Small enough for tests; two kv heads, so that a model axis of 2 splits it.
  'tiny': ModelConfig(
    vocab_size=256,
    d_model=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    d_ff=128,
    tie_embeddings=True,
    max_position=2048,
  ),
  'smollm2_135m': ModelConfig(
    vocab_size=49152,
    d_model=576,
    n_layers=30,
    n_heads=9,
    n_kv_heads=3,
    head_dim=64,
    d_ff=1536,
    tie_embeddings=True,
    max_position=8192,
    rope=RopeConfig(theta=100000.0),
  ),
  'qwen2_5_0_5b': ModelConfig(
    vocab_size=151936,
    d_model=896,
    n_layers=24,
    n_heads=14,
    n_kv_heads=2,
    head_dim=64,
    d_ff=4864,
    norm_eps=1e-6,
    tie_embeddings=True,
    qkv_bias=True,
    max_position=32768,
    rope=RopeConfig(theta=1000000.0),
  ),
  'qwen3_0_6b': ModelConfig(
    vocab_size=151936,
    d_model=1024,
    n_layers=28,
    n_heads=16,
    n_kv_heads=8,
    head_dim=128,
    d_ff=3072,
    norm_eps=1e-6,
    tie_embeddings=True,
    qk_norm=True,
    max_position=40960,
    rope=RopeConfig(theta=1000000.0),
  ),
  'mistral_7b': ModelConfig(
    vocab_size=32000,
    d_model=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    d_ff=14336,
    sliding_window=4096,
    max_position=32768,
    rope=RopeConfig(theta=10000.0),
    dtype='bfloat16',
  ),
  'llama2_7b': ModelConfig(
    vocab_size=32000,
    d_model=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=32,
    head_dim=128,
    d_ff=11008,
    max_position=4096,
    rope=RopeConfig(theta=10000.0),
    dtype='bfloat16',
  ),
  'llama3_8b': ModelConfig(
    vocab_size=128256,
    d_model=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    d_ff=14336,
    max_position=8192,
    rope=RopeConfig(theta=500000.0),
    dtype='bfloat16',
  ),
  'llama3_1_8b': ModelConfig(
    vocab_size=128256,
    d_model=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    d_ff=14336,
    max_position=131072,
    rope=_LLAMA31_ROPE,
    dtype='bfloat16',
  ),
}


def preset(name: str, **changes) -> ModelConfig:
  """The named shape, with fields changed.

  Raises:
    ValueError: no preset has this name.
  """
  if name not in PRESETS:
    raise ValueError(f'preset {name!r} is unknown; known: {sorted(PRESETS)}')
  return PRESETS[name].replace(**changes)
