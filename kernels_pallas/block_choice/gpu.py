"""block_choice on NVIDIA GPUs: one program a row, in Pallas Triton.

A row lies in registers: 30 counts and sums find the last block that is taken,
two prefix sums say where the chosen ones go.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.block_choice.rules import ALWAYS, Listed

MOST = 2**14  # blocks of a row
_LANES_A_WARP = 256
OUT, FREE, SOON, FORCED = range(4)  # a block's role


def refuse(function: str, score, *, width: int, **_) -> str | None:
  """Why this implementation cannot serve; None if it can."""
  del function, width
  if score.shape[-1] > MOST:
    return f'rows of {score.shape[-1]} blocks, of which it takes {MOST}'
  return None


def choose_blocks(
  score, *, reachable, forced, budget, width, threshold, always, mass, bounded,
  interpret=False,
):  # fmt: skip
  """`kernels_pallas.block_choice.choose_blocks` on an NVIDIA GPU.

  Raises:
    NotImplementedError: with the reason, where the kernel does not apply.
  """
  if reason := refuse('choose_blocks', score, width=width):
    raise NotImplementedError(reason)
  shape, columns = score.shape[:-1], score.shape[-1]
  role = jnp.where(reachable, FREE, OUT)
  if always is not None:
    role = jnp.where(reachable & always, SOON, role)
  role = jnp.where(forced, FORCED, role).astype(jnp.int8)
  operands = {
    'score': score.astype(jnp.float32),
    'role': role,
    'mass': mass,
    'budget': budget,
    'threshold': threshold,
  }
  operands = {
    name: x.reshape(-1, x.shape[-1])
    for name, x in operands.items()
    if x is not None
  }
  rows = operands['score'].shape[0]
  lanes = pl.next_power_of_2(columns)
  places = pl.next_power_of_2(width)

  def kernel(*refs):
    given = dict(zip(operands, refs))
    ids_ref, count_ref, captured_ref, cut_ref = refs[-4:]
    row = pl.program_id(0)
    at = lax.broadcasted_iota(jnp.int32, (lanes,), 0)
    there = at < columns

    def load(name, other):
      ref = given[name].at[row, pl.ds(0, lanes)]
      return plgpu.load(ref, mask=there, other=other)

    role = load('role', OUT).astype(jnp.int32)
    score = jnp.where(role > OUT, load('score', 0.0), 0.0)
    forced = role == FORCED
    key = lax.shift_right_logical(lax.bitcast_convert_type(score, jnp.int32), 1)
    key = jnp.where(role == FREE, key, jnp.where(role == SOON, ALWAYS, -1))
    held = jnp.sum(jnp.where(forced, score, 0.0))
    n_forced = jnp.sum(forced.astype(jnp.int32))

    def mass_of(mask):
      return held + jnp.sum(jnp.where(mask, score, 0.0))

    goal = jnp.float32(jnp.inf)
    if threshold is not None:
      wanted = given['threshold'][row, 0]
      goal = jnp.where(wanted < 1, wanted * mass_of(key >= 0), jnp.inf)

    def chosen_within(limit):
      limit = jnp.maximum(limit - n_forced, 0)

      def bit(i, last):
        t = last + lax.shift_left(jnp.int32(1), 29 - i)
        above = key >= t
        enough = jnp.sum(above.astype(jnp.int32)) >= limit
        if threshold is not None:
          enough |= (mass_of(above) >= goal) & (t <= ALWAYS)
        return jnp.where(enough, t, last)

      last = lax.fori_loop(0, 30, bit, jnp.int32(0))
      above, tie = key > last, key == last
      # Of the blocks that tie with the last one, the first few by index.
      value = lax.bitcast_convert_type(lax.shift_left(last, 1), jnp.float32)
      some = (last < ALWAYS) & (value > 0) & (goal < jnp.inf)
      lacking = jnp.ceil((goal - mass_of(above)) / jnp.where(some, value, 1.0))
      lacking = jnp.clip(jnp.where(some, lacking, 2.0**30), 1.0, 2.0**30)
      want = jnp.minimum(
        lacking.astype(jnp.int32), limit - jnp.sum(above.astype(jnp.int32))
      )
      rank = jnp.cumsum(tie.astype(jnp.int32))
      return forced | above | (tie & (rank <= want))

    budget = given['budget'][row, 0]
    chosen = chosen_within(jnp.minimum(budget, width))
    flags = chosen.astype(jnp.int32)
    seat = jnp.cumsum(flags) - flags
    plgpu.store(ids_ref.at[row, seat], at, mask=chosen & (seat < width))
    count = jnp.minimum(jnp.sum(flags), width)
    place = lax.broadcasted_iota(jnp.int32, (places,), 0)
    plgpu.store(
      ids_ref.at[row, pl.ds(0, places)],
      jnp.zeros((places,), jnp.int32),
      mask=(place >= count) & (place < width),
    )
    count_ref[row] = count
    mass_now = score if mass is None else load('mass', 0.0)
    total = jnp.sum(mass_now)
    total = jnp.where(total > 0, total, 1.0)
    captured = jnp.sum(jnp.where(chosen, mass_now, 0.0)) / total
    captured_ref[row] = captured
    cut = jnp.float32(0)
    if bounded:
      asked = jnp.where(chosen_within(budget), mass_now, 0.0)
      cut = jnp.maximum(jnp.sum(asked) / total - captured, 0.0)
    cut_ref[row] = cut

  number = jax.ShapeDtypeStruct((rows,), jnp.float32)
  found = pl.pallas_call(
    kernel,
    out_shape=(
      jax.ShapeDtypeStruct((rows, width), jnp.int32),
      jax.ShapeDtypeStruct((rows,), jnp.int32),
      number,
      number,
    ),
    grid=(rows,),
    compiler_params=plgpu.CompilerParams(
      num_warps=max(1, min(16, lanes // _LANES_A_WARP))
    ),
    interpret=interpret,
    name='choose_blocks',
  )(*operands.values())
  ids, *numbers = found
  return Listed(
    ids.reshape(*shape, width), *(x.reshape(shape) for x in numbers)
  )
