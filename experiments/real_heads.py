"""Queries, keys and values of a real model, in the shape of another.

A benchmark of 32 / 8 heads of 128 runs on what a small model computes: heads of
several layers stand side by side as heads of one, those that share a kv head
together, and channels that the small model lacks are zero, which changes no
score. A context longer than the model's own is several, one behind the other;
where the text ends it begins again. Positions begin anew in each piece, so that
scores across pieces are no model's: captured mass beyond a piece is synthetic.
"""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import models
from lcx.cache import Dense
from lcx.engine import Engine
from lcx.methods.base import Decode, Method, Prompt
from lcx.methods.dense import DensePrefill
from lcx.tasks.haystacks import default_text


class _Collect(Decode):
  """Keeps rotated queries and keys, and values, of a prompt."""

  def observe(self, q, k, v, rope, state, ctx):
    del state
    return rope(q, ctx.positions), rope(k, ctx.positions), v


def read(
  spec: str,
  tokens: int,
  *,
  heads: int,
  kv_heads: int,
  head_dim: int,
  text: str = '',
) -> tuple[Array, Array, Array]:
  """bfloat16 q [1 T N H], k and v [1 K T H], rotated, of a model's layers.

  Queries are scaled so that q . k * H ** -0.5 is the model's own score.

  Args:
    spec: a Hugging Face folder, a GGUF file, or preset:NAME.
    tokens: T.
    heads: N; a kv head's group takes the model's first ones, again from the
      start if it has fewer.
    kv_heads: K, from layers that are spread over the model.
    head_dim: H, at least the model's.
    text: a file; '': Python's documentation.

  Raises:
    ValueError: the text is too short, the model has wider heads or too few, or
      N is no multiple of K.
  """
  if heads % kv_heads:
    raise ValueError(f'{heads=} is no multiple of {kv_heads=}')
  model = models.load(models.find(spec, 0), 'bfloat16')
  config = model.config
  if config.head_dim > head_dim:
    raise ValueError(
      f'{spec}: heads of {config.head_dim} do not fit into {head_dim=}'
    )
  if config.n_layers * config.n_kv_heads < kv_heads:
    raise ValueError(f'{spec} has fewer than {kv_heads=} in all its layers')
  words = pathlib.Path(text).read_text('utf-8') if text else default_text()
  ids = np.asarray(model.tokenizer.encode(words), np.int32)
  piece = min(tokens, config.max_position)
  if len(ids) < piece:
    raise ValueError(
      f'the text has {len(ids)} tokens, {piece} are read at once: name a '
      'longer one'
    )
  ids = np.resize(ids, tokens)
  method = Method('collect', DensePrefill(), Dense(), _Collect())
  engine = Engine(config, model.weights, method, capacity=piece, trace=False)
  read_in = [
    _piece(engine, ids[at : at + piece], kv_heads)
    for at in range(0, tokens, piece)
  ]
  q, k, v = (jnp.concatenate(x, axis=1) for x in zip(*read_in, strict=True))
  group = np.arange(heads // kv_heads) % config.group
  q = q[:, :, :, group] * math.sqrt(head_dim / config.head_dim)
  q = q.reshape(1, tokens, heads, config.head_dim)
  missing = [(0, 0)] * 3 + [(0, head_dim - config.head_dim)]
  q, k, v = (jnp.pad(x, missing).astype(jnp.bfloat16) for x in (q, k, v))
  return q, k.swapaxes(1, 2), v.swapaxes(1, 2)


def _piece(engine: Engine, ids, kv_heads: int) -> tuple[Array, Array, Array]:
  """Of one prompt: q [1 T K G H], k and v [1 T K H]."""
  config = engine.config
  nothing = np.zeros((0,), np.int32)
  states = engine.prefill([Prompt(nothing, ids, ())]).states
  # Of all (layer, kv head), as evenly as they come.
  every = config.n_layers * config.n_kv_heads
  chosen = np.linspace(0, every - 1, kv_heads).round().astype(int)
  parts = []
  for layer, head in (divmod(int(i), config.n_kv_heads) for i in chosen):
    q, k, v = (x[:, : len(ids)] for x in states[layer])
    q = q.reshape(*q.shape[:2], config.n_kv_heads, config.group, -1)
    parts.append((q[:, :, head], k[:, :, head], v[:, :, head]))
  return jax.tree.map(lambda *x: jnp.stack(x, axis=2), *parts)
