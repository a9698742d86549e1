"""Weights of 8 and 4 bits, in one place for every method.

A quantised matrix stands in `Weights` where the matrix stood; the transformer's
products call its `einsum`. Arrays and products are qwix's, pure functions over
a pytree; its providers, which rewrite flax modules, are not used. Kinds:

  w8a8   int8, a scale per output; activations int8, a scale per token (dynamic)
  fp8    the same in float8_e4m3fn
  w4a16  int4, a scale per 128 inputs and output; activations as they are

No product makes a matrix in the activations' dtype. One to four tokens (a
decode step, bound by bytes) are multiplied and summed elementwise, which XLA
fuses with the conversion of the codes on GPU and TPU, where it might widen the
operand of a product of matrices first; its CPU backend does not fuse, and gets
a tile of the outputs at a time. (One token on one GPU: `decode_layer`, whose
kernels take w8a8 in fewer launches, a token's codes rounded once, not twice.)
More tokens take 8-bit matrices as they are, and int4 ones in tiles that are
dequantised one at a time.

Norms, biases and the embedding table stay as they are; a tied output matrix is
the embedding table.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

KINDS = ('w8a8', 'w4a16', 'fp8')
_GROUP = 128
_FEW = 4  # tokens
# Weights of a tile: of a product of matrices; of the CPU's elementwise sums.
_TILE, _SUM_TILE = 2**22, 2**20

# Matrices by name, with the axes of their inputs.
_INPUTS = {'qkv': (3,), 'o': (1, 2), 'gate_up': (2,), 'down': (1,)}


def _qwix():
  try:
    import qwix
  except ImportError as error:
    raise ValueError(
      "low-bit weights need qwix: pip install 'lcx[quant]'"
    ) from error
  return qwix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowBit:
  """A quantised matrix.

  Attributes:
    array: a qwix QArray.
    kind: one of `KINDS` (static).
  """

  array: Any
  kind: str = dataclasses.field(metadata={'static': True})

  def reshape(self, outputs: int, inputs: int) -> 'LowBit':
    """Two axes: one for outputs, which stand first, one for inputs.

    Exactly one of the two is -1: the other axis is there already, and stays.
    """
    codes = self.array.qvalue
    kept, size = (0, outputs) if inputs == -1 else (codes.ndim - 1, inputs)
    if sorted((outputs, inputs))[0] != -1 or codes.shape[kept] != size:
      raise ValueError(f'{codes.shape} has no reshape({outputs}, {inputs})')

    def merge(y):
      shape = (y.shape[0], -1) if kept == 0 else (-1, y.shape[-1])
      return y.reshape(shape)

    merged = jax.tree.map(merge, self.array)
    return dataclasses.replace(self, array=merged)

  def einsum(self, equation: str, x: Array, out=None) -> Array:
    """jnp.einsum(equation, x, matrix), in x's dtype or `out`.

    The equation is 'bt' + inputs, matrix -> 'bt' + outputs, axes in one order.
    """
    if x.shape[0] * x.shape[1] <= _FEW:
      result = lax.platform_dependent(
        x,
        self.array,
        cpu=lambda x, array: _tiled(
          equation,
          x,
          array,
          functools.partial(self._summed, equation),
          _SUM_TILE,
        ),
        default=functools.partial(self._summed, equation),
      )
    elif self.kind == 'w4a16':
      result = _tiled(
        equation,
        x,
        self.array,
        functools.partial(_dequantised, equation),
        _TILE,
      )
    else:
      result = _qwix().einsum(
        equation,
        _activations(equation, x, self.array),
        self.array,
        preferred_element_type=jnp.float32,
      )
    return result.astype(out or x.dtype)

  def _summed(self, equation: str, x: Array, array) -> Array:
    """Few tokens: a sum of products, elementwise."""
    inputs, rest = equation.split(',')
    matrix, _ = rest.split('->')
    codes, scale = array.qvalue, array.scale
    is_input = [c in inputs for c in matrix]

    def against(y):  # [b t *inputs] beside the matrix's axes
      shape = [n if i else 1 for n, i in zip(codes.shape, is_input)]
      return y.reshape(-1, *shape)

    over = [1 + i for i, summed in enumerate(is_input) if summed]
    outputs = [n for n, i in zip(codes.shape, is_input) if not i]
    if self.kind == 'w4a16':
      wide = codes.astype(jnp.float32) * _spread(scale, codes.shape)
      result = jnp.sum(against(x.astype(jnp.float32)) * wide, axis=over)
    else:
      few = _activations(equation, x, array)
      kind = jnp.int32 if self.kind == 'w8a8' else jnp.float32
      result = jnp.sum(
        against(few.qvalue.astype(kind)) * codes.astype(kind), axis=over
      )
      token = few.scale.reshape(-1, *[1] * len(outputs))
      result = result.astype(jnp.float32) * token * scale.reshape(outputs)
    return result.reshape(*x.shape[:2], *outputs)


def _activations(equation: str, x: Array, array):
  """The codes of x, with a scale per token."""
  inputs, matrix = equation.split('->')[0].split(',')
  kept = [i for i, c in enumerate(inputs) if c not in matrix]
  return _quantise(x, array.qvalue.dtype, kept)


def _dequantised(equation: str, x: Array, array) -> Array:
  piece = _qwix().dequantize(array).astype(x.dtype)
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jnp.einsum(equation, x, piece, precision=precision)


def _tiled(equation: str, x: Array, array, product, most: int) -> Array:
  """product(x, piece) over tiles of the longest output axis."""
  inputs, rest = equation.split(',')
  matrix, result = rest.split('->')
  axis = max(
    (i for i, c in enumerate(matrix) if c not in inputs),
    key=lambda i: array.shape[i],
  )
  size = array.shape[axis]
  most = max(1, most * size // array.qvalue.size)
  tile = max(t for t in range(1, min(most, size) + 1) if size % t == 0)

  def one(i):
    def cut(y):
      return lax.dynamic_slice_in_dim(y, i * tile, tile, axis)

    return product(x, jax.tree.map(cut, array))

  pieces = lax.map(one, jnp.arange(size // tile))
  at = result.index(matrix[axis])
  pieces = jnp.moveaxis(pieces, 0, at)
  shape = list(pieces.shape)
  shape[at : at + 2] = [size]
  return pieces.reshape(shape)


def quantise(weights: Any, kind: str) -> Any:
  """`Weights` with low-bit matrices; one matrix at a time.

  Raises:
    ValueError: an unknown kind, or qwix is missing.
  """
  if kind not in KINDS:
    raise ValueError(f'weights={kind!r} must be one of {", ".join(KINDS)}')
  layers = tuple(
    {
      name: matrix(x, kind, _INPUTS[name]) if name in _INPUTS else x
      for name, x in layer.items()
    }
    for layer in weights.layers
  )
  head = dict(weights.head)
  if 'table' in head:
    head['table'] = matrix(head['table'], kind, (1,))
  return dataclasses.replace(weights, layers=layers, head=head)


def matrix(x: Array, kind: str, inputs: tuple[int, ...]) -> LowBit:
  """One matrix, quantised.

  Args:
    x: of any float dtype.
    kind: see the module.
    inputs: axes that products sum over.
  """
  outputs = [i for i in range(x.ndim) if i not in inputs]
  if kind != 'w4a16':
    code = jnp.int8 if kind == 'w8a8' else jnp.float8_e4m3fn
    return LowBit(_quantise(x, code, outputs), kind)
  last = inputs[-1]
  # Several input axes: a group lies within the last one.
  group = math.gcd(_GROUP, x.shape[last])
  return LowBit(
    _quantise(x, jnp.int4, [*outputs, *inputs[:-1]], {last: group}), kind
  )


def _quantise(x, code, channels, tiles=None):
  how = {'channelwise_axes': channels, 'tiled_axes': tiles or {}}
  # A bfloat16 scale would add 0.2% of its own.
  return _qwix().quantize(x, code, scale_dtype=jnp.float32, **how)


def _spread(scale: Array, shape: tuple[int, ...]) -> Array:
  """A scale per group of an axis, at every element."""
  sizes: list[int] = []
  for n, size in zip(scale.shape, shape):
    sizes += [n, size // n]
  scale = scale.reshape([m for n in scale.shape for m in (n, 1)])
  return jnp.broadcast_to(scale, sizes).reshape(shape)
