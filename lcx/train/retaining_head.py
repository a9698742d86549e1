"""Trains retaining heads: which keys will answers attend to.

Huang et al., "Locret", arXiv:2410.01805; recipe of APB (2502.12085, appendix
B.1) and of the released code. The model is frozen; of each document,

  label[k, j] = max over answer tokens p and query heads of kv head j of
                q_p . k_k / sqrt(H), rotated, before the softmax
  loss = mean over prompt tokens, layers and kv heads of
         smooth_l1(score, label)
         + smooth * sum over layers of the mean squared difference of the
           scores of neighbouring tokens

Layers do not depend on each other's heads, so each layer's gradient is taken
while its queries and keys are at hand: one forward pass a document, and no
activation outlives its layer.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from kernels_pallas import differentiable
from lcx import sharding
from lcx.head_profile import fingerprint as architecture
from lcx.models import transformer
from lcx.models.config import ModelConfig
from lcx.models.transformer import Weights
from lcx.select import retaining_head
from lcx.train.checkpoint import Checkpoints, fingerprint
from lcx.train.head_profile import Stacked, stack
from lcx.train.passkeys import Writer

_ANSWERS = 64  # answer tokens whose scores exist at a time


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How heads are trained; the defaults are APB's.

  Attributes:
    steps: documents, one a step.
    rate: peak learning rate of AdamW.
    warmup: steps in which the rate rises from 0; then it falls to 0.
    width: of the hidden layer.
    smooth: weight of the difference of neighbours.
    clip: largest absolute value of a gradient's element.
    decay: of the weights.
  """

  steps: int = 3000
  rate: float = 5e-4
  warmup: int = 300
  width: int = 1024
  smooth: float = 0.0025
  clip: float = 0.5
  decay: float = 0.0

  def __post_init__(self):
    if self.steps < 1 or self.rate <= 0 or self.width < 1:
      raise ValueError(
        f'steps={self.steps}, rate={self.rate} and width={self.width} must be '
        'positive'
      )
    if not 0 <= self.warmup < self.steps:
      raise ValueError(f'warmup={self.warmup} must be below steps={self.steps}')

  def optimizer(self) -> optax.GradientTransformation:
    """AdamW with a linear schedule, clipped by value."""
    rate = optax.join_schedules(
      [
        optax.linear_schedule(0.0, self.rate, max(self.warmup, 1)),
        optax.linear_schedule(self.rate, 0.0, self.steps - self.warmup),
      ],
      [self.warmup],
    )
    return optax.chain(
      optax.clip(self.clip),
      optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=self.decay),
    )


def labels(q, k, answer):
  """float32 [T K]: the best scaled score of an answer's query, a kv head.

  Args:
    q: [T N H] rotated.
    k: [T K H] rotated.
    answer: bool [T] tokens of answers.
  """
  length, heads, dim = k.shape
  count = -(-length // _ANSWERS)
  # Answers first: chunks without one cost nothing.
  order = jnp.argsort(~answer)
  pad = count * _ANSWERS - length
  index = jnp.pad(order, (0, pad))
  real = jnp.pad(answer[order], (0, pad))

  def step(carry):
    i, best = carry
    at = lax.dynamic_slice_in_dim(index, i * _ANSWERS, _ANSWERS)
    some = lax.dynamic_slice_in_dim(real, i * _ANSWERS, _ANSWERS)
    part = q[at].reshape(_ANSWERS, heads, -1, dim)
    scores = jnp.einsum(
      'mkgh,tkh->mkgt', part, k, preferred_element_type=jnp.float32
    )
    scores = jnp.where(some[:, None, None, None], scores, -jnp.inf)
    return i + 1, jnp.maximum(best, scores.max(axis=(0, 2)).T)

  best = jnp.full((length, heads), -jnp.inf)
  many = -(-jnp.sum(answer) // _ANSWERS)
  _, best = lax.while_loop(lambda c: c[0] < many, step, (0, best))
  return best * dim**-0.5


def layer_loss(heads, q, k, v, label, prompt, smooth: float):
  """(loss, smooth L1) of one layer; q, k, v [T . H] unrotated."""
  score = retaining_head.score(heads, q[None], k[None], v[None])[0]
  weight = prompt / jnp.maximum(jnp.sum(prompt), 1)
  error = jnp.where(prompt[:, None], score - label, 0.0)
  size = jnp.abs(error)
  error = jnp.where(size < 1, 0.5 * error**2, size - 0.5)
  fit = jnp.sum(jnp.mean(error, axis=1) * weight)
  both = prompt[1:] & prompt[:-1]
  step = jnp.mean((score[1:] - score[:-1]) ** 2, axis=1)
  step = jnp.sum(jnp.where(both, step, 0.0)) / jnp.maximum(jnp.sum(both), 1)
  return fit + smooth * step, fit


def gradients(heads, weights: Stacked, tokens, answer, config, recipe: Recipe):
  """(gradient of all layers' heads, {'loss', 'fit'}) of one document.

  Args:
    heads: of all layers, as `retaining_head.init` makes them.
    weights: the frozen model's, stacked.
    tokens: int32 [1 T].
    answer: bool [T].
    config: the model.
    recipe: numbers.
  """
  rope = transformer.make_rope(config)
  at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  prompt = jnp.cumsum(answer) == 0  # what stands before the first answer
  layers = config.n_layers

  def layer(x, inputs):
    weights, heads = inputs
    q, k, v = transformer.attention_inputs(weights, x, config)
    turned_q, turned_k = rope(q, at), rope(k, at)
    label = labels(turned_q[0], turned_k[0], answer)

    def loss(heads):
      total, fit = layer_loss(
        heads, q[0], k[0], v[0], label, prompt, layers * recipe.smooth
      )
      return total / layers, fit / layers

    (total, fit), gradient = jax.value_and_grad(loss, has_aux=True)(heads)
    out = differentiable.attention(
      turned_q,
      turned_k.swapaxes(1, 2),
      v.swapaxes(1, 2),
      window=config.sliding_window,
    )
    x = transformer.layer_output(weights, x, out, config)
    return x, (gradient, total, fit)

  x = transformer.embed(weights['embed'], tokens, config)
  _, (gradient, total, fit) = lax.scan(layer, x, (weights['layers'], heads))
  return gradient, {'loss': jnp.sum(total), 'fit': jnp.sum(fit)}


class HeadTrainer:
  """A run: heads and optimiser, resumable at any step.

  Attributes:
    state: {'heads', 'optimizer'}.
    step: steps done.
    fingerprint: of what decides the run.

  Args:
    config: the model.
    weights: its arrays, frozen.
    sha256: of its files.
    writer: of documents.
    recipe: numbers.
  """

  def __init__(
    self,
    config: ModelConfig,
    weights: Weights,
    sha256: str,
    writer: Writer,
    recipe: Recipe,
  ):
    self.config, self.writer, self.recipe = config, writer, recipe
    mesh = sharding.make_mesh()
    self.weights = stack(weights, config, mesh)
    self.step = 0
    self._transform = recipe.optimizer()
    heads = retaining_head.init(
      config, recipe.width, jax.random.key(writer.seed)
    )
    self.state = jax.device_put(
      {'heads': heads, 'optimizer': self._transform.init(heads)},
      sharding.named(mesh, P()),
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
    self._move = jax.jit(self._update, donate_argnums=0)

  def _update(self, state, weights, tokens, answer):
    gradient, metrics = gradients(
      state['heads'], weights, tokens, answer, self.config, self.recipe
    )
    moves, moments = self._transform.update(
      gradient, state['optimizer'], state['heads']
    )
    heads = optax.apply_updates(state['heads'], moves)
    return {'heads': heads, 'optimizer': moments}, metrics

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
        self.state, self.weights, tokens[None], answer
      )
      row = {name: float(x) for name, x in metrics.items()}
      row |= {'step': self.step, 'length': len(tokens)}
      self.step += 1
      yield row

  @property
  def arrays(self) -> dict[str, np.ndarray]:
    """The heads as a file holds them, bfloat16."""
    return {
      name: np.asarray(x.astype(jnp.bfloat16))
      for name, x in self.state['heads'].items()
    }
