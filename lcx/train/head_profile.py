"""Finds the gates of a head profile, by training or by looking.

DuoAttention, arXiv:2410.10819, section 3.1: every kv head gets a gate a that
mixes its full and its streaming attention; gates alone are trained, so that the
mixed model's last hidden states of the passkeys' answers stay those of the full
model, while the gates are pushed to 0:

  attention = a full + (1 - a) streaming
  loss = mean over answer tokens of |h_full - h_mixed|^2 / D + weight * mean |a|

Both means are those of the released code (the paper writes sums). Training
free: `distant_mass`, the softmax mass that answers put outside of sink and
recent tokens. DuoAttention's ablation finds the trained gates far better.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas import differentiable
from lcx import sharding
from lcx.head_profile import fingerprint as architecture
from lcx.models import transformer
from lcx.models.config import ModelConfig
from lcx.models.transformer import Weights
from lcx.train.checkpoint import Checkpoints, fingerprint
from lcx.train.passkeys import Writer

Stacked = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How gates are trained; the defaults are the released ones.

  Attributes:
    steps: documents, one a step.
    rate: peak learning rate of Adam.
    ramp: share of the steps in which the rate rises from a tenth, and again in
      which it falls back to it.
    weight: of the mean gate in the loss.
    sink: first tokens that a streaming head sees.
    recent: last tokens that a streaming head sees.
  """

  steps: int = 2000
  rate: float = 0.02
  ramp: float = 0.2
  weight: float = 0.05
  sink: int = 128
  recent: int = 256

  def __post_init__(self):
    if self.steps < 1 or self.rate <= 0 or not 0 < self.ramp <= 0.5:
      raise ValueError(
        f'steps={self.steps} and rate={self.rate} must be positive, '
        f'ramp={self.ramp} within 0 and 0.5'
      )
    if self.sink < 0 or self.recent < 1:
      raise ValueError(f'sink={self.sink}, recent={self.recent} see no key')

  def schedule(self, step):
    """The rate: up from a tenth, flat, down to a tenth."""
    ramp = self.steps * self.ramp
    up, down = (step + 1) / ramp, (self.steps - step) / ramp
    factor = jnp.minimum(jnp.maximum(up, 0.1), jnp.maximum(down, 0.1))
    return self.rate * jnp.minimum(1.0, factor)


def stack(weights: Weights, config: ModelConfig, mesh=None) -> Stacked:
  """Frozen weights in their own dtype, layers stacked for `lax.scan`."""
  layers = jax.tree.map(lambda *x: jnp.stack(x), *weights.layers)
  found = {'embed': weights.embed, 'layers': layers, 'head': weights.head}
  if mesh is None:
    return found
  plain = transformer.weight_specs(config, mesh)
  specs = {
    'embed': plain.embed,
    'layers': {n: P(None, *spec) for n, spec in plain.layers[0].items()},
    'head': plain.head,
  }
  return jax.device_put(found, sharding.named(mesh, specs))


def hidden(
  weights: Stacked,
  tokens: Int32[Array, 'B T'],
  gates: Float[Array, 'L K'] | None,
  config: ModelConfig,
  mesh,
  recipe: Recipe,
) -> Float[Array, 'B T D']:
  """The normed last hidden states; gates None: of the full model.

  Rows are split over the mesh's "data", heads over "model". Each layer is
  recomputed in the backward pass.
  """
  rope = transformer.make_rope(config)
  at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  heads = P('data', None, 'model')
  window = recipe.recent
  if config.sliding_window is not None:
    window = min(window, config.sliding_window)

  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(heads, heads, heads, P('model')),
    out_specs=heads,
    check_vma=False,
  )
  def attend(q, k, v, gate):
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    attention = differentiable.attention
    full = attention(q, k, v, window=config.sliding_window)
    if gates is None:
      return full
    sink = 0 if config.sliding_window is not None else recipe.sink
    near = attention(q, k, v, sink=sink, window=window)
    gate = jnp.repeat(gate, q.shape[2] // k.shape[1])[:, None]
    return (gate * full + (1 - gate) * near).astype(q.dtype)

  @jax.checkpoint
  def layer(x, inputs):
    weights, gate = inputs
    q, k, v = transformer.attention_inputs(weights, x, config)
    out = attend(rope(q, at), rope(k, at), v, gate)
    return transformer.layer_output(weights, x, out, config), None

  shape = (config.n_layers, config.n_kv_heads)
  some = jnp.ones(shape) if gates is None else gates
  x = transformer.embed(weights['embed'], tokens, config)
  x, _ = lax.scan(layer, x, (weights['layers'], some))
  return transformer.rms_norm(x, weights['head']['norm'], config.norm_eps)


def losses(
  gates: Float[Array, 'L K'],
  weights: Stacked,
  tokens: Int32[Array, 'B T'],
  answer: Bool[Array, 'B T'],
  config: ModelConfig,
  mesh,
  recipe: Recipe,
):
  """(loss, {'distill', 'gate'}); see the module."""
  want = lax.stop_gradient(hidden(weights, tokens, None, config, mesh, recipe))
  got = hidden(weights, tokens, gates, config, mesh, recipe)
  error = (want.astype(jnp.float32) - got.astype(jnp.float32)) ** 2
  error = jnp.sum(jnp.where(answer, jnp.mean(error, axis=-1), 0.0))
  distill = error / jnp.maximum(jnp.sum(answer), 1)
  gate = jnp.mean(jnp.abs(gates))
  return distill + recipe.weight * gate, {'distill': distill, 'gate': gate}


class GateTrainer:
  """A run: gates and optimiser, resumable at any step.

  Attributes:
    state: {'gates', 'optimizer'}.
    step: steps done.

  Args:
    config: the model.
    weights: its arrays, frozen.
    sha256: of its files.
    writer: of documents.
    recipe: numbers.
    mesh: axes ("data", "seq", "model"), seq 1.
  """

  def __init__(
    self,
    config: ModelConfig,
    weights: Weights,
    sha256: str,
    writer: Writer,
    recipe: Recipe,
    mesh=None,
  ):
    self.config, self.writer, self.recipe = config, writer, recipe
    self.mesh = mesh if mesh is not None else sharding.make_mesh()
    if self.mesh.shape['seq'] * self.mesh.shape['data'] > 1:
      raise ValueError('gates are trained on a mesh of 1 x 1 x model devices')
    self.weights = stack(weights, config, self.mesh)
    self.step = 0
    self._transform = optax.adam(recipe.schedule)
    gates = jnp.ones((config.n_layers, config.n_kv_heads), jnp.float32)
    whole = sharding.named(self.mesh, P())
    self.state = jax.device_put(
      {'gates': gates, 'optimizer': self._transform.init(gates)}, whole
    )
    self.fingerprint = fingerprint(
      {
        'model': [architecture(config), sha256, config.dtype],
        'recipe': dataclasses.asdict(recipe),
        'documents': dataclasses.asdict(writer.style),
        'seed': writer.seed,
        'haystack': fingerprint(writer.haystack.tolist()),
      }
    )
    self._move = jax.jit(self._update)

  def _update(self, state, weights, tokens, answer):
    loss = jax.value_and_grad(losses, has_aux=True)
    (total, metrics), gradient = loss(
      state['gates'],
      weights,
      tokens,
      answer,
      self.config,
      self.mesh,
      self.recipe,
    )
    moves, moments = self._transform.update(gradient, state['optimizer'])
    gates = jnp.clip(jnp.asarray(state['gates'] + moves), 0.0, 1.0)
    metrics |= {'loss': total, 'below_half': jnp.mean(gates < 0.5)}
    return {'gates': gates, 'optimizer': moments}, metrics

  def restore(self, checkpoints: Checkpoints) -> bool:
    """Goes on from the latest checkpoint, if there is one."""
    step = checkpoints.latest
    if step is None:
      return False
    self.state, self.step = checkpoints.restore(self.state), step
    return True

  def save(self, checkpoints: Checkpoints) -> None:
    checkpoints.save(self.step, self.state)

  def run(self, stop: int) -> Iterator[dict[str, float]]:
    """Trains up to step `stop`; yields each step's metrics."""
    while self.step < min(stop, self.recipe.steps):
      tokens, answer = self.writer.document(self.step)
      self.state, metrics = self._move(
        self.state, self.weights, tokens[None], answer[None]
      )
      row = {name: float(x) for name, x in metrics.items()}
      row |= {'step': self.step, 'length': len(tokens)}
      self.step += 1
      yield row

  @property
  def gates(self) -> tuple[tuple[float, ...], ...]:
    return as_rows(self.state['gates'])


def distant_mass(
  config: ModelConfig,
  weights: Weights,
  writer: Writer,
  recipe: Recipe,
  *,
  documents: int = 4,
  queries: int = 64,
) -> tuple[tuple[float, ...], ...]:
  """Gates without training: the mass of attention on distant tokens.

  Of each kv head, the largest of its query heads' means, over some answer
  tokens, of the softmax mass outside of sink and recent tokens.

  Args:
    config: the model.
    weights: its arrays.
    writer: of documents; the first `documents` are read.
    recipe: sink and recent.
    documents: read.
    queries: answer tokens of each that are looked at, the last ones.
  """

  @jax.jit
  def look(weights, tokens, at):
    rope = transformer.make_rope(config)
    where = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    key = jnp.arange(tokens.shape[1])
    near = (key < recipe.sink) | (key > at[:, None] - recipe.recent)

    def head(args):
      q, k = args  # [m G H], [T H]
      score = jnp.einsum(
        'mgh,th->gmt', q, k, preferred_element_type=jnp.float32
      )
      score = score * config.head_dim**-0.5
      score = jnp.where(key <= at[:, None], score, -jnp.inf)
      weight = jax.nn.softmax(score, axis=-1)
      return jnp.max(jnp.mean(jnp.sum(weight * ~near, axis=-1), axis=-1))

    def layer(x, weights):
      q, k, v = transformer.attention_inputs(weights, x, config)
      q, k = rope(q, where), rope(k, where)
      some = q[0, at].reshape(len(at), config.n_kv_heads, -1, q.shape[-1])
      mass = lax.map(head, (some.swapaxes(0, 1), k[0].swapaxes(0, 1)))
      out = differentiable.attention(
        q, k.swapaxes(1, 2), v.swapaxes(1, 2), window=config.sliding_window
      )
      return transformer.layer_output(weights, x, out, config), mass

    x = transformer.embed(weights['embed'], tokens, config)
    return lax.scan(layer, x, weights['layers'])[1]

  stacked, total = stack(weights, config), 0.0
  for step in range(documents):
    tokens, answer = writer.document(step)
    at = np.flatnonzero(answer)[-queries:]
    total = total + look(stacked, tokens[None], at)
  return as_rows(total / documents)


def as_rows(gates) -> tuple[tuple[float, ...], ...]:
  """Gates as a profile's numbers, rounded to 1e-6 and within 0 and 1."""
  found = np.clip(np.round(np.asarray(gates, float), 6), 0.0, 1.0)
  return tuple(tuple(float(g) for g in row) for row in found)
