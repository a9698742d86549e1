"""A few rows times a matrix, with all that stands around it: Pallas Triton.

A program makes `columns` outputs and reads their whole columns. Its threads
hold `threads * 8 / columns` matrix rows at a time, 16 bytes each; a thread
sums its own elements over all such tiles, and only at the end over the
program. The norm needs no pass of its own: its factor is common to a row's
sums and is applied to them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

_WORD = 8  # 16-bit weights of a 16-byte load
_PROGRAMS = 100  # of 132 multiprocessors: fewer leave bandwidth unused
_LOADS = 16  # loads of a thread in flight; 4 registers each


def matmul(
  x: Float[Array, 'R D'],
  w: Float[Array, 'D M'],
  *,
  norm: Float[Array, 'D'] | None = None,
  eps: float = 0.0,
  add: Float[Array, '#R M'] | None = None,
  block_sizes: dict[str, int] | None = None,
  interpret: bool = False,
) -> Float[Array, 'R M']:
  """RMSNorm(x) @ w + add, in one launch.

  Args:
    x: inputs, a row a token.
    w: the matrix, inputs first.
    norm: scale of the RMSNorm of x (arXiv:1910.07467); None: x as it is.
    eps: of the norm.
    add: a bias or a residual; None: nothing.
    block_sizes: some of `blocks`, explicitly.
    interpret: runs without a GPU.

  Returns:
    In x's dtype; sums are float32 and rounded once.
  """
  return _call(x, w[:, None], norm, eps, add, block_sizes, interpret)


def gated_matmul(
  x: Float[Array, 'R D'],
  w: Float[Array, 'D 2 F'],
  *,
  norm: Float[Array, 'D'] | None = None,
  eps: float = 0.0,
  block_sizes: dict[str, int] | None = None,
  interpret: bool = False,
) -> Float[Array, 'R F']:
  """silu(y @ w[:, 0]) * (y @ w[:, 1]) of y = RMSNorm(x), in one launch.

  SwiGLU (arXiv:2002.05202, equation 6). Arguments as of `matmul`.
  """
  return _call(x, w, norm, eps, None, block_sizes, interpret)


def blocks(inputs: int, outputs: int, parts: int) -> dict[str, int]:
  """Default sizes of a product of [inputs, parts, outputs].

  Returns:
    columns: outputs of a program, 64 at most (128 bytes of a row), and so few
      that there are enough programs.
    warps: of a program, 8 at most, and so few that tiles divide the inputs.
    loads: tiles of rows whose loads are under way at once.
    early: 1 lets the next kernel's programs start, and wait, before these end.
  """
  columns = 64
  while columns > 8 and (outputs % columns or outputs // columns < _PROGRAMS):
    columns //= 2
  tile = inputs & -inputs  # its largest power of two
  warps = max(1, min(8, tile * columns // (32 * _WORD)))
  tiles = inputs * columns // (32 * warps * _WORD)
  rounds = -(-tiles * parts // _LOADS)
  loads = -(-tiles // rounds)
  return {'columns': columns, 'warps': warps, 'loads': loads, 'early': 0}


def _call(x, w, norm, eps, add, block_sizes, interpret):
  (rows, inputs), (_, parts, outputs) = x.shape, w.shape
  sizes = blocks(inputs, outputs, parts) | (block_sizes or {})
  columns, warps = sizes['columns'], sizes['warps']
  tile = 32 * warps * _WORD // columns
  if inputs % tile or outputs % columns:
    raise ValueError(
      f'{columns=} must divide {outputs} outputs, and tiles of {tile} rows '
      f'({warps=}) {inputs} inputs'
    )

  def across(*shape):  # a program's columns of an array
    zeros = (0,) * (len(shape) - 1)
    return pl.BlockSpec((*shape[:-1], columns), lambda i: (*zeros, i))

  def whole(*shape):
    return pl.BlockSpec(shape, lambda i: (0,) * len(shape))

  arrays = {
    'x': (x, whole(rows, inputs)),
    'w': (w, across(inputs, parts, outputs)),
    'norm': (norm, whole(inputs)),
    'add': (add, across(1 if add is None else add.shape[0], outputs)),
  }
  arrays = {k: v for k, v in arrays.items() if v[0] is not None}

  def kernel(*refs):
    named = dict(zip(arrays, refs[:-1], strict=True))
    early = bool(sizes['early']) and not interpret
    _kernel(refs[-1], named, eps, tile, sizes['loads'], early)

  return pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((rows, outputs), x.dtype),
    grid=(outputs // columns,),
    in_specs=[spec for _, spec in arrays.values()],
    out_specs=across(rows, outputs),
    compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
    interpret=interpret,
    name='decode_matmul',
  )(*(x for x, _ in arrays.values()))


def _kernel(out, refs, eps, tile, loads, early):
  x, w, norm, add = (refs.get(name) for name in ('x', 'w', 'norm', 'add'))
  rows, inputs = x.shape
  _, parts, columns = w.shape
  # Volatile loads stay where they are: all of a round before its first sum, the
  # matrix, which comes from afar, before x; what is added last before all.
  load = functools.partial(plgpu.load, volatile=True)
  last = (
    [] if add is None else [load(add.at[r]) for r in _indices(add.shape[0])]
  )

  def sum_tiles(first, count, carry):
    sums, squares = carry
    at = [pl.ds((first + i) * tile, tile) for i in range(count)]
    matrix = [[load(w.at[a, j]) for j in _indices(parts)] for a in at]
    scale = [1.0 if norm is None else _wide(load(norm.at[a])) for a in at]
    for r in _indices(rows):
      for i, a in enumerate(at):
        y = _wide(load(x.at[r, a]))
        if early and i == r == 0:
          y = _let_next_start(y)
        squares[r] += y * y
        y = (y * scale[i])[:, None]
        for j in range(parts):
          sums[r][j] += y * _wide(matrix[i][j])
    return sums, squares

  carry = (
    [[jnp.zeros((tile, columns), jnp.float32)] * parts for _ in range(rows)],
    [jnp.zeros((tile,), jnp.float32)] * rows,
  )
  rounds, rest = divmod(inputs // tile, loads)
  if rounds > 1:
    carry = jax.lax.fori_loop(
      0, rounds, lambda i, carry: sum_tiles(i * loads, loads, carry), carry
    )
  elif rounds:
    carry = sum_tiles(0, loads, carry)
  sums, squares = sum_tiles(rounds * loads, rest, carry)

  for r in range(rows):
    y = [jnp.sum(part, axis=0) for part in sums[r]]
    if norm is not None:
      factor = jax.lax.rsqrt(jnp.sum(squares[r]) / inputs + eps)
      y = [part * factor for part in y]
    y = y[0] if parts == 1 else y[0] * jax.nn.sigmoid(y[0]) * y[1]
    if last:
      y += _wide(last[r % len(last)])
    out[r] = y.astype(out.dtype)


def _indices(n):  # an interpreted load asks indices for their shape
  return [np.int32(i) for i in range(n)]


def _wide(x):
  return x.astype(jnp.float32)


def _let_next_start(y):
  """y; the device may now set up the next kernel, which waits for this one.

  Programmatic dependent launch: XLA begins each of its kernels with
  griddepcontrol.wait.
  """
  [y] = plgpu.elementwise_inline_asm(
    'griddepcontrol.launch_dependents; mov.b32 $0, $1;',
    args=[y],
    constraints='=r,r',
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(y.shape, y.dtype)],
  )
  return y
