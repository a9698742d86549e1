"""The training loop: one step at a time, resumable anywhere."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from lcx import sharding
from lcx.models import transformer
from lcx.models.config import ModelConfig
from lcx.train import feed, model, optimizer
from lcx.train.checkpoint import Checkpoints, fingerprint
from lcx.train.mixture import KINDS, Mixture

_FETCH = 20  # steps between two reads of metrics off the device


@dataclasses.dataclass(frozen=True)
class Options:
  """What is no part of the model, the optimiser or the data.

  Attributes:
    seed: of the weights.
    lm_weight: of the loss over everything, beside that over answers.
    remat: recomputes layers in the backward pass.
    workers: processes that make batches; 0: none. Does not change a run.
    start: SHA-256 of the weights to begin with; '': random weights.
  """

  seed: int = 0
  lm_weight: float = 0.25
  remat: bool = False
  workers: int = 0
  start: str = ''


class Trainer:
  """A run: its state, and what moves it.

  Attributes:
    state: {'params', 'optimizer', 'step'}.
    step: steps done.

  Args:
    config: the model; its dtype is that of the activations, parameters are
      float32.
    rule: the optimiser's numbers.
    mixture: the data.
    mesh: of `lcx.sharding.make_mesh`.
    options: the rest.
    weights: where to begin, those of `options.start`; None: random weights.
  """

  def __init__(
    self,
    config: ModelConfig,
    rule: optimizer.OptimizerConfig,
    mixture: Mixture,
    mesh,
    options: Options,
    weights: transformer.Weights | None = None,
  ):
    for stage in mixture.stages:
      _check_split(stage, mesh)
    self.config, self.mixture, self.mesh = config, mixture, mesh
    self.options = options
    self.step = 0
    self._transform = optimizer.make(rule, mixture.steps)
    decides = {
      'model': dataclasses.asdict(config),
      'optimizer': dataclasses.asdict(rule),
      'stages': [dataclasses.asdict(s) for s in mixture.stages],
      'data': [mixture.seed, mixture.writer.corpus.sha256],
      'tokenizer': mixture.writer.tokenizer.to_str(),
      'options': [options.seed, options.lm_weight],
    }
    if options.start:  # random weights keep the fingerprint they always had
      decides['start'] = options.start
    self.fingerprint = fingerprint(decides)
    self.state = self._start(weights)
    self._gradient = jax.jit(self._loss_and_gradient)
    self._move = jax.jit(self._update, donate_argnums=(0, 1))

  def _start(self, weights) -> dict[str, Any]:
    place = sharding.named(self.mesh, model.specs(self.config, self.mesh))
    wide = self.config.replace(dtype='float32')

    def make(key):
      given = transformer.init(wide, key) if weights is None else weights
      params = model.stack(given)
      return jax.lax.with_sharding_constraint(params, place)

    params = jax.jit(make)(jax.random.key(self.options.seed))
    moments = jax.jit(self._transform.init)(params)
    whole = sharding.named(self.mesh, P())
    moments = jax.tree.map(  # counters live on every device, too
      lambda x: jax.device_put(x, whole) if x.ndim == 0 else x, moments
    )
    return {'params': params, 'optimizer': moments}

  def _loss_and_gradient(self, params, tokens, index, weight, kind):
    loss = jax.value_and_grad(model.losses, has_aux=True)
    (total, metrics), gradient = loss(
      params,
      tokens,
      index,
      weight,
      kind,
      self.config,
      self.mesh,
      lm_weight=self.options.lm_weight,
      remat=self.options.remat,
    )
    norm = optax.global_norm(gradient)
    return gradient, {'loss': total, **metrics, 'gradient': norm}

  def _update(self, params, moments, gradient):
    moves, moments = self._transform.update(gradient, moments, params)
    return optax.apply_updates(params, moves), moments

  def restore(self, checkpoints: Checkpoints) -> bool:
    """Goes on from the latest checkpoint, if there is one."""
    step = checkpoints.latest
    if step is None:
      return False
    self.state = checkpoints.restore(self.state)
    self.step = step
    return True

  def save(self, checkpoints: Checkpoints) -> None:
    checkpoints.save(self.step, self.state)

  def run(self, stop: int) -> Iterator[list[dict[str, float]]]:
    """Trains up to step `stop`; yields the metrics of some steps at a time.

    Each row has step, loss, answer, text (nats), accuracy (of answer tokens;
    `accuracy_KIND` of each kind),
    gradient (norm before clipping), length, tokens (of the step), seconds
    (mean of the yielded steps) and flops (of the step).
    """
    stop = min(stop, self.mixture.steps)
    rows = sharding.named(self.mesh, P('data', 'seq'))
    few = sharding.named(self.mesh, P('data'))
    both = sharding.named(self.mesh, P(None, 'data'))
    pending: list[tuple[int, dict]] = []
    begin = time.perf_counter()
    source = feed.batches(self.mixture, self.step, stop, self.options.workers)
    for batch in source:
      data = jax.device_put(
        (batch.tokens, batch.index, batch.weight, batch.kind),
        (rows, few, both, few),
      )
      gradient, metrics = self._gradient(self.state['params'], *data)
      params, moments = self._move(
        self.state['params'], self.state['optimizer'], gradient
      )
      self.state = {'params': params, 'optimizer': moments}
      pending.append((self.step, metrics))
      self.step += 1
      if len(pending) == _FETCH or self.step == stop:
        found = self._fetch(pending)
        now = time.perf_counter()
        for row in found:
          row['seconds'] = (now - begin) / len(found)
        begin, pending = now, []
        yield found

  def _fetch(self, pending):
    found = []
    for (step, _), metrics in zip(
      pending, jax.device_get([m for _, m in pending])
    ):
      stage = self.mixture.stage(step)
      right, count = metrics.pop('right'), metrics.pop('count')
      row: dict[str, float] = {k: float(v) for k, v in metrics.items()}
      for name, hits, all_ in zip(KINDS, right[1:], count[1:]):
        if all_:
          row[f'accuracy_{name}'] = float(hits / all_)
      row |= {
        'step': step,
        'length': stage.length,
        'tokens': stage.batch * stage.length,
        'flops': stage.batch
        * model.flops(self.config, stage.length, 2 * stage.targets),
      }
      found.append(row)
    return found

  def weights(self, dtype: str = 'bfloat16') -> transformer.Weights:
    """The weights as they stand."""
    return model.unstack(self.state['params'], dtype)

  def finite(self) -> bool:
    """Whether all parameters are finite."""
    return all(
      bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(self.state['params'])
    )


def _check_split(stage, mesh):
  data, seq = mesh.shape['data'], mesh.shape['seq']
  if stage.batch % data or stage.length % seq:
    raise ValueError(
      f'mesh data={data} must divide batch={stage.batch} and seq={seq} must '
      f'divide length={stage.length} of every stage'
    )
