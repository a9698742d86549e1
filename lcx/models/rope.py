"""Rotary position embedding, with the scalings of long-context models.

Convention of Hugging Face: dimension i turns with dimension i + H/2
("rotate half"). Positions are arguments; nothing is cached.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcx.models.config import ModelConfig, RopeConfig

Rope = Callable[[Float[Array, 'B T heads H'], Int[Array, 'B T']], jax.Array]


@functools.lru_cache(maxsize=64)
def make_rope(config: ModelConfig, length: int | None = None) -> Rope:
  """The rotation of one model, `rope(x [B T heads H], positions [B T])`.

  Angles and products are float32; the result has x's dtype. The same
  function object is returned for the same arguments, so that it may be a
  static argument of a jitted function.

  Args:
    config: the model.
    length: used by 'dynamic' scaling alone: the length whose base all
      positions rotate with. None: each row of a call takes its own highest
      position + 1, which is what Hugging Face does for a whole prompt; give
      the length where positions of one prompt are split over calls or shards.
  """
  rope, dim = config.rope, config.head_dim
  base, factor = frequencies(rope, dim, length), attention_factor(rope)
  grows = rope.kind == 'dynamic' and length is None

  def rotate(x, positions):
    with jax.named_scope('rope'):
      positions = positions.astype(jnp.float32)
      if grows:
        longest = jnp.max(positions, axis=-1, keepdims=True) + 1.0
        freqs = _dynamic(rope, dim, longest[..., None])  # [B 1 H/2]
      else:
        freqs = base
      angle = positions[:, :, None] * freqs  # [B T H/2]
      cos = (jnp.cos(angle) * factor)[:, :, None, :]
      sin = (jnp.sin(angle) * factor)[:, :, None, :]
      a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
      out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
      return out.astype(x.dtype)

  return rotate


def frequencies(
  rope: RopeConfig, dim: int, length: int | None = None
) -> np.ndarray:
  """Scaled frequencies, float32 [H/2], radians a token."""
  exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
  theta = rope.theta
  if rope.kind == 'ntk':
    theta = theta * rope.factor ** (dim / (dim - 2))
  if rope.kind == 'dynamic' and length is not None:
    grown = rope.factor * max(length, rope.original_max) / rope.original_max
    theta = theta * (grown - (rope.factor - 1)) ** (dim / (dim - 2))
  plain = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
  if rope.kind == 'linear':
    return (plain / np.float32(rope.factor)).astype(np.float32)
  if rope.kind == 'table':
    return (plain / np.asarray(rope.table, np.float32)).astype(np.float32)
  if rope.kind == 'llama3':
    return _llama3(rope, plain)
  if rope.kind == 'yarn':
    return _yarn(rope, dim, plain)
  return plain


def attention_factor(rope: RopeConfig) -> float:
  """Yarn's factor on cos and sin (arXiv:2309.00071, equation 22), else 1."""
  if rope.kind != 'yarn':
    return 1.0
  if rope.attention_factor is not None:
    return rope.attention_factor

  def mscale(weight):
    if rope.factor <= 1:
      return 1.0
    return 0.1 * weight * math.log(rope.factor) + 1.0

  if rope.mscale and rope.mscale_all_dim:
    return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
  return mscale(1.0)


def _dynamic(rope, dim, length):
  """Frequencies whose NTK base grows with the length; length [B 1 1]."""
  length = jnp.maximum(length, rope.original_max)
  grown = rope.factor * length / rope.original_max - (rope.factor - 1)
  theta = rope.theta * grown ** (dim / (dim - 2))
  exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
  return 1.0 / theta**exponents


def _llama3(rope, plain):
  """Llama 3.1: long waves slowed, short kept, a ramp between."""
  wavelength = 2 * np.pi / plain.astype(np.float64)
  smooth = (rope.original_max / wavelength - rope.low_freq_factor) / (
    rope.high_freq_factor - rope.low_freq_factor
  )
  smooth = np.clip(smooth, 0.0, 1.0)
  mixed = (1 - smooth) * plain / rope.factor + smooth * plain
  return mixed.astype(np.float32)


def _yarn(rope, dim, plain):
  """NTK by parts: interpolate dimensions of few rotations, keep the fast."""

  def dimension(rotations):
    return (dim * math.log(rope.original_max / (rotations * 2 * math.pi))) / (
      2 * math.log(rope.theta)
    )

  low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  if low == high:
    high += 0.001
  ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
  mixed = plain / rope.factor * ramp + plain * (1 - ramp)
  return mixed.astype(np.float32)
