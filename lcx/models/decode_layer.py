"""A layer of one decoded token on one GPU: its matrices are four launches.

What `lcx.models.transformer` says in array operations, for the case where their
launches take longer than their work: norms, bias, gate and residual sums are
parts of the products (`kernels_pallas.decode_matmul`), but for the norm before
a wide model's feed-forward, a launch of its own (`kernels_pallas.add_norm`).
Of w8a8 matrices (`low_bit`) the products make the token's codes, too.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kernels_pallas import add_norm, decode_matmul
from kernels_pallas.append_token import Joint
from lcx.models.config import ModelConfig
from lcx.models.low_bit import LowBit
from lcx.models.transformer import make_rope, normed_qkv

# From so many inputs on, a norm that each program of a product makes anew costs
# more than one launch that makes it once.
WIDE = 2048


def serves(layer: dict[str, Any], x: Float[Array, 'B T D']) -> bool:
  """Whether the functions here can take the layer's place on this device."""
  matrices = [layer[name] for name in ('qkv', 'gate_up', 'down')]
  matrices.append(layer['o'].reshape(x.shape[-1], -1))
  tokens = x.shape[0] * x.shape[1]
  return decode_matmul.serves(tokens, *map(_operand, matrices))


def _operand(w):
  """A matrix as `decode_matmul` takes it, if it does."""
  if isinstance(w, LowBit) and w.kind == 'w8a8':
    return decode_matmul.Codes(w.array.qvalue, w.array.scale)
  return w


def attention_inputs(
  layer: dict[str, Any], x: Float[Array, '1 1 D'], config: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """As `transformer.attention_inputs`."""
  with jax.named_scope('attention_inputs'):
    bias = layer['qkv_bias'].reshape(-1) if config.qkv_bias else None
    qkv = decode_matmul.matmul(
      x.reshape(-1),
      _operand(layer['qkv'].reshape(-1, config.d_model)),
      norm=layer['attention_norm'],
      eps=config.norm_eps,
      add=bias,
    )
    qkv = qkv.reshape(1, 1, -1, config.group + 2, config.head_dim)
    return normed_qkv(layer, qkv, config)


def rotated_inputs(
  layer: dict[str, Any],
  x: Float[Array, '1 1 D'],
  positions: Int32[Array, '1 1'],
  config: ModelConfig,
) -> Joint | None:
  """`attention_inputs`, queries and keys rotated; None if that takes more."""
  if config.qk_norm:
    return None
  with jax.named_scope('attention_inputs'):
    half = config.head_dim // 2
    unit = jnp.concatenate([jnp.ones(half), jnp.zeros(half)])
    array = decode_matmul.rotated_matmul(
      x.reshape(-1),
      _operand(layer['qkv']),
      # What the rotation makes of (1, 0): cosines, then sines.
      make_rope(config)(unit[None, None, None], positions).reshape(2, half),
      norm=layer['attention_norm'],
      eps=config.norm_eps,
      add=layer['qkv_bias'] if config.qkv_bias else None,
    )
    return Joint(array[None], config.n_kv_heads)


def layer_output(
  layer: dict[str, Any],
  x: Float[Array, '1 1 D'],
  attention: Float[Array, '1 1 N H'],
  config: ModelConfig,
) -> Float[Array, '1 1 D']:
  """As `transformer.layer_output`."""
  attention = attention.astype(x.dtype).reshape(-1)
  before, eps = x.reshape(-1), config.norm_eps
  o = _operand(layer['o'].reshape(config.d_model, -1))
  gate_up, down = _operand(layer['gate_up']), _operand(layer['down'])
  scale = layer['ff_norm']
  wide = config.d_model >= WIDE and add_norm.serves(config.d_model)
  with jax.named_scope('attention_output'):
    if wide:
      delta = decode_matmul.matmul(attention, o)
      total, y = add_norm.gpu.add_norm(before, delta, scale, eps)
      norm = None
    else:
      total = y = decode_matmul.matmul(attention, o, add=before)
      norm = scale
  with jax.named_scope('feed_forward'):
    y = decode_matmul.gated_matmul(y, gate_up, norm=norm, eps=eps)
    return decode_matmul.matmul(y, down, add=total).reshape(x.shape)
