"""Choosing the next token; settings are data, one value a row.

But for whether any row draws at all: a batch that does has its own program.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
  """How each row chooses.

  Attributes:
    temperature: float32 [B]; 0: greedy. None: every row is, and the program
      holds no code that draws.
    top_p: float32 [B]; the smallest set of tokens with this mass (nucleus
      sampling, arXiv:1904.09751); 1: all.
    seed: int32 [B]; a row's draws depend on its seed and position alone.
    stop: int32 [B n] tokens that end a row; -1 pads.
  """

  temperature: Float[Array, 'B'] | None
  top_p: Float[Array, 'B']
  seed: Int32[Array, 'B']
  stop: Int32[Array, 'B n']


def make_sampling(
  batch: int,
  *,
  temperature=0.0,
  top_p=1.0,
  seed=0,
  stop: tuple[int, ...] | list[tuple[int, ...]] = (),
) -> Sampling:
  """Sampling of a batch; scalars are broadcast, lists are one value a row."""
  rows = [stop] * batch if not stop or isinstance(stop[0], int) else stop
  width = max([1, *(len(row) for row in rows)])
  table = np.full((batch, width), -1, np.int32)
  for i, row in enumerate(rows):
    table[i, : len(row)] = row

  def per_row(value, dtype):
    return jnp.asarray(np.broadcast_to(np.asarray(value, dtype), (batch,)))

  heat, top = np.asarray(temperature), np.asarray(top_p)
  if np.any(heat < 0):
    raise ValueError(f'{temperature=} must not be negative')
  if np.any((top <= 0) | (top > 1)):
    raise ValueError(f'{top_p=} must lie in (0, 1]')
  return Sampling(
    per_row(heat, np.float32) if np.any(heat > 0) else None,
    per_row(top, np.float32),
    per_row(seed, np.int32),
    jnp.asarray(table),
  )


def sample(
  logits: Float[Array, 'B V'], positions: Int32[Array, 'B'], sampling: Sampling
) -> Int32[Array, 'B']:
  """The next token of each row."""
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  if sampling.temperature is None:
    return greedy
  drawn = _draw(logits, positions, sampling)
  return jnp.where(sampling.temperature > 0, drawn, greedy)


def _draw(logits, positions, sampling: Sampling) -> Int32[Array, 'B']:
  def row(logits, temperature, top_p, seed, position):
    logits = logits / jnp.where(temperature > 0, temperature, 1.0)
    order = jnp.argsort(-logits)
    mass = jnp.cumsum(jax.nn.softmax(logits[order]))
    # The token that crosses top_p is the last one kept.
    kept = jnp.concatenate([jnp.ones(1, bool), mass[:-1] < top_p])
    logits = jnp.where(kept, logits[order], -jnp.inf)
    key = jax.random.fold_in(jax.random.key(seed), position)
    return order[jax.random.categorical(key, logits)].astype(jnp.int32)

  return jax.vmap(row)(
    logits, sampling.temperature, sampling.top_p, sampling.seed, positions
  )


def stops(tokens: Int32[Array, 'B'], sampling: Sampling):
  """True [B] where the token ends its row."""
  return jnp.any(tokens[:, None] == sampling.stop, axis=1)
