"""Numbers of a decoder-only transformer, free of any family's names."""

import dataclasses
from typing import Literal, get_args

RopeKind = Literal[
  'none', 'linear', 'ntk', 'dynamic', 'yarn', 'llama3', 'table'
]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding (RoFormer, arXiv:2104.09864) and its scaling.

  Attributes:
    theta: base of the frequencies theta^(-2i/H).
    kind: 'none'; 'linear' (position interpolation, arXiv:2306.15595); 'ntk'
      (one larger base); 'dynamic' (an NTK base that grows with the length,
      as in Hugging Face); 'yarn' (arXiv:2309.00071); 'llama3' (Llama 3.1);
      'table' (one divisor per frequency, as GGUF files store them).
    factor: how many times longer than trained.
    original_max: length in training, tokens; yarn, llama3 and dynamic use it.
    beta_fast, beta_slow: yarn's ramp, in rotations over original_max.
    truncate: yarn rounds its ramp to whole dimensions.
    attention_factor: yarn's factor on cos and sin; None: from the factor.
    mscale, mscale_all_dim: yarn's other way to give the attention factor.
    low_freq_factor, high_freq_factor: llama3's ramp, in wavelengths.
    table: H/2 divisors of the frequencies (kind 'table').
  """

  theta: float = 10000.0
  kind: RopeKind = 'none'
  factor: float = 1.0
  original_max: int = 0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  table: tuple[float, ...] = ()

  def __post_init__(self):
    if self.kind not in get_args(RopeKind):
      raise ValueError(
        f'rope kind={self.kind!r} must be one of {get_args(RopeKind)}'
      )
    if self.theta <= 0 or self.factor <= 0:
      raise ValueError(
        f'rope theta={self.theta} and factor={self.factor} must be positive'
      )
    if self.kind in ('dynamic', 'yarn', 'llama3') and self.original_max <= 0:
      raise ValueError(
        f'rope kind={self.kind!r} needs original_max, the length in training'
      )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One decoder-only transformer (Llama, SmolLM2, Qwen, Mistral).

  Attributes:
    vocab_size: V. d_model: D. n_layers: L. n_heads: N query heads.
    n_kv_heads: K; query head n reads kv head n // (N / K). head_dim: H.
    d_ff: F, width of the gated feed-forward (SiLU).
    norm_eps: epsilon of every RMSNorm.
    tie_embeddings: the head is the embedding table.
    qkv_bias: q, k and v projections have a bias (Qwen2).
    qk_norm: RMSNorm over H on q and k before rotation (Qwen3).
    sliding_window: a query at p sees keys > p - sliding_window, in all layers;
      None: no window.
    max_position: longest context the model was trained for, tokens.
    rope: rotary embedding.
    dtype: name of the weights' and activations' dtype.
  """

  vocab_size: int
  d_model: int
  n_layers: int
  n_heads: int
  n_kv_heads: int
  head_dim: int
  d_ff: int
  norm_eps: float = 1e-5
  tie_embeddings: bool = False
  qkv_bias: bool = False
  qk_norm: bool = False
  sliding_window: int | None = None
  max_position: int = 2048
  rope: RopeConfig = RopeConfig()
  dtype: str = 'float32'

  def __post_init__(self):
    for name in (
      'vocab_size', 'd_model', 'n_layers', 'n_heads', 'n_kv_heads',
      'head_dim', 'd_ff', 'max_position',
    ):  # fmt: skip
      value = getattr(self, name)
      if type(value) is not int or value <= 0:
        raise ValueError(f'{name}={value!r} must be a positive integer')
    if self.n_heads % self.n_kv_heads:
      raise ValueError(
        f'n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}'
      )
    if self.head_dim % 2:
      raise ValueError(f'head_dim={self.head_dim} must be even (rotation)')
    if self.sliding_window is not None and self.sliding_window <= 0:
      raise ValueError(f'sliding_window={self.sliding_window} must be positive')
    if self.dtype not in ('float32', 'bfloat16', 'float16'):
      raise ValueError(
        f'dtype={self.dtype!r} must be float32, bfloat16 or float16'
      )
    if self.rope.table and len(self.rope.table) != self.head_dim // 2:
      raise ValueError(
        f'rope table has {len(self.rope.table)} entries; head_dim='
        f'{self.head_dim} needs {self.head_dim // 2}'
      )

  @property
  def group(self) -> int:
    """G, query heads per kv head."""
    return self.n_heads // self.n_kv_heads

  def replace(self, **changes) -> 'ModelConfig':
    return dataclasses.replace(self, **changes)
