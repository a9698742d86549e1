"""The cases of the selector benchmark: estimate, and attention with it.

Two ops a selector and length: `estimate` is the selector alone; `attention` is
selector and block_sparse in one program, beside dense cuDNN on the same
numbers: its ratio is the speed-up. Short lengths show the crossover, which
fit_policy.py finds against our own dense, since that runs in its place.
a_shape's list is a closed form, so it has no estimate; snapkv reads its prompt
densely and then chooses what decoding keeps, so it has nothing else.

Queries and keys are random with a drift a block, so that blocks differ in
weight; or a model's (real_heads.py), where thresholds mean something, too: then
a row says the share of softmax mass that its lists capture.
"""

import functools
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import real_heads
from experiments.kernel_bench import (
  BLOCK,
  HEAD_DIM,
  HEADS,
  KIB,
  KV_HEADS,
  Call,
  Case,
)
from kernels_pallas import block_sparse
from kernels_pallas.keys import Pages
from lcx.methods.spargeattn import ALL_TRUSTED
from lcx.select.audit import listed_keys, sampled_mass
from lcx.select.block_rows import Selected
from lcx.select.snapkv import snapkv
from lcx.select.sparge import sparge
from lcx.select.vertical_slash import vertical_slash
from lcx.select.xattention import xattention

# XAttention by its stride, sparge by its least similarity in percent (none: all
# means are trusted), vertical_slash by its columns and diagonals, a_shape by
# its first and last tokens, snapkv by the tokens that it keeps.
SELECTORS = (
  'xattention_16',
  'xattention_8',
  'sparge',
  'sparge_20',
  'sparge_60',
  'vertical_slash_128_256',
  'vertical_slash_1000_6096',
  'a_shape_1024_4096',
  'snapkv_2048',
)
# Their numbers say all: no density, no threshold.
_FIXED = ('vertical_slash', 'a_shape', 'snapkv')
_WINDOW = 32  # of snapkv, last queries
_PAGE = 64


def inputs(tokens: int, seed: int = 0) -> tuple[Array, Array, Array]:
  """bfloat16 q [1 T N H], k and v [1 K T H], with a drift a block."""

  @jax.jit
  def make(key):
    def draw(key, heads):
      noise, drift = jax.random.split(key)
      shape = (tokens // BLOCK, BLOCK, heads, HEAD_DIM)
      x = jax.random.normal(noise, shape, jnp.bfloat16)
      x += jax.random.normal(drift, (shape[0], 1, 1, HEAD_DIM), jnp.bfloat16)
      return x.reshape(1, tokens, heads, HEAD_DIM)

    q, k, v = jax.random.split(key, 3)
    kv = [draw(x, KV_HEADS).swapaxes(1, 2) for x in (k, v)]
    return draw(q, HEADS), *kv

  return make(jax.random.key(seed))


def selector(name: str, density: float | None, threshold: float | None = None):
  """(q, k) -> Selected at a fixed density, or up to a share of the estimate.

  vertical_slash lists what its columns and diagonals cross, which on random
  keys is nearly everything: a model's keys show what it leaves out.
  """
  numbers = _numbers(name)
  if name.startswith('a_shape'):
    return lambda q, k: _a_shape(q, *numbers)

  def select(q, k):
    tokens = q.shape[1]
    where = {
      'q_start': jnp.zeros(1, jnp.int32),
      'lengths': jnp.full(1, tokens, jnp.int32),
    }
    if name.startswith('vertical_slash'):
      columns, diagonals = numbers
      return vertical_slash(
        q[:, -64:].swapaxes(1, 2),
        tokens - 64 + jnp.arange(64)[None],
        k,
        n_queries=tokens,
        columns=columns,
        diagonals=diagonals,
        **where,
      )
    where |= {'density': density, 'threshold': threshold}
    if name.startswith('sparge'):
      least = numbers[0] / 100 if numbers else ALL_TRUSTED
      return sparge(q, k, similarity=least, **where)
    return xattention(q, k, stride=numbers[0], **where)

  return select


def _numbers(name: str) -> list[int]:
  return [int(x) for x in name.split('_') if x.isdigit()]


def _a_shape(q, sink, recent) -> Selected:
  batch, tokens, heads, _ = q.shape
  blocks = block_sparse.streaming_blocks(batch, heads, tokens, sink, recent)
  none = jnp.zeros((batch, heads, -(-tokens // BLOCK)))
  return Selected(blocks, none, none)


def _snapkv(q, k, budget) -> tuple[Array, Array]:
  """Rows and positions that decoding keeps, once the prompt has been read."""
  batch, tokens, _, head_dim = q.shape
  kv_heads = k.shape[1]
  n_pages = tokens // _PAGE
  pool = k.reshape(-1, _PAGE, head_dim)
  ids = jnp.arange(len(pool), dtype=jnp.int32).reshape(batch, kv_heads, -1)
  starts = jnp.arange(n_pages, dtype=jnp.int32) * _PAGE
  last = tokens - _WINDOW
  at = last + jnp.arange(_WINDOW, dtype=jnp.int32)
  return snapkv(
    q[:, last:].swapaxes(1, 2),
    jnp.broadcast_to(at, (batch, _WINDOW)),
    Pages(pool, pool),  # values play no part in the choice
    ids,
    jnp.broadcast_to(starts, ids.shape),
    since=jnp.full(batch, last, jnp.int32),
    keep=budget - _WINDOW,
  )


def cases(
  lengths: tuple[int, ...],
  shares: tuple[int, ...],
  selectors: tuple[str, ...] = SELECTORS,
  peers: bool = True,
  model: str = '',
  thresholds: tuple[float, ...] = (),
) -> Iterator[Case]:
  """All cases, dense first at each length.

  Args:
    lengths: tokens, multiples of 128.
    shares: densities, as 1 / share.
    selectors: names of `SELECTORS`.
    peers: whether cuDNN runs beside.
    model: whose queries and keys; '': random ones.
    thresholds: of the estimated mass, each a case beside the shares'.

  Raises:
    ValueError: a selector or a length that does not exist here.
  """
  for name in selectors:
    if name not in SELECTORS:
      raise ValueError(f'selector {name!r} is not one of {SELECTORS}')
  for tokens in lengths:
    if tokens < BLOCK or tokens % BLOCK:
      raise ValueError(f'{tokens=} must be a multiple of {BLOCK}')
  budgets = [(f'1/{share}', 1 / share, None) for share in shares]
  budgets += [(f'threshold {x}', None, x) for x in thresholds]
  for tokens in lengths:
    yield from _at_length(tokens, budgets, selectors, peers, model)


def _at_length(tokens, budgets, selectors, peers, model) -> Iterator[Case]:
  if model:
    shape = {'heads': HEADS, 'kv_heads': KV_HEADS, 'head_dim': HEAD_DIM}
    q, k, v = real_heads.read(model, tokens, **shape)
    whose = f', keys of {pathlib.Path(model).stem}'
  else:
    q, k, v = inputs(tokens)
    whose = ''
  label = f'{tokens // KIB}K' if tokens % KIB == 0 else str(tokens)
  rivals = {}
  if peers:

    def cudnn():
      # Laid out as cuDNN wants it, outside the timed program.
      return Call(_cudnn, [(q, k.swapaxes(1, 2) + 0, v.swapaxes(1, 2) + 0)])

    rivals = {'cudnn': cudnn}
  pairs = HEADS * tokens * (tokens + 1) // 2
  yield Case(
    'attention',
    f'dense {label}{whose}',
    4.0 * HEAD_DIM * pairs,
    'TFLOP/s',
    {'ours': lambda: Call(_dense, [(q, k, v)])} | rivals,
  )
  for name in selectors:
    own = [('', None, None)] if name.startswith(_FIXED) else budgets
    for budget, density, threshold in own:
      if name.startswith('snapkv'):
        keep = functools.partial(_snapkv, budget=_numbers(name)[0])
        yield Case(
          'estimate',
          f'{name} of {label}{whose}',
          1.0 * k.nbytes,
          'GB/s',
          {'ours': lambda keep=keep: Call(keep, [(q, k)])},
        )
        continue
      select = selector(name, density, threshold)
      seen = float(_seen(select, q, k))
      if name.startswith('a_shape'):  # an interval, not a list
        visible = sum(_numbers(name))
        seen = HEADS * np.minimum(np.arange(tokens) + 1, visible).sum()
      what = f'{name} {budget}'.strip()
      case = f'{what} of {label}, density {seen / pairs:.4f}'
      if model:
        mass = float(_mass(select, q, k, v)) / (HEADS * tokens)
        case += f', mass {mass:.4f}{whose}'
      work = 4.0 * HEAD_DIM * seen
      if not name.startswith('a_shape'):
        yield Case(
          'estimate',
          case,
          2.0 * (q.nbytes + k.nbytes),
          'GB/s',
          {'ours': lambda select=select: Call(select, [(q, k)])},
        )
      yield Case(
        'attention',
        case,
        work,
        'TFLOP/s',
        {'ours': lambda select=select: Call(_sparse(select), [(q, k, v)])}
        | rivals,
      )


def _seen(select, q, k):
  @jax.jit
  def count(q, k):
    start = jnp.zeros(1, jnp.int32)
    lengths = jnp.full(1, q.shape[1], jnp.int32)
    return listed_keys(select(q, k).blocks, start, lengths)[0]

  return count(q, k)


def _mass(select, q, k, v):
  @jax.jit
  def captured(q, k, v):
    lse = block_sparse.block_sparse(q, k, v, select(q, k).blocks).lse
    start, length = jnp.zeros(1, jnp.int32), jnp.full(1, q.shape[1], jnp.int32)
    return sampled_mass(q, k, lse, q_start=start, lengths=length)[0]

  return captured(q, k, v)


def _dense(q, k, v):
  lists = block_sparse.dense_blocks(1, q.shape[2], q.shape[1])
  return block_sparse.block_sparse(q, k, v, lists).out


def _sparse(select):
  def run(q, k, v):
    return block_sparse.block_sparse(q, k, v, select(q, k).blocks).out

  return run


def _cudnn(q, k, v):
  return jax.nn.dot_product_attention(
    q, k, v, is_causal=True, implementation='cudnn'
  )
