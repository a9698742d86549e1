"""A layer of one decoded token on one GPU: its matrices are four launches.

What `lcx.models.transformer` says in array operations, for the case where their
launches take longer than their work: norms, bias, gate and residual sums are
parts of the products (`kernels_pallas.decode_matmul`).
"""

import jax
from jaxtyping import Array, Float

from kernels_pallas import decode_matmul
from lcx.models.config import ModelConfig
from lcx.models.transformer import rms_norm, split_qkv

_MATRICES = ('qkv', 'o', 'gate_up', 'down')


def serves(layer: dict[str, jax.Array], x: Float[Array, 'B T D']) -> bool:
  """Whether the functions here can take the layer's place on this device."""
  return decode_matmul.serves(
    x.shape[0] * x.shape[1], *(layer[name] for name in _MATRICES)
  )


def attention_inputs(
  layer: dict[str, jax.Array], x: Float[Array, '1 1 D'], config: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """As `transformer.attention_inputs`."""
  with jax.named_scope('attention_inputs'):
    bias = layer['qkv_bias'].reshape(-1) if config.qkv_bias else None
    qkv = decode_matmul.matmul(
      x.reshape(-1),
      layer['qkv'].reshape(-1, config.d_model),
      norm=layer['attention_norm'],
      eps=config.norm_eps,
      add=bias,
    )
    qkv = qkv.reshape(1, 1, -1, config.group + 2, config.head_dim)
    q, k, v = split_qkv(qkv)
    if config.qk_norm:
      q = rms_norm(q, layer['q_norm'], config.norm_eps)
      k = rms_norm(k, layer['k_norm'], config.norm_eps)
    return q, k, v


def layer_output(
  layer: dict[str, jax.Array],
  x: Float[Array, '1 1 D'],
  attention: Float[Array, '1 1 N H'],
  config: ModelConfig,
) -> Float[Array, '1 1 D']:
  """As `transformer.layer_output`."""
  with jax.named_scope('attention_output'):
    total = decode_matmul.matmul(
      attention.astype(x.dtype).reshape(-1),
      layer['o'].reshape(config.d_model, -1),
      add=x.reshape(-1),
    )
  with jax.named_scope('feed_forward'):
    y = decode_matmul.gated_matmul(
      total, layer['gate_up'], norm=layer['ff_norm'], eps=config.norm_eps
    )
    return decode_matmul.matmul(y, layer['down'], add=total).reshape(x.shape)
