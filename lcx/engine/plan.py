"""What the engine's programs are specialised to: model, method and mesh."""

import dataclasses
import functools
import math
from typing import Literal, get_args

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import add_norm
from lcx.methods.base import Axes, Context, Method
from lcx.models import decode_layer, transformer
from lcx.models.config import ModelConfig

AXES = Axes()
Residual = Literal['whole', 'spread']
ROWS = P(AXES.data)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a program is specialised to (static, hashable).

  Attributes:
    config: the model.
    method: the composition.
    mesh: with axes ("data", "seq", "model").
    trace: sums what attention did into the results.
    residual: in prefill, between attention and feed-forward, the devices along
      "model" all hold the tokens of their sequence shard ('whole'), or each its
      part of them ('spread': sequence parallelism, arXiv:2205.05198): less
      memory, and sums over heads and feed-forward may be scattered.

  Raises:
    ValueError: an unknown `residual`.
  """

  config: ModelConfig
  method: Method
  mesh: jax.sharding.Mesh
  trace: bool = True
  residual: Residual = 'whole'

  def __post_init__(self):
    if self.residual not in get_args(Residual):
      raise ValueError(
        f'residual={self.residual!r} must be one of {get_args(Residual)}'
      )

  @property
  def token_axes(self) -> tuple[str, ...]:
    """Axes over which a prefill's tokens are spread between its parts."""
    if self.residual == 'spread':
      return (AXES.seq, AXES.model)
    return (AXES.seq,)

  @property
  def chunk(self) -> int:
    """Positions of feed-forward that a shard does at a time in prefill.

    On a CPU, what a chunk makes fits the cache (`layer_output` has the times).
    Pieces of a shard do theirs together.
    """
    chunk = 512 if self.mesh.devices.flat[0].platform == 'cpu' else 4096
    together = math.prod(self.mesh.shape[a] for a in self.token_axes[1:])
    return max(1, chunk // together)

  @property
  def steps_a_check(self) -> int:
    """Steps of decode before it is asked whether to go on.

    A GPU's host waits for the device to know, and launches nothing meanwhile;
    of steps whose number is known it launches the next ones ahead. So rows that
    have ended cost up to 3 idle steps there.
    """
    gpu = self.mesh.devices.flat[0].platform in ('gpu', 'cuda')
    return 4 if gpu else 1

  def at_layer(self, layer: int) -> 'Plan':
    """The plan of a decode step's layer."""
    decode = self.method.decode.at_layer(layer)
    method = dataclasses.replace(self.method, decode=decode)
    return dataclasses.replace(self, method=method)

  def cache_specs(self):
    return self.method.cache.specs()

  def state_specs(self):
    return self.method.decode.state_specs(AXES)

  def learned_specs(self):
    return self.method.prefill.learned_specs(AXES)

  def place(self, x, *spec):
    """Pins an array's sharding, so that programs fit one another."""
    return jax.lax.with_sharding_constraint(
      x, NamedSharding(self.mesh, P(*spec))
    )

  def place_tokens(self, x):
    """Pins activations [B T D] of a prefill.

    Raises:
      ValueError: their pieces would not be equal.
    """
    size = math.prod(self.mesh.shape[a] for a in self.token_axes)
    if x.shape[1] % size:
      raise ValueError(
        f"residual={self.residual!r} cuts the prompt's {x.shape[1]} padded "
        f"tokens into {size} equal pieces: take residual='whole'"
      )
    return self.place(x, AXES.data, self.token_axes)

  def context(self, **arrays) -> Context:
    return Context(
      **arrays,
      n_layers=self.config.n_layers,
      sliding_window=self.config.sliding_window,
      trace=self.trace,
      axes=AXES,
    )

  def fused(self, layer_weights, x) -> bool:
    """Whether `decode_layer` takes a layer's products."""
    # The partitioner cannot split a kernel: it would gather what a mesh splits.
    return self.mesh.size == 1 and decode_layer.serves(layer_weights, x)

  def add_norm(self, x, delta, scale):
    """`transformer.add_norm` of few tokens: one launch on a GPU."""
    eps = self.config.norm_eps
    if not add_norm.serves(x.shape[-1]):
      return transformer.add_norm(x, delta, scale, eps)
    run = functools.partial(add_norm.gpu.add_norm, eps=eps)
    return self.sharded(run, (ROWS, ROWS, P()), (ROWS, ROWS))(x, delta, scale)

  def sharded(self, function, in_specs, out_specs):
    # check_vma: pallas_call cannot name the axes its outputs vary over.
    return jax.shard_map(
      function,
      mesh=self.mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      check_vma=False,
    )
