"""One selection chunk of TokenSelect's prefill, beside dense over the cache.

The last 512 rows of a prompt in a layer of Qwen2-7B's shape: they choose 2,048
tokens of all before them, and attend to 2,688. That is what figure 7 of
arXiv:2411.02886 measures (on an A100, against FlashInfer: 6.09 times faster at
128K, 19.93 at 512K, 23.84 at 1M); selection is included. The work of a rate
counts attention over the chosen tokens alone, for all implementations.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from experiments.kernel_bench import KIB, Call, Case
from kernels_pallas.passing_block import passing_block
from lcx import sharding
from lcx.methods.base import Context
from lcx.methods.tokenselect import TokenSelectPrefill
from lcx.models.config import ModelConfig
from lcx.models.presets import preset
from lcx.models.rope import make_rope
from lcx.select.chunk_grid import ChunkGrid


def shape_of(name: str) -> ModelConfig:
  """A preset, or 'qwen2_7b': 28 query heads, 4 kv heads of 128."""
  if name == 'qwen2_7b':
    return preset('llama3_8b', n_heads=28, n_kv_heads=4)
  return preset(name)


def cases(
  lengths: tuple[int, ...],
  preset: str = 'qwen2_7b',
  k: int = 2048,
  sink: int = 128,
  chunk: int = 512,
  peers: bool = True,
) -> Iterator[Case]:
  """A case a length.

  Args:
    lengths: tokens of the prompt, the chunk included.
    preset: the layer's shape.
    k: tokens that votes choose.
    sink: first tokens, always seen.
    chunk: rows; the local window holds as many.
    peers: whether cuDNN runs beside.

  Raises:
    ValueError: a prompt that holds no more than a list.
  """
  shape = shape_of(preset)
  part = TokenSelectPrefill(k=k, sink=sink, local=chunk, chunk=chunk)
  for tokens in lengths:
    if tokens <= part.width:
      raise ValueError(f'{tokens=} must be above {part.width}, a whole list')
    yield _case(part, shape, tokens, peers)


def _case(part, shape: ModelConfig, tokens: int, peers: bool) -> Case:
  inputs = [_draw(shape, i, (1, part.chunk, shape.n_heads)) for i in range(2)]
  kv = [_draw(shape, 9 + i, (1, shape.n_kv_heads, tokens)) for i in range(2)]

  def ours():
    return Call(_selected(part, shape, tokens), [(q,) for q in inputs], (*kv,))

  def dense():
    row = tokens - part.chunk + jnp.arange(part.chunk, dtype=jnp.int32)[None]

    def run(q, k, v):
      return passing_block(q, k, v, jnp.zeros_like(row), row + 1).out

    return Call(run, [(q,) for q in inputs], (*kv,))

  def cudnn():
    def run(q, k, v):
      return jax.nn.dot_product_attention(q, k, v, implementation='cudnn')

    laid = tuple(x.swapaxes(1, 2) + 0 for x in kv)
    return Call(run, [(q,) for q in inputs], laid)

  calls = {'ours': ours, 'ours, dense': dense}
  if peers:
    # Its causal mask counts from the top left: at these lengths the pairs that
    # the bottom right one leaves out are under half a percent.
    calls['cudnn, unmasked'] = cudnn
  seen = part.chunk * (part.sink + part.k) + part.chunk * (part.chunk + 1) / 2
  label = f'{tokens // KIB}K' if tokens % KIB == 0 else str(tokens)
  return Case(
    'tokenselect chunk',
    f'{part.chunk} rows over {label}',
    4.0 * shape.head_dim * shape.n_heads * seen,
    'TFLOP/s',
    calls,
  )


def _draw(shape: ModelConfig, seed: int, dims: tuple[int, ...]) -> Array:
  dtype = jnp.dtype(shape.dtype)
  make = jax.jit(jax.random.normal, static_argnums=(1, 2))
  return make(jax.random.key(seed), (*dims, shape.head_dim), dtype)


def _selected(part: TokenSelectPrefill, shape: ModelConfig, tokens: int):
  """(q, k, v) -> the chunk's output; k as a cache has it, rotated."""
  rope = make_rope(shape)
  first = tokens - part.chunk

  def run(q, k, v):
    positions = first + jnp.arange(part.chunk, dtype=jnp.int32)[None]
    zero = jnp.int32(0)
    ctx = Context(
      positions=positions,
      valid=positions >= 0,
      source=positions,
      lengths=jnp.full((1,), tokens, jnp.int32),
      layer=zero,
      key=jax.random.key(0),
      room=tokens,
    )
    grid = ChunkGrid(part.chunk, 1, part.chunk, zero + first, zero)
    return part.by_chunk(q, k, v, grid, rope, ctx)[0]

  return jax.shard_map(
    run,
    mesh=sharding.make_mesh(1, 1, 1),
    in_specs=P(),
    out_specs=P(),
    check_vma=False,
  )
