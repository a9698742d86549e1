"""Trained weights as tensors of a Hugging Face Llama folder."""

from typing import Any

import jax
import numpy as np

from lcx.models.config import ModelConfig
from lcx.models.transformer import Weights


def tensors(weights: Weights, config: ModelConfig) -> dict[str, np.ndarray]:
  """Tensors by their Hugging Face names, [outputs inputs] for matrices.

  Raises:
    ValueError: the model has what Llama's folder cannot hold.
  """
  if config.qkv_bias or config.qk_norm or not config.tie_embeddings:
    raise ValueError('only tied models without bias and QK norm are exported')
  weights = jax.device_get(weights)
  d = config.d_model
  out = {
    'model.embed_tokens.weight': weights.embed['table'],
    'model.norm.weight': weights.head['norm'],
  }
  for i, layer in enumerate(weights.layers):
    at = f'model.layers.{i}.'
    qkv = layer['qkv']
    for name, part in (
      ('q', qkv[:, :-2]),
      ('k', qkv[:, -2]),
      ('v', qkv[:, -1]),
    ):
      out[f'{at}self_attn.{name}_proj.weight'] = part.reshape(-1, d)
    out[f'{at}self_attn.o_proj.weight'] = layer['o'].reshape(d, -1)
    out[f'{at}mlp.gate_proj.weight'] = layer['gate_up'][:, 0]
    out[f'{at}mlp.up_proj.weight'] = layer['gate_up'][:, 1]
    out[f'{at}mlp.down_proj.weight'] = layer['down']
    out[f'{at}input_layernorm.weight'] = layer['attention_norm']
    out[f'{at}post_attention_layernorm.weight'] = layer['ff_norm']
  return {name: np.ascontiguousarray(x) for name, x in out.items()}


def config_json(config: ModelConfig, eos: int, bos: int) -> dict[str, Any]:
  """config.json of the folder."""
  rope = config.rope
  scaling: dict[str, Any] | None = None
  if rope.kind == 'llama3':
    scaling = {
      'rope_type': 'llama3',
      'factor': rope.factor,
      'original_max_position_embeddings': rope.original_max,
      'low_freq_factor': rope.low_freq_factor,
      'high_freq_factor': rope.high_freq_factor,
    }
  elif rope.kind != 'none':
    raise ValueError(f'rope kind {rope.kind!r} is not exported')
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': config.vocab_size,
    'hidden_size': config.d_model,
    'intermediate_size': config.d_ff,
    'num_hidden_layers': config.n_layers,
    'num_attention_heads': config.n_heads,
    'num_key_value_heads': config.n_kv_heads,
    'head_dim': config.head_dim,
    'hidden_act': 'silu',
    'rms_norm_eps': config.norm_eps,
    'max_position_embeddings': config.max_position,
    'rope_theta': rope.theta,
    'rope_scaling': scaling,
    'tie_word_embeddings': config.tie_embeddings,
    'attention_bias': False,
    'mlp_bias': False,
    'bos_token_id': bos,
    'eos_token_id': eos,
    'torch_dtype': config.dtype,
  }
