"""best_in_order on NVIDIA GPUs: one program a row, in Pallas Triton.

A program holds at most MOST candidates in registers. Longer rows are narrowed
first, by the same search over the largest of each GROUP neighbours: the n
largest numbers lie in the n groups with the largest maxima, ties included (were
one in another group, each of the n groups would hold a number that is larger,
or equal and before it).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas import nth_best
from kernels_pallas.keys import NEVER

MOST = 2**15
GROUP = 8
_LANES = 128, 1024  # of pieces: with more, registers are spilled
_WARPS = 16


def refuse(function: str, x, n: int, **_) -> str | None:
  """Why this implementation cannot serve; None if it can."""
  del function
  if x.shape[1] > MOST and n * GROUP > MOST:
    return f'{n=} of {x.shape[1]} exceeds {MOST // GROUP}'
  return None


def best_in_order(
  x: Float[Array, 'R C'], n: int, *, interpret: bool = False
) -> tuple[Int32[Array, 'R n'], Int32[Array, 'R']]:
  """`kernels_pallas.best_in_order.best_in_order` on an NVIDIA GPU.

  Raises:
    NotImplementedError: with the reason, where the kernels do not apply.
  """
  if reason := refuse('best_in_order', x, n):
    raise NotImplementedError(reason)
  levels = [x]
  for _ in range(coarser(x.shape[1])):
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % GROUP)), constant_values=-jnp.inf)
    x = jnp.max(x.reshape(x.shape[0], -1, GROUP), axis=2)
    levels.append(x)
  return best(levels, n, interpret=interpret)


def coarser(width: int) -> int:
  """How many levels of maxima rows of this width need."""
  return 0 if width <= MOST else 1 + coarser(-(-width // GROUP))


class Candidates(NamedTuple):
  """Numbers of a row to choose from: operands of a kernel, or their refs.

  Attributes:
    x: float32 [R C].
    groups: int32 [R m]; x's groups of GROUP to choose from. None: all of x.
  """

  x: Any
  groups: Any

  def given(self) -> list:
    return [x for x in self if x is not None]

  def read(self, refs: list) -> tuple['Candidates', list]:
    """(the same of refs, which come in the order of `given`; other refs)."""
    n = len(self.given())
    return Candidates(refs[0], refs[1] if n == 2 else None), refs[n:]

  def keys(self, row) -> list[jax.Array]:
    """Keys for `nth_best` of the candidates of a row, in pieces.

    A piece's rows are GROUP neighbours, which are loaded at once.
    """
    width, found = self.x.shape[1], []
    for at in self.slots(row):
      # No index is cut to the width: what hides that neighbours follow one
      # another makes loads narrow.
      number = plgpu.load(self.x.at[row, at], mask=at < width, other=-jnp.inf)
      found.append(
        jnp.where(at < width, nth_best.ordered(number), nth_best.LOWEST)
      )
    return found

  def slots(self, row) -> list[jax.Array]:
    """Where `keys` are in x; registers hold one or the other."""
    width, found = self.x.shape[1], []
    m = -(-width // GROUP) if self.groups is None else self.groups.shape[1]
    for first, lanes in nth_best.pieces(m * GROUP, GROUP, *_LANES):
      group = first // GROUP + lax.broadcasted_iota(jnp.int32, (lanes,), 0)
      if self.groups is not None:
        group = plgpu.load(
          self.groups.at[row, pl.ds(first // GROUP, lanes)],
          mask=group < m,
          other=NEVER,
          # Else one load serves both calls, and registers hold both.
          volatile=True,
        )
        # NEVER * GROUP does not fit an int32.
        group = jnp.minimum(group, width)
      shape = (lanes, GROUP)
      at = jnp.broadcast_to(group[:, None] * GROUP, shape)
      found.append(at + lax.broadcasted_iota(jnp.int32, shape, 1))
    return found


def best(
  levels: list[Float[Array, 'R C']],
  n: int,
  due: Bool[Array, 'R'] | None = None,
  *,
  interpret: bool = False,
) -> tuple[Int32[Array, 'R n'], Int32[Array, 'R']]:
  """The n largest of levels[0], whose maxima of GROUP are levels[1], and so on.

  Where `due` is given and False, nothing is read, and anything is returned.
  """
  return _best(narrowed(levels, n, due, interpret=interpret), n, due, interpret)


def narrowed(
  levels: list[Float[Array, 'R C']],
  n: int,
  due: Bool[Array, 'R'] | None = None,
  *,
  interpret: bool = False,
) -> Candidates:
  """What can be among the n largest of levels[0]; a launch a coarser level."""
  groups = None
  for x in levels[:0:-1]:
    some = min(n, x.shape[1])
    groups, _ = _best(Candidates(x, groups), some, due, interpret)
  return Candidates(levels[0], groups)


def _best(candidates: Candidates, n: int, due, interpret: bool):
  rows = candidates.x.shape[0]

  def kernel(*refs):
    *refs, index_ref, count_ref = refs
    own, rest = candidates.read(refs)
    row = pl.program_id(0)

    def choose():
      found, total = nth_best.places_in_pieces(own.keys(row), n)
      for at, (chosen, place) in zip(own.slots(row), found):
        place = jnp.where(chosen, place, n)
        plgpu.store(index_ref.at[row, place], at, mask=chosen)
      place = lax.broadcasted_iota(jnp.int32, (pl.next_power_of_2(n),), 0)
      plgpu.store(
        index_ref.at[row, pl.ds(0, place.shape[0])],
        jnp.full(place.shape, NEVER, jnp.int32),
        mask=(place >= total) & (place < n),
      )
      count_ref[row] = total

    if due is None:
      choose()
    else:
      pl.when(rest[0][row])(choose)

  operands = candidates.given() + ([] if due is None else [due])
  return pl.pallas_call(
    kernel,
    out_shape=(
      jax.ShapeDtypeStruct((rows, n), jnp.int32),
      jax.ShapeDtypeStruct((rows,), jnp.int32),
    ),
    grid=(rows,),
    compiler_params=plgpu.CompilerParams(num_warps=_WARPS),
    interpret=interpret,
    name='best_in_order',
  )(*operands)
