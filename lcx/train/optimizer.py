"""Muon for matrices, Adam for the rest, one schedule, clipped gradients."""

import dataclasses
from typing import Literal

import optax
from optax.contrib import MuonDimensionNumbers, muon

# Inputs and outputs of the stacked matrices (axis 0 is the layer).
_MATRICES = {
  'qkv': MuonDimensionNumbers(4, (1, 2, 3)),  # [L K G+2 H D]
  'o': MuonDimensionNumbers((2, 3), 1),  # [L D N H]
  'gate_up': MuonDimensionNumbers(3, (1, 2)),  # [L F 2 D], as one matrix
  'down': MuonDimensionNumbers(2, 1),  # [L D F]
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """How the parameters move.

  Attributes:
    name: 'muon' (arXiv:2502.16982's scaling: an update's RMS is 0.2 of the
      rate, as Adam's) or 'adam' for every parameter.
    rate: peak learning rate of the matrices.
    other_rate: of embedding and norms (and of everything under 'adam').
    warmup: steps of the linear rise.
    decay: share of all steps at the end in which the rate falls to 0.
    beta1, beta2: Adam's.
    weight_decay: of the matrices.
    clip: largest global norm of a gradient.
  """

  name: Literal['muon', 'adam'] = 'muon'
  rate: float = 4e-3
  other_rate: float = 2e-3
  warmup: int = 100
  decay: float = 0.4
  beta1: float = 0.9
  beta2: float = 0.98
  weight_decay: float = 0.01
  clip: float = 1.0

  def __post_init__(self):
    if self.name not in ('muon', 'adam'):
      raise ValueError(f'optimizer {self.name!r} must be muon or adam')
    if min(self.rate, self.other_rate, self.clip) <= 0:
      raise ValueError(
        f'optimizer: rate={self.rate}, other_rate={self.other_rate} and '
        f'clip={self.clip} must be positive'
      )
    if not 0 < self.decay <= 1:
      raise ValueError(f'optimizer: decay={self.decay} must be in (0, 1]')


def shape(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """The schedule as a factor: rises, stays at 1, falls to 0 linearly."""
  fall = max(1, int(steps * config.decay))
  stay = max(config.warmup, steps - fall)
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, 1.0, config.warmup),
      optax.constant_schedule(1.0),
      optax.linear_schedule(1.0, 0.0, fall),
    ],
    [config.warmup, stay],
  )


def make(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """The optimiser for parameters of `lcx.train.model.stack`."""
  factor = shape(config, steps)

  def scaled(rate):
    return lambda count: rate * factor(count)

  if config.name == 'adam':
    rule = optax.adamw(
      scaled(config.other_rate),
      b1=config.beta1,
      b2=config.beta2,
      weight_decay=config.weight_decay,
    )
  else:
    rule = muon(
      scaled(config.rate),
      weight_decay=config.weight_decay,
      adam_b1=config.beta1,
      adam_b2=config.beta2,
      adam_learning_rate=scaled(config.other_rate),
      muon_weight_dimension_numbers=_dimensions,
      consistent_rms=0.2,
    )
  return optax.chain(optax.clip_by_global_norm(config.clip), rule)


def _dimensions(params):
  return {
    'embed': dict.fromkeys(params['embed']),
    'layers': {name: _MATRICES.get(name) for name in params['layers']},
    'head': dict.fromkeys(params['head']),
  }
