"""The cases of the kernel benchmark: what is called, on what, and its work.

Work is counted on what the method needs: 4 H FLOPs a visible (query, key)
pair, and the bytes of the selected keys and values, scales included. A call's
inputs are made on the device from a seed, and differ from call to call.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import torch_peers
from kernels_pallas import block_sparse, passing_block, selected_token
from kernels_pallas.best_in_order import best_in_order
from kernels_pallas.keys import Pages

# Llama-3-8B's heads.
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
KIB = 1024
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Call:
  """What is timed: function(*inputs[i], *shared)."""

  function: Callable
  inputs: list[tuple[Any, ...]]
  shared: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
  """One line of the benchmark.

  Attributes:
    op: the operation.
    case: its size in words.
    work: FLOPs or bytes of a call.
    unit: 'TFLOP/s' or 'GB/s', of the rate.
    calls: implementation -> how to make its Call; the first is ours.
    timed: peers outside JAX, by name (`torch_peers.Timed`).
  """

  op: str
  case: str
  work: float
  unit: str
  calls: dict[str, Callable[[], Call]]
  timed: dict[str, torch_peers.Timed] = dataclasses.field(default_factory=dict)


def _normal(seed: int, shape, dtype=jnp.bfloat16):
  return _drawn(jax.random.key(seed), tuple(shape), jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _drawn(key, shape, dtype):
  return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def ceilings() -> Iterator[Case]:
  """The chip's own rates: a large matrix product, a large copy."""
  n = 8 * KIB

  def product():
    inputs = [(_normal(i, (n, n)), _normal(i + 9, (n, n))) for i in range(2)]
    return Call(jnp.dot, inputs)

  def copy():
    x = [(jnp.full((2**30,), i, jnp.bfloat16),) for i in range(2)]
    return Call(lambda x: x + 1, x)

  yield Case('matmul', f'{n} cubed', 2 * n**3, 'TFLOP/s', {'xla': product})
  yield Case('copy', '2 GiB', 2 * 2**31, 'GB/s', {'xla': copy})


def _named(sizes: dict[str, int]) -> str:
  return 'ours ' + ' '.join(f'{n}={x}' for n, x in sizes.items())


def _label(tokens: int) -> str:
  return f'{tokens // KIB}K' if tokens % KIB == 0 else str(tokens)


def _prompt(tokens, heads=HEADS):
  q = _normal(1, (1, tokens, heads, HEAD_DIM))
  k = _normal(2, (1, KV_HEADS, tokens, HEAD_DIM))
  v = _normal(3, (1, KV_HEADS, tokens, HEAD_DIM))
  return q, k, v


def _listed_a_tile(tokens: int, share: int):
  return -(-(np.arange(tokens // BLOCK) + 1) // share)


def listed_pairs(tokens: int, share: int) -> int:
  """Visible pairs of all heads under `share_of_blocks`."""
  count = _listed_a_tile(tokens, share)
  diagonal = len(count) * BLOCK * (BLOCK + 1) // 2
  return HEADS * int((count - 1).sum() * BLOCK**2 + diagonal)


def _drawn_blocks(tokens: int, share: int, heads: int, seed: int = 0):
  """Ids [heads, tiles, width] in order, zeros after; counts [tiles]."""
  rng = np.random.default_rng(seed)
  count = _listed_a_tile(tokens, share)
  tiles = len(count)
  ids = np.zeros((heads, tiles, count.max()), np.int32)
  for i in range(tiles):
    others = rng.random((heads, max(i, 1)), np.float32)
    chosen = np.argsort(others, axis=1)[:, : count[i] - 1]
    ids[:, i, : count[i] - 1] = np.sort(chosen, axis=1)
    ids[:, i, count[i] - 1] = i
  return ids, count


def share_of_blocks(tokens: int, share: int):
  """Lists of ceil((i + 1) / share) random blocks for tile i, its own included.

  Returns:
    BlockList; every head has its own lists.
  """
  ids, count = _drawn_blocks(tokens, share, HEADS)
  count = jnp.asarray(count, jnp.int32)
  return block_sparse.listed(
    jnp.asarray(ids[None]), jnp.broadcast_to(count, (1, *ids.shape[:2]))
  )


def mask_of_blocks(tokens: int, share: int) -> np.ndarray:
  """As many blocks a tile, but lists by kv head: bool [K, tiles, tiles]."""
  ids, count = _drawn_blocks(tokens, share, KV_HEADS)
  tiles = len(count)
  mask = np.zeros((KV_HEADS, tiles, tiles), bool)
  listed = np.arange(ids.shape[2]) < count[:, None]
  head, tile, at = np.nonzero(np.broadcast_to(listed, ids.shape))
  mask[head, tile, ids[head, tile, at]] = True
  return mask


def _dense_peers(q, k, v) -> dict[str, Callable[[], Call]]:
  """What users have for dense causal attention, on the same numbers."""

  def cudnn():
    swapped = k.swapaxes(1, 2) + 0, v.swapaxes(1, 2) + 0

    def run(q, k, v):
      return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation='cudnn'
      )

    return Call(run, [(q, *swapped)])

  def mosaic():
    swapped = k.swapaxes(1, 2) + 0, v.swapaxes(1, 2) + 0
    return Call(_tokamax(is_causal=True), [(q, *swapped)])

  def shipped():
    # JAX 0.11.2's keeps its tiles in float16, whatever comes in.
    half = (x.astype(jnp.float16) for x in (q, *map(_rows_first, (k, v))))
    return Call(_shipped, [tuple(half)])

  return {
    'cudnn': cudnn,
    'tokamax mosaic': mosaic,
    'pallas shipped, float16': shipped,
  }


def _rows_first(x):
  return x.swapaxes(1, 2)


def _shipped(q, k, v):
  from jax.experimental.pallas.ops.gpu import attention_mgpu

  config = attention_mgpu.TuningConfig(64, 128, 2, causal=True)
  return attention_mgpu.attention(q, k, v, config)


def _tokamax(is_causal: bool) -> Callable:
  import tokamax

  def run(q, k, v):
    return tokamax.dot_product_attention(
      q, k, v, is_causal=is_causal, implementation='mosaic'
    )

  return run


def _ours(implementation, sizes=None):
  def run(q, k, v, blocks):
    return block_sparse.block_sparse(
      q, k, v, blocks, implementation=implementation, block_sizes=sizes
    )

  return run


def prompts(
  lengths, shares, implementation=None, variants=(), peers=True
) -> Iterator[Case]:
  """block_sparse: dense causal, and shares of its blocks."""
  for tokens in lengths:
    q, k, v = _prompt(tokens)
    pairs = HEADS * tokens * (tokens + 1) // 2
    blocks = block_sparse.dense_blocks(1, HEADS, tokens)
    run = _ours(implementation)
    inputs = q, k, v, blocks
    calls = {'ours': functools.partial(Call, run, [inputs])}
    for sizes in variants:
      other = _ours(implementation, sizes)
      calls[_named(sizes)] = functools.partial(Call, other, [inputs])
    timed = {}
    if peers:
      calls |= _dense_peers(q, k, v)
      timed = torch_peers.dense(tokens, HEADS, KV_HEADS, HEAD_DIM)
    work = 4 * HEAD_DIM * pairs
    case = f'causal {_label(tokens)}'
    yield Case('block_sparse', case, work, 'TFLOP/s', calls, timed)
    for share in shares:

      def listed(share=share, run=run, inputs=(q, k, v), tokens=tokens):
        return Call(run, [(*inputs, share_of_blocks(tokens, share))])

      calls, timed = {'ours': listed}, {}
      if peers:
        mask = functools.partial(mask_of_blocks, tokens, share)
        timed = torch_peers.blocks(mask, BLOCK, HEADS, HEAD_DIM)
      work = 4 * HEAD_DIM * listed_pairs(tokens, share)
      case = f'1/{share} of {_label(tokens)}'
      yield Case('block_sparse', case, work, 'TFLOP/s', calls, timed)


def mixtures(tokens, sink=128, local=8192, implementation=None):
  """block_sparse: streaming heads, dense heads, half of each."""
  q, k, v = _prompt(tokens)
  everything = block_sparse.EVERYTHING
  dense = tokens * (tokens + 1) // 2
  reach = np.minimum(np.arange(tokens) + 1, local + sink)
  streaming = int(reach.sum())
  run = _ours(implementation)
  for name, n in (('streaming', HEADS), ('half streaming', HEADS // 2)):
    # Whole groups, as a head profile by kv head gives them.
    first = np.arange(HEADS) < n
    blocks = block_sparse.mixed(
      jnp.asarray(np.where(first, sink, 0), jnp.int32),
      jnp.asarray(np.where(first, local, everything), jnp.int32),
      1,
      tokens,
    )
    work = 4 * HEAD_DIM * (n * streaming + (HEADS - n) * dense)
    yield Case(
      'block_sparse',
      f'{name} {_label(tokens)}',
      work,
      'TFLOP/s',
      {'ours': lambda blocks=blocks: Call(run, [(q, k, v, blocks)])},
    )


def passing(
  local=16 * KIB, anchor=4 * KIB, passed=2 * KIB, rank=3, implementation=None
):
  """passing_block: [passing | anchor | local] of one host."""
  keys = rank * passed + anchor + local
  tokens = anchor + local
  q = _normal(1, (1, tokens, HEADS, HEAD_DIM))
  k = _normal(2, (1, KV_HEADS, keys, HEAD_DIM))
  v = _normal(3, (1, KV_HEADS, keys, HEAD_DIM))
  row = np.arange(tokens)
  # Anchor rows see the anchor up to themselves; local rows everything before.
  start = np.where(row < anchor, rank * passed, 0)
  stop = rank * passed + row + 1
  pairs = HEADS * int((stop - start).sum())
  bounds = [jnp.asarray(x[None], jnp.int32) for x in (start, stop)]

  def run(q, k, v, start, stop):
    return passing_block.passing_block(
      q, k, v, start, stop, implementation=implementation
    )

  yield Case(
    'passing_block',
    f'{_label(anchor)} anchor, {rank} x {_label(passed)}, {_label(local)}',
    4 * HEAD_DIM * pairs,
    'TFLOP/s',
    {'ours': lambda: Call(run, [(q, k, v, *bounds)])},
  )


def pool(pages: int, page: int, bits: int, seed: int = 5) -> Pages:
  """A pool of random pages."""
  if bits == 16:
    return Pages(*(_normal(seed + i, (pages, page, HEAD_DIM)) for i in (0, 9)))
  key = jax.random.key(seed)
  width = HEAD_DIM * bits // 8

  @jax.jit
  def codes(key):
    kind = jnp.int8 if bits == 8 else jnp.uint8
    bounds = (-127, 128) if bits == 8 else (0, 256)
    return jax.random.randint(
      key, (pages, page, width), *bounds, jnp.int32
    ).astype(kind)

  scale = [
    jax.random.uniform(k, (pages, page), jnp.float32, 0.01, 0.02)
    for k in jax.random.split(key, 4)
  ]
  zero = [None, None] if bits == 8 else [500 * scale[2], 500 * scale[3]]
  return Pages(codes(key), codes(key), scale[0], scale[1], *zero)


def _token_bytes(bits: int) -> int:
  """Bytes of one token of one kv head, keys and values, scales and zeros."""
  return 2 * HEAD_DIM * bits // 8 + {16: 0, 8: 8, 4: 16}[bits]


def _decode_call(
  pages, ids, starts, position, calls, implementation=None, sizes=None
):
  batch = ids[0].shape[0]

  def run(q, ids, starts, pages):
    return selected_token.attend_pages(
      q,
      pages,
      ids,
      starts,
      q_positions=jnp.full((batch, 1), position, jnp.int32),
      implementation=implementation,
      block_sizes=sizes,
    )

  inputs = [
    (
      _normal(100 + i, (batch, 1, HEADS, HEAD_DIM)),
      ids[i % len(ids)],
      starts[i % len(starts)],
    )
    for i in range(calls)
  ]
  return Call(run, inputs, (pages,))


def decodes(
  lengths, bits=(16, 8, 4), implementation=None, variants=(), peers=True
) -> Iterator[Case]:
  """selected_token over every page: dense decode of one sequence."""
  page = 64
  for tokens in lengths:
    for b in bits:
      count = tokens // page
      pages = pool(KV_HEADS * count, page, b)
      ids = jnp.arange(KV_HEADS * count, dtype=jnp.int32).reshape(
        1, KV_HEADS, -1
      )
      starts = jnp.broadcast_to(
        jnp.arange(count, dtype=jnp.int32) * page, ids.shape
      )
      calls = 4

      def ours(
        sizes=None,
        pages=pages,
        ids=ids,
        starts=starts,
        calls=calls,
        last=tokens - 1,
      ):
        return _decode_call(
          pages, [ids], [starts], last, calls, implementation, sizes
        )

      made = {'ours': ours}
      for sizes in variants:
        made[_named(sizes)] = lambda sizes=sizes, ours=ours: ours(sizes)
      timed = {}
      if b == 16 and peers:
        made |= _decode_peers(pages, tokens, calls)
        timed = torch_peers.decode(tokens, HEADS, KV_HEADS, HEAD_DIM)
      yield Case(
        'selected_token',
        f'decode {_label(tokens)} bits {b}',
        KV_HEADS * tokens * _token_bytes(b),
        'GB/s',
        made,
        timed,
      )


def _decode_peers(pages, tokens, calls) -> dict[str, Callable[[], Call]]:
  q = [(_normal(100 + i, (1, 1, HEADS, HEAD_DIM)),) for i in range(calls)]
  k = pages.k.reshape(1, KV_HEADS, tokens, HEAD_DIM)
  v = pages.v.reshape(1, KV_HEADS, tokens, HEAD_DIM)

  def cudnn():
    def run(q, k, v):
      return jax.nn.dot_product_attention(q, k, v, implementation='cudnn')

    return Call(run, q, (k.swapaxes(1, 2) + 0, v.swapaxes(1, 2) + 0))

  def mosaic():
    swapped = k.swapaxes(1, 2) + 0, v.swapaxes(1, 2) + 0
    return Call(_tokamax(is_causal=False), q, swapped)

  def einsum():
    def run(q, k, v):
      x = q.reshape(1, KV_HEADS, -1, HEAD_DIM)
      s = jnp.einsum(
        'bkgh,bksh->bkgs', x, k, preferred_element_type=jnp.float32
      )
      p = jax.nn.softmax(s * HEAD_DIM**-0.5).astype(v.dtype)
      return jnp.einsum(
        'bkgs,bksh->bkgh', p, v, preferred_element_type=jnp.float32
      )

    return Call(run, q, (k, v))

  def shipped():
    from jax.experimental.pallas.ops.gpu import decode_attention

    def run(q, k, v):
      return decode_attention.gqa(q[:, 0], k, v)

    return Call(run, q, (k.swapaxes(1, 2) + 0, v.swapaxes(1, 2) + 0))

  return {
    'cudnn': cudnn,
    'tokamax mosaic': mosaic,
    'xla einsum': einsum,
    'pallas shipped': shipped,
  }


def selections(
  tokens=128 * KIB, chosen=64, implementation=None, variants=()
) -> Iterator[Case]:
  """selected_token: a few pages, a few tokens, a batch of sequences."""
  page, calls = 64, 8
  rng = np.random.default_rng(0)
  count = tokens // page
  pages = pool(KV_HEADS * count, page, 16)

  def pick():
    chosen_now = np.sort(
      np.stack([rng.permutation(count)[:chosen] for _ in range(KV_HEADS)])
    )[None]
    base = np.arange(KV_HEADS)[None, :, None] * count
    return jnp.asarray(chosen_now + base, jnp.int32), jnp.asarray(
      chosen_now * page, jnp.int32
    )

  ids, starts = zip(*(pick() for _ in range(calls)))

  def some_pages(sizes=None):
    return _decode_call(
      pages, ids, starts, tokens - 1, calls, implementation, sizes
    )

  made = {'ours': some_pages}
  for sizes in variants:
    made[_named(sizes)] = lambda sizes=sizes: some_pages(sizes)
  yield Case(
    'selected_token',
    f'{chosen} pages of {_label(tokens)}',
    KV_HEADS * chosen * page * _token_bytes(16),
    'GB/s',
    made,
  )

  width = 2048

  def some_tokens():
    def run(q, rows, positions, pages):
      return selected_token.attend_tokens(
        q,
        pages,
        rows,
        positions,
        q_positions=jnp.full((1, 1), tokens - 1, jnp.int32),
        implementation=implementation,
      )

    inputs = []
    for i in range(calls):
      positions = np.stack(
        [np.sort(rng.permutation(tokens)[:width]) for _ in range(KV_HEADS)]
      )[None]
      rows = positions + np.arange(KV_HEADS)[None, :, None] * tokens
      inputs.append(
        (
          _normal(200 + i, (1, 1, HEADS, HEAD_DIM)),
          jnp.asarray(rows, jnp.int32),
          jnp.asarray(positions, jnp.int32),
        )
      )
    return Call(run, inputs, (pages,))

  yield Case(
    'selected_token',
    f'{width} tokens of {_label(tokens)}',
    KV_HEADS * width * _token_bytes(16),
    'GB/s',
    {'ours': some_tokens},
  )


def batches(
  batch=16, tokens=32 * KIB, implementation=None, peers=True
) -> Iterator[Case]:
  """selected_token: a batch of sequences that share no page."""
  page = 64
  count = tokens // page

  def call():
    pages = pool(batch * KV_HEADS * count, page, 16)
    ids = jax.random.permutation(
      jax.random.key(0), jnp.arange(pages.k.shape[0], dtype=jnp.int32)
    ).reshape(batch, KV_HEADS, count)
    starts = jnp.broadcast_to(
      jnp.arange(count, dtype=jnp.int32) * page, ids.shape
    )
    return _decode_call(pages, [ids], [starts], tokens - 1, 4, implementation)

  timed = {}
  if peers:
    timed = torch_peers.decode(tokens, HEADS, KV_HEADS, HEAD_DIM, batch)
  yield Case(
    'selected_token',
    f'batch {batch} at {_label(tokens)}',
    batch * KV_HEADS * tokens * _token_bytes(16),
    'GB/s',
    {'ours': call},
    timed,
  )


def scores(tokens=128 * KIB) -> Iterator[Case]:
  """What selection needs beside attention."""
  calls, page = 16, 16
  keys = _normal(5, (1, KV_HEADS, tokens, HEAD_DIM))
  paged = keys.reshape(1, KV_HEADS, -1, page, HEAD_DIM)
  low, high = paged.min(3), paged.max(3)
  q = [(_normal(100 + i, (1, 1, HEADS, HEAD_DIM)),) for i in range(calls)]
  yield Case(
    'page_scores',
    _label(tokens),
    low.nbytes + high.nbytes,
    'GB/s',
    {'ours': lambda: Call(selected_token.page_scores, q, (low, high))},
  )

  def vote(q, keys):
    return selected_token.soft_vote(selected_token.token_scores(q, keys))

  yield Case(
    'token vote',
    _label(tokens),
    keys.nbytes,
    'GB/s',
    {'ours': lambda: Call(vote, q, (keys,))},
  )
  for rows, width, k in ((1, tokens, 2048), (8, 2048, 64)):
    x = [(_normal(i, (rows, width), jnp.float32),) for i in range(calls)]
    yield Case(
      'top_k',
      f'{rows} x {width}, k {k}',
      rows * width * 4,
      'GB/s',
      {'ours': lambda x=x, k=k: Call(lambda s: selected_token.top_k(s, k), x)},
    )
  for rows, width in ((1, tokens), (1, 8192), (8, tokens)):
    x = [(_normal(i, (rows, width), jnp.float32),) for i in range(calls)]

    def run(name, x=x):
      best = functools.partial(best_in_order, n=2048, implementation=name)
      return Call(best, x)

    yield Case(
      'best_in_order',
      f'{rows} x {width}, n 2048',
      rows * width * 4,
      'GB/s',
      {
        'ours': functools.partial(run, None),
        'xla top-k and sort': functools.partial(run, 'xla'),
      },
    )
