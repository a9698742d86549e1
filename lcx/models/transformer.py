"""One decoder-only transformer: Llama, SmolLM2, Qwen2/2.5/3, Mistral.

Weights are declared in `flax.nnx` modules, split once into `Weights`, a pytree
of plain arrays. Everything else here is a pure function of it, called inside
the caller's jit. Attention is no part of a layer's functions: the caller takes
q, k, v from `attention_inputs`, attends, and hands the result to
`layer_output`. All layers have one structure, so that a jitted function of one
layer compiles once for all of them. Both are made of `projections`,
`attention_output`, `add_norm` and `feed_forward`, for callers that add and
normalise in another way.

Layout. Matrices are stored inputs last, so that products of one token read
rows. q, k and v are one matrix [K G+2 H D]: kv head by kv head, its G query
heads, its key, its value. gate and up are one matrix [F 2 D], row by row. One
product instead of three or two, and each splits over a mesh axis without moving
anything.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from lcx import sharding
from lcx.models.config import ModelConfig
from lcx.models.low_bit import LowBit
from lcx.models.rope import make_rope

__all__ = [
  'Weights',
  'abstract',
  'add_norm',
  'attention_inputs',
  'attention_output',
  'dense_attention',
  'embed',
  'feed_forward',
  'forward',
  'init',
  'layer_output',
  'logits',
  'make_rope',
  'merge_qkv',
  'normed_qkv',
  'projections',
  'rms_norm',
  'split_qkv',
  'unembed',
  'weight_specs',
]

Attention = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
  """A model's arrays (or, leaf by leaf, their specs).

  Attributes:
    embed: {'table': [V D]}.
    layers: one dict a layer, all of one structure: 'attention_norm' [D], 'qkv'
      [K G+2 H D], 'o' [D N H], 'ff_norm' [D], 'gate_up' [F 2 D], 'down'
      [D F]: inputs last;
      'qkv_bias' [K G+2 H], 'q_norm' [H] and 'k_norm' [H] where the model has
      them.
    head: {'norm': [D]}, and 'table' [V D] where it is not tied.
  """

  embed: dict[str, Any]
  layers: tuple[dict[str, Any], ...]
  head: dict[str, Any]


class _Block(nnx.Module):
  """Holder of parameters with names of their axes."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self._dtype = jnp.dtype(config.dtype)
    self._rngs = rngs

  def _matrix(self, axes, shape, scale):
    draw = jax.random.normal(self._rngs.params(), shape, jnp.float32) * scale
    return nnx.Param(draw.astype(self._dtype), axes=axes)

  def _vector(self, axes, shape, value):
    return nnx.Param(jnp.full(shape, value, self._dtype), axes=axes)


class Embed(_Block):
  """The embedding table."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    super().__init__(config, rngs)
    shape = (config.vocab_size, config.d_model)
    self.table = self._matrix(('vocab', 'embed'), shape, 0.02)


class Layer(_Block):
  """Attention's projections and the gated feed-forward."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    super().__init__(config, rngs)
    d, f, h = config.d_model, config.d_ff, config.head_dim
    n, k, g = config.n_heads, config.n_kv_heads, config.group
    back = (2 * config.n_layers * d) ** -0.5  # keeps the residual's variance
    self.attention_norm = self._vector(('embed',), (d,), 1.0)
    self.qkv = self._matrix(
      ('kv_heads', None, 'head_dim', 'embed'), (k, g + 2, h, d), d**-0.5
    )
    if config.qkv_bias:
      self.qkv_bias = self._vector(
        ('kv_heads', None, 'head_dim'), (k, g + 2, h), 0.0
      )
    if config.qk_norm:
      self.q_norm = self._vector(('head_dim',), (h,), 1.0)
      self.k_norm = self._vector(('head_dim',), (h,), 1.0)
    self.o = self._matrix(('embed', 'heads', 'head_dim'), (d, n, h), back)
    self.ff_norm = self._vector(('embed',), (d,), 1.0)
    self.gate_up = self._matrix(('ff', None, 'embed'), (f, 2, d), d**-0.5)
    self.down = self._matrix(('embed', 'ff'), (d, f), back)


class Head(_Block):
  """The last norm, and the output matrix where it is not the embedding."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    super().__init__(config, rngs)
    d = config.d_model
    self.norm = self._vector(('embed',), (d,), 1.0)
    if not config.tie_embeddings:
      shape = (config.vocab_size, d)
      self.table = self._matrix(('vocab', 'embed'), shape, d**-0.5)


def _split(module, config, key):
  state = nnx.state(module(config, nnx.Rngs(params=key)), nnx.Param)
  return nnx.to_pure_dict(state)


def init(config: ModelConfig, key: jax.Array, mesh=None) -> Weights:
  """Random weights, made where they live.

  Args:
    config: the model.
    key: a key of `jax.random.key`.
    mesh: spreads the weights over it; None: the default device.

  Returns:
    Norms 1, biases 0, matrices normal with variance 1 / inputs.
  """
  specs = weight_specs(config, mesh)
  keys = jax.random.split(key, config.n_layers + 2)

  def make(module, spec):
    out = None if mesh is None else sharding.named(mesh, spec)
    return jax.jit(lambda key: _split(module, config, key), out_shardings=out)

  layer = make(Layer, specs.layers[0])
  return Weights(
    embed=make(Embed, specs.embed)(keys[0]),
    layers=tuple(layer(k) for k in keys[2:]),
    head=make(Head, specs.head)(keys[1]),
  )


def abstract(config: ModelConfig) -> Weights:
  """The weights' shapes and dtypes, as `jax.ShapeDtypeStruct`."""
  key = jax.eval_shape(lambda: jax.random.key(0))

  def shapes(module):
    return jax.eval_shape(lambda k: _split(module, config, k), key)

  layer = shapes(Layer)
  return Weights(
    embed=shapes(Embed), layers=(layer,) * config.n_layers, head=shapes(Head)
  )


def weight_specs(config: ModelConfig, mesh=None) -> Weights:
  """Where the weights live: `Weights` of `PartitionSpec`.

  Args:
    config: the model.
    mesh: checks that the model axis fits. A vocabulary that it does not
      divide is held whole on every device.

  Raises:
    ValueError: the mesh's model axis does not divide the kv heads or the
      feed-forward.
  """
  size = 1 if mesh is None else mesh.shape['model']
  if config.n_kv_heads % size or config.d_ff % size:
    raise ValueError(
      f'mesh axis model={size} must divide n_kv_heads={config.n_kv_heads} '
      f'and d_ff={config.d_ff}; take a smaller model axis'
    )
  whole = config.vocab_size % size != 0

  def specs(module):
    made = nnx.eval_shape(lambda: module(config, nnx.Rngs(0)))
    out: dict[str, Any] = {}
    for path, param in nnx.to_flat_state(nnx.state(made, nnx.Param)):
      axes = param.get_metadata()['axes']
      axes = tuple(None if whole and a == 'vocab' else a for a in axes)
      out[str(path[-1])] = sharding.spec(*axes)
    return out

  layer = specs(Layer)
  return Weights(
    embed=specs(Embed), layers=(layer,) * config.n_layers, head=specs(Head)
  )


def _precision(x):
  # A float32 model means float32: no TF32 on GPUs, no bfloat16 on TPUs.
  return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _einsum(equation, x, w, out=None):
  if isinstance(w, LowBit):
    return w.einsum(equation, x, out)
  return jnp.einsum(
    equation, x, w, precision=_precision(x), preferred_element_type=out
  )


def rms_norm(x: Float[Array, '... D'], scale: Float[Array, 'D'], eps: float):
  """RMSNorm over the last axis, in float32 (arXiv:1910.07467)."""
  wide = x.astype(jnp.float32)
  inverse = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
  return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def add_norm(
  x: Float[Array, 'B T D'],
  delta: Float[Array, 'B T D'],
  scale: Float[Array, 'D'],
  eps: float,
) -> tuple[Float[Array, 'B T D'], Float[Array, 'B T D']]:
  """The sum of x and delta, and its `rms_norm`."""
  x = x + delta
  return x, rms_norm(x, scale, eps)


def split_qkv(qkv: Float[Array, '*R K C H']):
  """Joint projection to q [*R K*G H], k [*R K H], v [*R K H]."""
  *rows, heads, width, dim = qkv.shape
  q = qkv[..., : width - 2, :].reshape(*rows, heads * (width - 2), dim)
  return q, qkv[..., width - 2, :], qkv[..., width - 1, :]


def merge_qkv(q, k, v):
  """The inverse of `split_qkv`; numpy arrays or jax arrays."""
  *rows, heads, dim = k.shape
  q = q.reshape(*rows, heads, -1, dim)
  xp = jnp if isinstance(q, jax.Array) else np
  return xp.concatenate([q, k[..., None, :], v[..., None, :]], axis=-2)


def embed(
  weights: dict[str, jax.Array], tokens: Int[Array, 'B T'], config: ModelConfig
) -> Float[Array, 'B T D']:
  """Rows of the embedding table (`Weights.embed`). No position is added."""
  del config
  with jax.named_scope('embed'):
    return jnp.take(weights['table'], tokens, axis=0, mode='clip')


def attention_inputs(
  layer: dict[str, jax.Array], x: Float[Array, 'B T D'], config: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Norm, projections, bias and QK norm; nothing is rotated.

  Returns:
    q [B T N H], k [B T K H], v [B T K H] in x's dtype.
  """
  with jax.named_scope('attention_inputs'):
    x = rms_norm(x, layer['attention_norm'], config.norm_eps)
  return projections(layer, x, config)


def projections(
  layer: dict[str, jax.Array], x: Float[Array, 'B T D'], config: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`attention_inputs` of an input that is normalised already."""
  with jax.named_scope('attention_inputs'):
    # Matrices have two axes, or XLA's CPU compiler transposes the weights at
    # every call.
    qkv = _einsum('btd,od->bto', x, layer['qkv'].reshape(-1, config.d_model))
    qkv = qkv.reshape(*x.shape[:2], -1, config.group + 2, config.head_dim)
    if config.qkv_bias:
      qkv = qkv + layer['qkv_bias']
    return normed_qkv(layer, qkv, config)


def normed_qkv(
  layer: dict[str, jax.Array],
  qkv: Float[Array, 'B T K C H'],
  config: ModelConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`split_qkv`, and QK norm where the model has it."""
  q, k, v = split_qkv(qkv)
  if config.qk_norm:
    q = rms_norm(q, layer['q_norm'], config.norm_eps)
    k = rms_norm(k, layer['k_norm'], config.norm_eps)
  return q, k, v


def layer_output(
  layer: dict[str, jax.Array],
  x: Float[Array, 'B T D'],
  attention: Float[Array, 'B T N H'],
  config: ModelConfig,
  chunk: int | None = None,
) -> Float[Array, 'B T D']:
  """Output projection, residual, norm, gated feed-forward, residual.

  Args:
    layer: one of `Weights.layers`.
    x: the layer's input.
    attention: what the queries attended to.
    config: the model.
    chunk: positions done at a time, which bounds the feed-forward's
      [B chunk 2F] intermediate; None: all. On a CPU 512 keep it in the cache:
      SmolLM2, 2,048 tokens, one core: 102 ms a layer instead of 120. Where
      the sequence is sharded, give None: chunks would cross the shards.
  """
  length = x.shape[1]
  if chunk is None or chunk >= length:
    return _layer_output(layer, x, attention, config)
  whole = length - length % chunk

  def split(a):
    a = a[:, :whole].reshape(a.shape[0], -1, chunk, *a.shape[2:])
    return a.swapaxes(0, 1)

  parts = lax.map(
    lambda part: _layer_output(layer, part[0], part[1], config),
    (split(x), split(attention)),
  )
  out = parts.swapaxes(0, 1).reshape(x.shape[0], whole, x.shape[2])
  if whole == length:
    return out
  rest = _layer_output(layer, x[:, whole:], attention[:, whole:], config)
  return jnp.concatenate([out, rest], axis=1)


def _layer_output(layer, x, attention, config):
  delta = attention_output(layer, x, attention)
  x, y = add_norm(x, delta, layer['ff_norm'], config.norm_eps)
  return x + feed_forward(layer, y)


def attention_output(
  layer: dict[str, jax.Array],
  x: Float[Array, 'B T D'],
  attention: Float[Array, 'B T N H'],
) -> Float[Array, 'B T D']:
  """Output projection, as x is, to which it is not added yet."""
  with jax.named_scope('attention_output'):
    attention = attention.astype(x.dtype).reshape(*x.shape[:2], -1)
    o = layer['o'].reshape(x.shape[-1], -1)
    return _einsum('btm,dm->btd', attention, o)


def feed_forward(
  layer: dict[str, jax.Array], x: Float[Array, 'B T D']
) -> Float[Array, 'B T D']:
  """Gated feed-forward of a normalised x, not added to the residual yet."""
  with jax.named_scope('feed_forward'):
    y = _einsum('btd,od->bto', x, layer['gate_up'].reshape(-1, x.shape[-1]))
    y = y.reshape(*x.shape[:2], -1, 2)
    y = jax.nn.silu(y[..., 0]) * y[..., 1]
    return _einsum('btf,df->btd', y, layer['down'])


def logits(
  weights: Weights, x: Float[Array, 'B T D'], config: ModelConfig
) -> Float[Array, 'B T V']:
  """Last norm and output matrix, float32. Give it only the positions asked."""
  with jax.named_scope('logits'):
    x = rms_norm(x, weights.head['norm'], config.norm_eps)
  return unembed(weights, x, config)


def unembed(
  weights: Weights, x: Float[Array, 'B T D'], config: ModelConfig
) -> Float[Array, 'B T V']:
  """`logits` of an x that is normalised already."""
  with jax.named_scope('logits'):
    source = weights.embed if config.tie_embeddings else weights.head
    return _einsum('btd,vd->btv', x, source['table'], jnp.float32)


def dense_attention(config: ModelConfig, positions=None) -> Attention:
  """Plain causal attention for `forward`: the oracle, and for training.

  O(T^2) memory. Rotates q and k; heeds the model's sliding window.

  Args:
    config: the model.
    positions: int32 [B T]; None: 0, 1, 2, ...
  """
  rope = make_rope(config)

  def attend(q, k, v, layer):
    del layer
    batch, length, _, dim = q.shape
    at = positions
    if at is None:
      at = jnp.broadcast_to(jnp.arange(length), (batch, length))
    q, k = rope(q, at), rope(k, at)
    q = q.reshape(batch, length, config.n_kv_heads, config.group, dim)
    scores = _einsum('btkgh,bskh->bkgts', q, k, jnp.float32) * dim**-0.5
    seen = at[:, None, :] <= at[:, :, None]  # [B T S]
    if config.sliding_window is not None:
      seen &= at[:, None, :] > at[:, :, None] - config.sliding_window
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = _einsum('bkgts,bskh->btkgh', weights, v)
    return out.reshape(batch, length, config.n_heads, dim)

  return attend


def forward(
  weights: Weights,
  tokens: Int[Array, 'B T'],
  config: ModelConfig,
  attention: Attention | None = None,
  *,
  remat: bool = False,
  chunk: int | None = None,
) -> Float[Array, 'B T V']:
  """Logits of every position, for tests and training (differentiable).

  Args:
    weights: the model's.
    tokens: int32 [B T].
    config: the model.
    attention: `attention(q, k, v, layer) -> out [B T N H]` with q [B T N H],
      k, v [B T K H] not rotated, and the layer's index; None: dense and causal.
    remat: recomputes each layer in the backward pass.
    chunk: see `layer_output`.
  """
  attention = attention or dense_attention(config)

  def layer(i, weights, x):
    q, k, v = attention_inputs(weights, x, config)
    return layer_output(weights, x, attention(q, k, v, i), config, chunk)

  if remat:
    layer = jax.checkpoint(layer, static_argnums=0)
  x = embed(weights.embed, tokens, config)
  for i, state in enumerate(weights.layers):
    x = layer(i, state, x)
  return logits(weights, x, config)
