"""The pure programs of the engine: one layer of prefill, a few tokens, a loop.

`attend` and `observe` run inside one `shard_map` over the whole mesh;
projections and feed-forward stay outside, where the compiler places the
collectives that the weights' sharding asks for.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int32

from lcx.engine.plan import AXES, ROWS, Plan
from lcx.engine.sampling import Sampling, sample, stops
from lcx.methods.base import Tail, Trace
from lcx.methods.dense import DensePrefill
from lcx.models import decode_layer, transformer
from lcx.models.transformer import (
  Weights,
  attention_inputs,
  embed,
  layer_output,
  logits,
  make_rope,
)

_PROMPT = P(AXES.data, AXES.seq)


def _sums(trace: Trace | None) -> dict[str, Float[Array, 'B']]:
  """A trace's sums over all shards, by name; {} where nothing was traced."""
  if trace is None:
    return {}
  sums = {'keys': trace.keys, 'pairs': trace.pairs, **trace.counters}
  if trace.mass is not None:
    sums['mass'] = trace.mass
  return jax.lax.psum(sums, (AXES.seq, AXES.model))


def prefill_layer(
  layer_weights: Any,
  x: Float[Array, 'B T D'],
  cache: Any,
  state: Any,
  positions: Int32[Array, 'B T'],
  source: Int32[Array, 'B T'],
  valid: Bool[Array, 'B T'],
  lengths: Int32[Array, 'B'],
  layer: Int32[Array, ''],
  seed: Int32[Array, ''],
  learned: Any = (),
  *,
  plan: Plan,
  room: int,
):
  """One layer over the whole prompt; compiled once for all layers.

  Returns:
    (x, cache, state, sums of the trace by name [B]).
  """
  rope = make_rope(plan.config)
  method = plan.method

  def attend(
    q,
    k,
    v,
    cache,
    state,
    positions,
    source,
    valid,
    lengths,
    layer,
    seed,
    learned,
  ):
    ctx = plan.context(
      room=room,
      learned=learned,
      positions=positions,
      source=source,
      valid=valid,
      lengths=lengths,
      layer=layer,
      key=jax.random.fold_in(jax.random.key(seed), layer),
    )
    out, cache, trace = method.prefill.attend(q, k, v, rope, cache, ctx)
    state = method.decode.observe(q, k, v, rope, state, ctx)
    return out, method.prefill.finish(cache), state, _sums(trace)

  heads = P(AXES.data, AXES.seq, AXES.model)
  cache_specs, state_specs = plan.cache_specs(), plan.state_specs()
  q, k, v = attention_inputs(layer_weights, x, plan.config)
  out, cache, state, sums = plan.sharded(
    attend,
    (heads, heads, heads, cache_specs, state_specs)
    + (_PROMPT, _PROMPT, _PROMPT, ROWS, P(), P(), plan.learned_specs()),
    (heads, cache_specs, state_specs, ROWS),
  )(
    q,
    k,
    v,
    cache,
    state,
    positions,
    source,
    valid,
    lengths,
    layer,
    seed,
    learned,
  )
  x = chunked_output(layer_weights, x, out, plan)
  return plan.place_tokens(x), cache, state, sums


def fill_layer(
  layer_weights: Any,
  x: Float[Array, 'B T D'],
  cache: Any,
  state: Any,
  positions: Int32[Array, 'B T'],
  source: Int32[Array, 'B T'],
  valid: Bool[Array, 'B T'],
  lengths: Int32[Array, 'B'],
  layer: Int32[Array, ''],
  seed: Int32[Array, ''],
  *,
  plan: Plan,
  room: int,
):
  """`prefill_layer` of a dense prefill whose layer input is known already.

  Only what differs between methods is done: the cache is filled, the decode
  part observes; nothing is attended.

  Returns:
    (cache, state).
  """
  rope = make_rope(plan.config)
  method, prefill = plan.method, plan.method.prefill
  if not isinstance(prefill, DensePrefill):
    raise ValueError(f'the prefill of {method.name} is not the dense one')

  def fill(
    q, k, v, cache, state, positions, source, valid, lengths, layer, seed
  ):
    ctx = plan.context(
      room=room,
      positions=positions,
      source=source,
      valid=valid,
      lengths=lengths,
      layer=layer,
      key=jax.random.fold_in(jax.random.key(seed), layer),
    )
    cache = prefill.fill(k, v, rope, cache, ctx)
    state = method.decode.observe(q, k, v, rope, state, ctx)
    return prefill.finish(cache), state

  heads = P(AXES.data, AXES.seq, AXES.model)
  cache_specs, state_specs = plan.cache_specs(), plan.state_specs()
  q, k, v = attention_inputs(layer_weights, x, plan.config)
  return plan.sharded(
    fill,
    (heads, heads, heads, cache_specs, state_specs)
    + (_PROMPT, _PROMPT, _PROMPT, ROWS, P(), P()),
    (cache_specs, state_specs),
  )(q, k, v, cache, state, positions, source, valid, lengths, layer, seed)


def chunked_output(layer_weights, x, attention, plan: Plan):
  """`layer_output` in chunks of each piece's own tokens.

  Chunks of the whole sequence would cross the shards, and the compiler would
  all-gather activations: 12 GB a layer at 1M tokens of an 8B model.
  """
  size = math.prod(plan.mesh.shape[a] for a in plan.token_axes)
  shape = x.shape
  data = plan.mesh.shape[AXES.data]
  pieces = (data, shape[0] // data, size, shape[1] // size)

  def as_rows(x):
    # A row is all that one device has: were the batch's rows apart, a device
    # with several would send most of its tokens away.
    rest = x.shape[2:]
    return (
      x.reshape(*pieces, *rest).swapaxes(1, 2).reshape(data * size, -1, *rest)
    )

  if size > 1:
    rows = (AXES.data, *plan.token_axes)
    x = plan.place(as_rows(x), rows)
    attention = plan.place(as_rows(attention), rows[:2], None, AXES.model)
  x = layer_output(layer_weights, x, attention, plan.config, plan.chunk)
  if size > 1:
    x = x.reshape(data, size, pieces[1], pieces[3], -1).swapaxes(1, 2)
  return x.reshape(shape)


def embed_tokens(weights: Any, tokens: Int32[Array, 'B T'], *, plan: Plan):
  """Embeddings of the laid-out prompt, sharded over rows and sequence."""
  return plan.place_tokens(embed(weights, tokens, plan.config))


def last_logits(
  weights: Weights, x: Float[Array, 'B T D'], last: Int32[Array, 'B'], *, plan
) -> Float[Array, 'B V']:
  """Logits of one token a row: the only ones a prefill computes."""
  x = jnp.take_along_axis(x, last[:, None, None], axis=1)
  return plan.place(logits(weights, x, plan.config)[:, 0], AXES.data)


def start_layer(cache: Any, state: Any, *, plan: Plan):
  """`Decode.start` on one layer, once the whole prompt is in the cache."""
  specs = plan.state_specs()
  return plan.sharded(
    plan.method.decode.start, (plan.cache_specs(), specs), specs
  )(cache, state)


@functools.partial(jax.jit, static_argnames='plan')
def _few_tokens_layer(
  layer_weights: Any,
  next_norm: Float[Array, 'D'],
  x: Float[Array, 'B T D'],
  y: Float[Array, 'B T D'],
  cache: Any,
  state: Any,
  lengths: Int32[Array, 'B'],
  tail: Tail,
  count: Int32[Array, 'B'],
  layer: Int32[Array, ''],
  seed: Int32[Array, ''],
  *,
  plan: Plan,
):
  """One layer over few tokens; jitted so that L layers are traced once.

  It begins with y, its input x normalised, and ends with the norm of what comes
  after it: residual sums and norms are pairs, of which each may be one launch.
  Where products make norms and sums themselves, y is x.
  """
  rope = make_rope(plan.config)
  fused = plan.fused(layer_weights, x)
  steps = jnp.arange(x.shape[1], dtype=jnp.int32)

  def attend(q, k, v, cache, state, lengths, tail, count, layer, seed, inputs):
    positions = lengths[:, None] + steps
    joint = None
    if inputs is not None:
      joint = decode_layer.rotated_inputs(
        inputs[0], inputs[1], positions, plan.config
      )
    ctx = plan.context(
      positions=positions,
      source=positions,
      valid=steps < count[:, None],
      lengths=lengths + count,
      tail=tail,
      layer=layer,
      key=jax.random.fold_in(jax.random.key(seed), layer),
      joint=joint,
    )
    out, cache, state, trace = plan.method.decode.attend(
      q, k, v, rope, cache, state, ctx
    )
    return out, cache, state, _sums(trace)

  heads = P(AXES.data, None, AXES.model)
  cache_specs, state_specs = plan.cache_specs(), plan.state_specs()
  inputs = (layer_weights, x) if fused else None
  if fused:
    run = functools.partial(decode_layer.attention_inputs, config=plan.config)
    q, k, v = plan.sharded(run, (P(), P()), P())(layer_weights, x)
  else:
    q, k, v = transformer.projections(layer_weights, y, plan.config)
  out, cache, state, sums = plan.sharded(
    attend,
    (heads, heads, heads, cache_specs, state_specs)
    + (ROWS, ROWS, ROWS, P(), P(), P()),
    (heads, cache_specs, state_specs, ROWS),
  )(q, k, v, cache, state, lengths, tail, count, layer, seed, inputs)
  if fused:
    run = functools.partial(decode_layer.layer_output, config=plan.config)
    x = plan.sharded(run, (P(), P(), P()), P())(layer_weights, x, out)
    return x, x, cache, state, sums
  out = transformer.attention_output(layer_weights, x, out)
  x, y = plan.add_norm(x, out, layer_weights['ff_norm'])
  out = transformer.feed_forward(layer_weights, y)
  x, y = plan.add_norm(x, out, next_norm)
  return x, y, cache, state, sums


def _few_tokens(
  weights, caches, states, tokens, lengths, tail, count, seed, plan
):
  """Few tokens through all layers: (y [B T D], caches, states, sums).

  y has passed the last norm.
  """
  x = plan.place(embed(weights.embed, tokens, plan.config), AXES.data)
  norms = [w['attention_norm'] for w in weights.layers] + [weights.head['norm']]
  fused = plan.fused(weights.layers[0], x)
  eps = plan.config.norm_eps
  y = x if fused else transformer.rms_norm(x, norms[0], eps)
  caches, states, totals = list(caches), list(states), []
  for i, layer_weights in enumerate(weights.layers):
    x, y, caches[i], states[i], sums = _few_tokens_layer(
      layer_weights,
      norms[i + 1],
      x,
      y,
      caches[i],
      states[i],
      lengths,
      tail,
      count,
      jnp.int32(i),
      seed,
      plan=plan.at_layer(i),
    )
    totals.append(sums)
    # Without it XLA's GPU compiler sums all earlier layers' outputs anew in
    # every norm: kernels of 2 L operands, and a compilation that grows with L
    # squared.
    x, y = jax.lax.optimization_barrier((x, y))
  sums = jax.tree.map(lambda *s: sum(s), *totals)
  if fused:
    y = transformer.rms_norm(x, norms[-1], eps)
  return y, tuple(caches), tuple(states), sums


@functools.partial(jax.jit, static_argnames='plan')
def few_tokens(
  weights: Weights,
  caches: tuple,
  states: tuple,
  tokens: Int32[Array, 'B T'],
  lengths: Int32[Array, 'B'],
  tail: Tail,
  count: Int32[Array, 'B'],
  seed: Int32[Array, ''],
  *,
  plan: Plan,
):
  """T <= 16 tokens a row through all layers, over the cache.

  Args:
    weights: the model's.
    caches: one a layer.
    states: one a layer.
    tokens: padded with anything beyond `count`.
    lengths: tokens already in the cache, a row.
    tail: where new tokens go.
    count: valid tokens of this call, 0 to T a row.
    seed: of this call.
    plan: static.

  Returns:
    (logits [B V] of each row's last valid token, caches, states, sums).
  """
  y, caches, states, sums = _few_tokens(
    weights, caches, states, tokens, lengths, tail, count, seed, plan
  )
  if tokens.shape[1] > 1:
    last = jnp.maximum(count - 1, 0)
    y = jnp.take_along_axis(y, last[:, None, None], axis=1)
  scores = transformer.unembed(weights, y, plan.config)
  scores = plan.place(scores[:, 0], AXES.data)
  return scores, caches, states, sums


def every_logits(
  weights, caches, states, tokens, lengths, tail, count, seed, *, plan: Plan
):
  """As `few_tokens`, with the logits [B T V] after every token."""
  y, caches, states, sums = _few_tokens(
    weights, caches, states, tokens, lengths, tail, count, seed, plan
  )
  scores = transformer.unembed(weights, y, plan.config)
  scores = plan.place(scores, AXES.data)
  return scores, caches, states, sums


def _status(caches: tuple, batch: int) -> Int32[Array, 'B']:
  """The worst of what a row's caches say; 0: they take more tokens."""
  status = [c.status.reshape(batch, -1) for c in caches if hasattr(c, 'status')]
  if not status:
    return jnp.zeros((batch,), jnp.int32)
  return jnp.max(jnp.concatenate(status, axis=1), axis=1)


def decode_loop(
  weights: Weights,
  caches: tuple,
  states: tuple,
  scores: Float[Array, 'B V'],
  lengths: Int32[Array, 'B'],
  tail: Tail,
  done: Bool[Array, 'B'],
  sampling: Sampling,
  n: Int32[Array, ''],
  *,
  plan: Plan,
  room: int,
):
  """Chooses and feeds up to n <= room tokens a row, without the host.

  Each step samples from `scores` and feeds the choice, so that the cache holds
  every token but those after a stop. A row is done at its stop token, or when
  its caches take no more; the program ends when all are, at the next multiple
  of `plan.steps_a_check`: a step of a row that is done, or beyond the n-th,
  changes nothing.

  Returns:
    (tokens int32 [B room], -1 where none, scores, caches, states, lengths,
    done, finite bool [B], sums, status of the caches int32 [B], steps run).
  """
  batch = scores.shape[0]

  def step(carry):
    i, tokens, scores, caches, states, lengths, done, finite, sums = carry
    idle = done | (i >= n)
    finite &= idle | jnp.all(jnp.isfinite(scores), axis=1)
    done |= ~finite
    idle |= done
    chosen = sample(scores, lengths, sampling)
    tokens = tokens.at[:, i].set(jnp.where(idle, -1, chosen), mode='drop')
    done |= ~idle & stops(chosen, sampling)
    count = jnp.where(idle | done, 0, 1)
    fresh, caches, states, more = few_tokens(
      weights,
      caches,
      states,
      jnp.maximum(chosen, 0)[:, None],
      lengths,
      tail,
      count,
      i,
      plan=plan,
    )
    scores = jnp.where(count[:, None] > 0, fresh, scores)
    lost = _status(caches, batch) != 0
    count, done = jnp.where(lost, 0, count), done | lost
    sums = jax.tree.map(jnp.add, sums, more)
    return (
      i + 1,
      tokens,
      scores,
      caches,
      states,
      lengths + count,
      done,
      finite,
      sums,
    )

  def few_steps(carry):
    n_steps = plan.steps_a_check
    return jax.lax.fori_loop(0, n_steps, lambda _, c: step(c), carry)

  def going(carry):
    return (carry[0] < n) & ~jnp.all(carry[6])

  names = jax.eval_shape(
    lambda: few_tokens(
      weights,
      caches,
      states,
      jnp.zeros((batch, 1), jnp.int32),
      lengths,
      tail,
      jnp.ones((batch,), jnp.int32),
      jnp.int32(0),
      plan=plan,
    )[3]
  )
  sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), names)
  carry = (
    jnp.int32(0),
    jnp.full((batch, room), -1, jnp.int32),
    scores,
    caches,
    states,
    lengths,
    done | (_status(caches, batch) != 0),
    jnp.ones((batch,), bool),
    sums,
  )
  carry = jax.lax.while_loop(going, few_steps, carry)
  return *carry[1:], _status(carry[3], batch), carry[0]
