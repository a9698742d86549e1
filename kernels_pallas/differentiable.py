"""Long attention that training can differentiate: dense, or sink + window.

  out = softmax over visible s of (scale * q . k_s) v_s

Query i stands at S - T + i and sees s <= position and, where a window is
given, (s < sink or s > position - window). The backward pass rematerialises
the weights tile by tile from the log-sum-exp (FlashAttention, arXiv:2205.14135,
algorithm 4): memory is O((T + S) H), never T x S.

  p = exp(scale q k - lse)        dv = p^T dout        dp = dout v^T
  ds = p (dp - sum(dout out) + dlse)    dq = scale ds k    dk = scale ds^T q

FLOPs: 4 N H a visible pair forward, 10 backward.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from kernels_pallas import tiles
from kernels_pallas.partial import Partial, merge
from kernels_pallas.xla_tiles import attend_intervals, dot

_TILE, _CHUNK = 256, 512


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def intervals(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B K S H'],
  v: Float[Array, 'B K S H'],
  start: Int32[Array, 'B T'],
  stop: Int32[Array, 'B T'],
  scale: float,
) -> Partial:
  """Differentiable `passing_block` in XLA: row t sees start <= s < stop.

  Both out and lse carry gradients, so partials merge differentiably.
  """
  return attend_intervals(
    q, k, v, start, stop, scale=scale, tile=_TILE, chunk=_CHUNK
  )


def _forward(q, k, v, start, stop, scale):
  part = intervals(q, k, v, start, stop, scale)
  return part, (q, k, v, start, stop, part)


def _backward(scale, saved, grads):
  q, k, v, start, stop, part = saved
  b, t, n, h = q.shape
  kv, s = k.shape[1], k.shape[2]
  g = n // kv
  tile, chunk = min(_TILE, t), min(_CHUNK, s)
  n_tiles = tiles.ceil_div(t, tile)
  dout = grads.out.astype(jnp.float32)
  delta = jnp.sum(dout * part.out.astype(jnp.float32), axis=-1) - grads.lse

  def to_tiles(x):  # [B T N ...] -> [B*Tb K G*tile ...]
    rest = x.shape[3:]
    x = jnp.pad(x, ((0, 0), (0, n_tiles * tile - t)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(b, n_tiles, tile, kv, g, *rest)
    x = jnp.moveaxis(x, 2, 4)
    return x.reshape(-1, kv, g * tile, *rest)

  qs, douts = to_tiles(q), to_tiles(grads.out.astype(q.dtype))
  lses, deltas = to_tiles(part.lse), to_tiles(delta)
  starts = tiles.by_tile(start, tile, 0).reshape(-1, tile)
  stops = tiles.by_tile(stop, tile, 0).reshape(-1, tile)
  row = jnp.repeat(jnp.arange(b), n_tiles)

  def one(carry, args):
    q, dout, lse, delta, first, last, row = args
    seen = first < last
    low = jnp.maximum(jnp.min(jnp.where(seen, first, tiles.BIG)), 0)
    high = jnp.max(jnp.where(seen, last, 0))

    def visit(j, carry):
      dq, dk, dv = carry
      fresh = low + j * chunk
      begin = jnp.minimum(fresh, s - chunk)
      at, size = (row, 0, begin, 0), (1, kv, chunk, h)
      kc = lax.dynamic_slice(k, at, size)[0]
      vc = lax.dynamic_slice(v, at, size)[0]
      key = begin + jnp.arange(chunk)
      mask = (key >= jnp.maximum(first, fresh)[:, None]) & (key < last[:, None])
      mask = jnp.tile(mask, (g, 1))
      scores = dot('kqh,ksh->kqs', q, kc) * scale
      p = jnp.where(mask, jnp.exp(scores - lse[..., None]), 0.0)
      dp = dot('kqh,ksh->kqs', dout, vc)
      ds = (p * (dp - delta[..., None]) * scale).astype(q.dtype)
      dq = dq + dot('kqs,ksh->kqh', ds, kc)
      dkc = dot('kqs,kqh->ksh', ds, q)
      dvc = dot('kqs,kqh->ksh', p.astype(q.dtype), dout)
      dk = lax.dynamic_update_slice(
        dk, lax.dynamic_slice(dk, at, size) + dkc[None], at
      )
      dv = lax.dynamic_update_slice(
        dv, lax.dynamic_slice(dv, at, size) + dvc[None], at
      )
      return dq, dk, dv

    # An empty row has lse -inf: any finite value does, its mask is false.
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
    steps = jnp.maximum(tiles.ceil_div(high - low, chunk), 0)
    dq = jnp.zeros(q.shape, jnp.float32)
    dq, dk, dv = lax.fori_loop(0, steps, visit, (dq, *carry))
    return (dk, dv), dq

  zero = jnp.zeros(k.shape, jnp.float32)
  (dk, dv), dq = lax.scan(
    one, (zero, zero), (qs, douts, lses, deltas, starts, stops, row)
  )
  dq = jnp.moveaxis(dq.reshape(b, n_tiles, kv, g, tile, h), 4, 2)
  dq = dq.reshape(b, -1, n, h)[:, :t]
  return (
    dq.astype(q.dtype),
    dk.astype(k.dtype),
    dv.astype(v.dtype),
    None,
    None,
  )


intervals.defvjp(_forward, _backward)


def attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B K S H'],
  v: Float[Array, 'B K S H'],
  *,
  sink: int = 0,
  window: int | None = None,
  lengths: Int32[Array, 'B'] | None = None,
  scale: float | None = None,
  implementation: str | None = None,
) -> Float[Array, 'B T N H']:
  """Causal attention with gradients; queries are the last T of S keys.

  Args:
    q: rotated queries.
    k: rotated keys.
    v: values.
    sink: first tokens that every query sees; needs a window.
    window: last tokens a query sees, itself included; None: all (dense).
    lengths: keys of each row that exist; None: all S. Rows past it give 0.
    scale: of the scores; None: H**-0.5.
    implementation: 'xla', 'cudnn' (GPU: no sink, no lengths, T = S, bfloat16
      or float16), 'splash' (TPU: no lengths, T = S, whole 128-blocks), or
      None: the platform's own where it fits, else 'xla'.

  Returns:
    out, of q's dtype.

  Raises:
    ValueError: an argument does not fit; the message names it.
  """
  h = q.shape[-1]
  if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != h:
    raise ValueError(f'{q.shape=}, {k.shape=}, {v.shape=} do not fit')
  if q.shape[2] % k.shape[1]:
    raise ValueError(f'kv heads {k.shape[1]} must divide {q.shape[2]}')
  if window is None and sink:
    raise ValueError(f'{sink=} needs a window')
  if sink < 0 or (window is not None and window < 1):
    raise ValueError(f'{sink=} and {window=} must be positive')
  scale = h**-0.5 if scale is None else float(scale)
  if implementation is None:
    own = {'gpu': 'cudnn', 'tpu': 'splash'}.get(jax.default_backend(), 'xla')
    implementation = 'xla' if _refuse(own, q, k, sink, lengths) else own
  elif implementation not in ('xla', 'cudnn', 'splash'):
    raise ValueError(f'{implementation=} must be xla, cudnn or splash')
  reason = _refuse(implementation, q, k, sink, lengths)
  if reason:
    raise ValueError(f'{implementation=} cannot run attention: {reason}')
  if implementation == 'cudnn':
    return jax.nn.dot_product_attention(
      q,
      k.swapaxes(1, 2),
      v.swapaxes(1, 2),
      scale=scale,
      is_causal=True,
      local_window_size=None if window is None else (window - 1, 0),
      implementation='cudnn',
    )
  if implementation == 'splash':
    return _splash(q, k, v, sink, window, scale)
  return _xla(q, k, v, sink, window, lengths, scale)


def _refuse(implementation, q, k, sink, lengths) -> str | None:
  if implementation == 'xla':
    return None
  if lengths is not None:
    return 'no lengths'
  if q.shape[1] != k.shape[2]:
    return f'T={q.shape[1]} must equal S={k.shape[2]}'
  if implementation == 'cudnn':
    if sink:
      return 'no sink'
    if q.dtype not in (jnp.bfloat16, jnp.float16):
      return f'dtype {q.dtype} must be bfloat16 or float16'
    if q.shape[-1] not in (64, 128):
      return f'head dim {q.shape[-1]} must be 64 or 128'
  if implementation == 'splash':
    if q.shape[1] % 128:
      return f'T={q.shape[1]} must be a multiple of 128'
    if q.dtype == jnp.float16:
      return 'no float16 on TPU'
  return None


def _xla(q, k, v, sink, window, lengths, scale):
  b, t = q.shape[:2]
  s = k.shape[2]
  after = jnp.broadcast_to(
    jnp.arange(s - t + 1, s + 1, dtype=jnp.int32), (b, t)
  )
  stop = after
  if lengths is not None:
    stop = jnp.where(after <= lengths[:, None], after, 0)
  low = jnp.zeros_like(after)
  if window is not None:
    low = jnp.maximum(after - window, 0)
  recent = intervals(q, k, v, low, stop, scale)
  if not sink:
    return recent.out
  # The sink interval ends where the window begins: the sets are disjoint.
  end = jnp.where(stop > 0, jnp.minimum(low, sink), 0)
  first = intervals(
    q, k[:, :, :sink], v[:, :, :sink], jnp.zeros_like(end), end, scale
  )
  return merge(recent, first).out


def _splash(q, k, v, sink, window, scale):
  """JAX's own splash attention; its masks are static, built on the host."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  t, n = q.shape[1], q.shape[2]
  if window is None:
    mask = masks.CausalMask((t, t))
  else:
    mask = _streaming_mask(masks.Mask)(t, sink, window)
  block = next(x for x in (512, 256, 128) if t % x == 0)
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([mask] * n),
    block_sizes=splash.BlockSizes(
      block_q=block,
      block_kv=block,
      block_kv_compute=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_kv_dkv_compute=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    head_shards=1,
    q_seq_shards=1,
  )
  q = (q * scale).astype(q.dtype).swapaxes(1, 2)
  out: Any = jax.vmap(kernel)(q, k, v)
  return out.swapaxes(1, 2)


def _streaming_mask(base: type) -> type:
  """A splash mask class: causal and (s < sink or s > position - window)."""

  class Streaming(base):
    """Evaluated block by block: T x T is never held."""

    def __init__(self, t: int, sink: int, window: int):
      self.t, self.sink, self.window = t, sink, window

    @property
    def shape(self):
      return (self.t, self.t)

    def __getitem__(self, index):
      row, key = (np.arange(self.t)[i] for i in index)
      row, key = row[:, None], key[None]
      near = (key < self.sink) | (key > row - self.window)
      return (key <= row) & near

    def __eq__(self, other):
      return isinstance(other, Streaming) and hash(self) == hash(other)

    def __hash__(self):
      return hash((self.t, self.sink, self.window))

  return Streaming
