"""The model in training: layers stacked and scanned, attention over a mesh.

One layer is traced for all of them, so each length of the curriculum compiles
in seconds. `unstack` gives the `Weights` that everything else takes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kernels_pallas import differentiable
from lcx import sharding
from lcx.models import transformer
from lcx.models.config import ModelConfig
from lcx.models.transformer import Weights

Params = dict[str, Any]
_KINDS = 16  # that accuracy is counted by, at most


def stack(weights: Weights) -> Params:
  """Trainable float32 parameters: {'embed', 'layers' [L ...], 'head'}."""
  layers = jax.tree.map(lambda *x: jnp.stack(x), *weights.layers)
  tree = {'embed': weights.embed, 'layers': layers, 'head': weights.head}
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def unstack(params: Params, dtype: str = 'bfloat16') -> Weights:
  """The model's weights, one dict a layer."""
  cast = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
  count = cast['layers']['o'].shape[0]
  return Weights(
    embed=cast['embed'],
    layers=tuple(
      jax.tree.map(lambda x, i=i: x[i], cast['layers']) for i in range(count)
    ),
    head=cast['head'],
  )


def specs(config: ModelConfig, mesh) -> Params:
  """PartitionSpecs of the parameters: the transformer's, stacked."""
  plain = transformer.weight_specs(config, mesh)
  layers = {name: P(None, *spec) for name, spec in plain.layers[0].items()}
  return {'embed': plain.embed, 'layers': layers, 'head': plain.head}


def attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T K H'],
  mesh,
) -> Float[Array, 'B T N H']:
  """Causal attention over rotated q and k, sharded over the mesh.

  Rows split over `data`, heads over `model`, queries over `seq`: each shard of
  the sequence gathers all keys and attends with its own queries.
  """
  if mesh.size == 1:
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return differentiable.attention(q, k, v)
  axes = P('data', 'seq', 'model', None)
  pieces = mesh.shape['seq']

  def shard(q, k, v):
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if pieces == 1:
      return differentiable.attention(q, k, v)
    k = lax.all_gather(k, 'seq', axis=2, tiled=True)
    v = lax.all_gather(v, 'seq', axis=2, tiled=True)
    length = q.shape[1]
    stop = lax.axis_index('seq') * length + jnp.arange(length) + 1
    stop = jnp.broadcast_to(stop.astype(jnp.int32), q.shape[:2])
    scale = q.shape[-1] ** -0.5
    start = jnp.zeros_like(stop)
    return differentiable.intervals(q, k, v, start, stop, scale).out

  run = jax.shard_map(
    shard, mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False
  )
  return run(q, k, v).astype(q.dtype)


def hidden(
  params: Params,
  tokens: Int[Array, 'B T'],
  config: ModelConfig,
  mesh,
  *,
  remat: bool = False,
) -> Float[Array, 'B T D']:
  """The last layer's output, before the last norm."""
  dtype = jnp.dtype(config.dtype)
  rope = transformer.make_rope(config)
  at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  place = sharding.named(mesh, P('data', 'seq', None))

  def layer(x, weights):
    weights = jax.tree.map(lambda w: w.astype(dtype), weights)
    q, k, v = transformer.attention_inputs(weights, x, config)
    out = attention(rope(q, at), rope(k, at), v, mesh)
    x = transformer.layer_output(weights, x, out, config)
    return lax.with_sharding_constraint(x, place), None

  if remat:
    layer = jax.checkpoint(layer)
  table = {'table': params['embed']['table'].astype(dtype)}
  x = transformer.embed(table, tokens, config)
  x, _ = lax.scan(
    layer, lax.with_sharding_constraint(x, place), params['layers']
  )
  return x


def logits(
  params: Params, x: Float[Array, 'B M D'], config: ModelConfig
) -> Float[Array, 'B M V']:
  """float32 logits of some positions."""
  dtype = jnp.dtype(config.dtype)
  weights = Weights(
    embed=jax.tree.map(lambda w: w.astype(dtype), params['embed']),
    layers=(),
    head=jax.tree.map(lambda w: w.astype(dtype), params['head']),
  )
  return transformer.logits(weights, x, config)


def losses(
  params: Params,
  tokens: Int[Array, 'B T'],
  index: Int[Array, 'B M'],
  weight: Float[Array, 'two B M'],
  kind: Int[Array, 'B M'],
  config: ModelConfig,
  mesh,
  *,
  lm_weight: float = 0.25,
  remat: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss: mean over answers plus a share of the mean over everything.

  Args:
    params: of `stack`.
    tokens: rows.
    index: positions; the token after each is predicted.
    weight: weights of the two means.
    kind: what the accuracy is counted by; 0: not at all.
    config: the model.
    mesh: where it runs.
    lm_weight: of the mean over everything.
    remat: recomputes each layer in the backward pass.

  Returns:
    The loss (nats a token), and {'answer', 'text' (both nats), 'accuracy' (of
    answer tokens), 'right' and 'count' [16] (answer tokens by kind)}.
  """
  x = hidden(params, tokens, config, mesh, remat=remat)
  x = jnp.take_along_axis(x, index[..., None], axis=1)
  target = jnp.take_along_axis(tokens, index + 1, axis=1)
  scores = logits(params, x, config)
  given = jnp.take_along_axis(scores, target[..., None], axis=-1)[..., 0]
  loss = jax.nn.logsumexp(scores, axis=-1) - given
  total = jnp.maximum(jnp.sum(weight, axis=(1, 2)), 1.0)
  answer, text = jnp.sum(weight * loss, axis=(1, 2)) / total
  right = given >= jnp.max(scores, axis=-1)
  accuracy = jnp.sum(weight[0] * right) / total[0]
  by_kind = jax.nn.one_hot(kind, _KINDS, dtype=jnp.float32)
  metrics = {
    'answer': answer,
    'text': text,
    'accuracy': accuracy,
    'right': jnp.einsum('bm,bmk->k', right.astype(jnp.float32), by_kind),
    'count': jnp.sum(by_kind, axis=(0, 1)),
  }
  return answer + lm_weight * text, metrics


def flops(config: ModelConfig, length: int, targets: int) -> float:
  """Floating-point operations of one training step a row of `length`.

  Three times the forward pass: 2 a weight and token, 4 N H a visible pair
  (half of length^2), and the head at the `targets` predicted positions.
  """
  weights = config.n_layers * (
    config.d_model * config.head_dim * 2 * (config.n_heads + config.n_kv_heads)
    + 3 * config.d_model * config.d_ff
  )
  pairs = length * length / 2
  attend = config.n_layers * 4 * config.n_heads * config.head_dim * pairs
  head = 2 * targets * config.d_model * config.vocab_size
  return 3 * (2 * weights * length + attend + head)
