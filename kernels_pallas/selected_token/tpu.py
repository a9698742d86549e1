"""selected_token on TPU: whole pages by id, in Pallas Mosaic TPU.

A program is one row of one kv head; its list comes to SMEM by the grid's
pipeline, and the kernel copies the listed pages from HBM itself, `group` pages
a step, `stages` steps ahead, the first ones of the next row while this row
ends. Skipped pages (-1) are neither copied nor attended. The query group lies
on sublanes, keys on lanes:

  s = q k^T [T*G, keys]      acc += p v [T*G, H]

Codes are never dequantised: with key = (code - zero) * scale,

  s = (q . code - zero * sum(q)) * scale
  acc += (p * scale) . code - sum(p * scale * zero)

and a packed byte's two channels meet the even and the odd half of q. A page's
scales and zeros are rows of lanes, as its positions are.

Bytes: 2 page H bits / 8 a page (+ 512 a page and scale row: a row of lanes is
padded to 128). XLA pads packed int4 of head dim 128 to 128 lanes, too: on TPU
int4 saves no bytes over int8 there; head dim 256 it does.

Hold the pool row-major (jax.experimental.layout, major_to_minor (0, 1, 2)):
XLA's default layout of a pool with fewer than 128 last lanes has P minor, and
every call would copy the pool. Scales and zeros are copied either way: page
rows of lanes are what the kernel can address.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic_tpu
from kernels_pallas.keys import Pages
from kernels_pallas.mosaic_tpu import FLOOR, LOG2E, MASKED
from kernels_pallas.partial import Partial
from kernels_pallas.selected_token.rows import row_lists

_MAX_WIDTH = 32768  # two lists of two int32 rows in 1 MiB of SMEM
_FIELDS = 8  # slots of a list row before the ids: used, sink, window


def refuse(function: str, q, pages, ids, *args, **kwargs) -> str | None:
  """Why the kernel does not take the call, or None."""
  del args, kwargs
  reason = mosaic_tpu.refuse(q, pages.k.dtype)
  if reason or function == 'attend_tokens':
    return reason
  if pages.bits < 16 and pages.page % 32:
    return f'page={pages.page} of quantised keys must be a multiple of 32'
  if pages.page not in (16, 32, 64, 128, 256, 512):
    return f'page={pages.page} must be a power of two, 16 to 512'
  if ids.shape[-1] > _MAX_WIDTH:
    return f'a list of {ids.shape[-1]} pages exceeds {_MAX_WIDTH} (SMEM)'
  return None


@dataclasses.dataclass(frozen=True)
class _Static:
  """What a kernel is specialised on."""

  page: int
  group: int  # pages a step
  stages: int
  bits: int
  scale: float
  windowed: bool
  width: int
  side: tuple[str, ...]  # which per-token rows there are
  precision: lax.Precision | None


def _kernel(*refs, static: _Static):
  st = static
  n_side = len(st.side)
  list_ref, next_ref, q_ref, at_ref, k_hbm, v_hbm = refs[:6]
  side_hbm = refs[6 : 6 + n_side]
  out_ref, lse_ref, k_buf, v_buf = refs[6 + n_side : 10 + n_side]
  side_buf = refs[10 + n_side : 10 + 2 * n_side]
  base_ref, sems = refs[10 + 2 * n_side :]
  page, group, stages = st.page, st.group, st.stages
  r = pl.program_id(0)
  steps = lax.div(list_ref[0, 0, 0] + group - 1, group)
  # The row after the last is zeros: it has no steps.
  next_steps = lax.div(next_ref[0, 0, 0] + group - 1, group)

  def entry(step, e):
    """The page of a step of this row or, past its end, of the next; or -1."""

    def get(ref, step):
      index = step * group + e
      at = _FIELDS + jnp.clip(index, 0, st.width - 1)
      return jnp.where(index < ref[0, 0, 0], ref[0, 0, at], -1)

    own = step < steps
    return jnp.where(own, get(list_ref, step), get(next_ref, step - steps))

  def each_copy(step, slot, act):
    """Starts or waits for the copies of a step's listed pages."""

    def one(e, _):
      name = entry(step, e)

      @pl.when(name >= 0)
      def _():
        tokens = pl.ds(pl.multiple_of(e * page, page), page)
        copy = functools.partial(pltpu.make_async_copy, sem=sems.at[slot])
        act(copy(k_hbm.at[name], k_buf.at[slot, tokens]))
        act(copy(v_hbm.at[name], v_buf.at[slot, tokens]))
        for hbm, buf in zip(side_hbm, side_buf):
          act(copy(hbm.at[name], buf.at[slot, e]))

      return 0

    # A loop, not unrolled: 32 pages a step would compile for a minute.
    lax.fori_loop(0, group, one, 0)

  def slot_of(step):
    return lax.rem(base_ref[0] + step, stages)

  def start(step):
    @pl.when(step < steps + next_steps)
    def _():
      each_copy(step, slot_of(step), lambda c: c.start())

  @pl.when(r == 0)
  def _():
    base_ref[0] = 0
    # Pages that are skipped leave old contents: they must be finite.
    for buf in (k_buf, v_buf, *side_buf):
      buf[...] = jnp.zeros_like(buf)

  # The row before has started this row's first steps, `stages - 1` at most.
  ahead = jnp.where(r == 0, 0, jnp.minimum(steps, stages - 1))

  def begin(step, _):
    start(step)
    return 0

  lax.fori_loop(ahead, stages - 1, begin, 0)

  q = q_ref[0]  # [R H], or [2 R H/2] for packed codes
  at = at_ref[0]  # [R 1]
  sink, window = list_ref[0, 0, 1], list_ref[0, 0, 2]
  n_rows, keys = at.shape[0], group * page
  lane = lax.broadcasted_iota(jnp.int32, (1, keys), 1)
  contract = functools.partial(
    lax.dot_general,
    preferred_element_type=jnp.float32,
    precision=st.precision,
  )

  def side(name, slot):
    buf = side_buf[st.side.index(name)]
    return jnp.concatenate([buf[slot, e] for e in range(group)], axis=-1)

  def halves(codes):
    """Packed bytes -> the even and the odd channels, as q's dtype."""
    codes = codes.astype(jnp.int32)
    low, high = codes & 15, lax.shift_right_logical(codes, 4) & 15
    return tuple(x.astype(jnp.float32).astype(q_ref.dtype) for x in (low, high))

  def as_number(codes):
    if codes.dtype == jnp.int8:
      codes = codes.astype(jnp.float32)
    return codes.astype(q_ref.dtype)

  def scores(slot):
    if st.bits == 4:
      even, odd = halves(k_buf[slot])
      nt = (((1,), (1,)), ((), ()))
      s = contract(q[0], even, nt) + contract(q[1], odd, nt)
      total = jnp.sum(q.astype(jnp.float32), axis=(0, 2))[:, None]
      s = s - total * side('k_zero', slot)
    else:
      s = contract(q, as_number(k_buf[slot]), (((1,), (1,)), ((), ())))
    if st.bits < 16:
      s = s * side('k_scale', slot)
    return s * (st.scale * LOG2E)

  def values(p, slot):
    nn = (((1,), (0,)), ((), ()))
    if st.bits < 16:
      p = p * side('v_scale', slot)
    if st.bits != 4:
      return contract(p.astype(q_ref.dtype), as_number(v_buf[slot]), nn)
    shift = jnp.sum(p * side('v_zero', slot), axis=-1, keepdims=True)
    p = p.astype(q_ref.dtype)
    return jnp.concatenate(
      [contract(p, x, nn) - shift for x in halves(v_buf[slot])], axis=-1
    )

  def step(j, carry):
    top, weight, acc = carry
    start(j + stages - 1)
    slot = slot_of(j)
    each_copy(j, slot, lambda c: c.wait())
    listed = jnp.zeros((1, keys), jnp.bool_)
    position = jnp.zeros((1, keys), jnp.int32)
    for e in range(group):
      here = (lane >= e * page) & (lane < (e + 1) * page)
      live = entry(j, e) >= 0
      listed |= here & live
      if 'position' not in st.side:
        inside = jnp.minimum(j * group + e, st.width - 1)
        begin = list_ref[0, 0, _FIELDS + st.width + inside]
        position = jnp.where(here, begin + lane - e * page, position)
    if 'position' in st.side:
      position = side('position', slot)
    mask = listed & (position <= at)
    if st.windowed:
      mask &= (position < sink) | (position > at - window)
    s = jnp.where(mask, scores(slot), MASKED)
    new = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
    p = jnp.exp2(s - new)
    fade = jnp.exp2(top - new)
    weight = weight * fade + jnp.sum(p, axis=-1, keepdims=True)
    return new, weight, acc * fade + values(p, slot)

  h = out_ref.shape[-1]
  top = jnp.full((n_rows, 1), FLOOR, jnp.float32)
  carry = (top, jnp.zeros_like(top), jnp.zeros((n_rows, h), jnp.float32))
  top, weight, acc = lax.fori_loop(0, steps, step, carry)
  base_ref[0] = slot_of(steps)
  some = weight > 0
  safe = jnp.where(some, weight, 1.0)
  out_ref[0] = jnp.where(some, acc / safe, 0.0)
  lse = jnp.where(some, top / LOG2E + jnp.log(safe), -jnp.inf)
  lse_ref[0] = jnp.broadcast_to(lse, lse_ref.shape[1:])


def _attend(
  q,
  pages: Pages,
  positions,
  ids,
  starts,
  *,
  q_positions,
  sink,
  window,
  scale,
  step_keys: int = 1024,
  stages: int = 3,
) -> Partial:
  """The kernel call; `positions` [P page] int32 overrule `starts`, or None."""
  b, t, n, h = q.shape
  kv, width = ids.shape[1:]
  if not width:
    return Partial(
      jnp.zeros(q.shape, jnp.float32),
      jnp.full((b, t, n), -jnp.inf, jnp.float32),
    )
  g, bits, page = n // kv, pages.bits, pages.page
  r = t * g
  pad = -r % 16
  number = jnp.float32 if q.dtype == jnp.float32 else jnp.bfloat16
  rows = q.reshape(b, t, kv, g, h).transpose(0, 2, 1, 3, 4)
  rows = rows.reshape(b * kv, r, h).astype(number)
  rows = jnp.pad(rows, ((0, 0), (0, pad), (0, 0)))
  if bits == 4:
    rows = rows.reshape(b * kv, r + pad, h // 2, 2).transpose(0, 3, 1, 2)
  at = jnp.repeat(q_positions, g, axis=1)
  at = jnp.pad(at, ((0, 0), (0, pad)), constant_values=-1)
  at = jnp.repeat(at[:, None], kv, axis=1).reshape(b * kv, r + pad, 1)
  # The list ends with its last used page.
  used = jnp.max(jnp.where(ids >= 0, jnp.arange(width) + 1, 0), axis=-1)
  fields = jnp.zeros((b, kv, _FIELDS), jnp.int32).at[..., 0].set(used)
  if sink is not None:
    fields = fields.at[..., 1].set(sink).at[..., 2].set(window)
  lists = jnp.concatenate([fields, ids, starts], axis=-1)
  lists = lists.reshape(b * kv, 1, -1)
  lists = jnp.pad(lists, ((0, 1), (0, 0), (0, 0)))
  sides = {
    'k_scale': pages.k_scale,
    'v_scale': pages.v_scale,
    'k_zero': pages.k_zero,
    'v_zero': pages.v_zero,
    'position': positions,
  }
  sides = {name: x for name, x in sides.items() if x is not None}
  group = max(1, min(step_keys // page, width))
  # Whole rows of 128 lanes.
  group = max(group, 128 // page)
  group -= group % max(1, 128 // page)
  static = _Static(
    page=page,
    group=group,
    stages=stages,
    bits=bits,
    scale=scale,
    windowed=sink is not None,
    width=width,
    side=tuple(sides),
    precision=lax.Precision.HIGHEST if number == jnp.float32 else None,
  )
  lead = rows.shape[1:]

  def list_spec(ahead):
    return pl.BlockSpec(
      (1, 1, lists.shape[2]),
      lambda i: (i + ahead, 0, 0),
      memory_space=pltpu.SMEM,
    )

  def whole(shape):
    return pl.BlockSpec((1, *shape), lambda i: (i,) + (0,) * len(shape))

  any_spec = pl.BlockSpec(memory_space=pl.ANY)
  tokens = b * kv * width * page
  out, lse = pl.pallas_call(
    functools.partial(_kernel, static=static),
    grid=(b * kv,),
    in_specs=[
      list_spec(0),
      list_spec(1),
      whole(lead),
      whole((r + pad, 1)),
      *([any_spec] * (2 + len(sides))),
    ],
    out_specs=[whole((r + pad, h)), whole((r + pad, 128))],
    out_shape=[
      jax.ShapeDtypeStruct((b * kv, r + pad, h), jnp.float32),
      jax.ShapeDtypeStruct((b * kv, r + pad, 128), jnp.float32),
    ],
    scratch_shapes=[
      pltpu.VMEM((stages, group * page, pages.k.shape[2]), pages.k.dtype),
      pltpu.VMEM((stages, group * page, pages.v.shape[2]), pages.v.dtype),
      *(pltpu.VMEM((stages, group, 1, page), x.dtype) for x in sides.values()),
      pltpu.SMEM((1,), jnp.int32),
      pltpu.SemaphoreType.DMA((stages,)),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('arbitrary',)),
    cost_estimate=pl.CostEstimate(
      flops=4 * t * g * h * tokens,
      transcendentals=t * g * tokens,
      bytes_accessed=tokens * (2 * h * bits // 8 + 4 * len(sides)),
    ),
    name='lcx_selected_attention',
  )(
    lists,
    lists,
    rows,
    at,
    pages.k,
    pages.v,
    *(x[:, None] for x in sides.values()),
  )
  out = out[:, :r]
  if bits == 4:  # even and odd channels back in turn
    out = out.reshape(b * kv, r, 2, h // 2).swapaxes(2, 3)
  out = out.reshape(b, kv, t, g, h).transpose(0, 2, 1, 3, 4)
  lse = lse[:, :r, 0].reshape(b, kv, t, g).transpose(0, 2, 1, 3)
  return Partial(out.reshape(b, t, n, h), lse.reshape(b, t, n))


def attend_pages(
  q, pages, ids, starts, *, q_positions, sink, window, scale, block_sizes,
  out_dtype,
) -> Partial:  # fmt: skip
  """See `kernels_pallas.selected_token.attend_pages`."""
  part = _attend(
    q,
    pages,
    None,
    ids,
    starts,
    q_positions=q_positions,
    sink=sink,
    window=window,
    scale=scale,
    **(block_sizes or {}),
  )
  return Partial(part.out.astype(out_dtype), part.lse)


def attend_contiguous(q, pages, starts, used, **named) -> Partial:
  """See `kernels_pallas.selected_token.attend_contiguous`."""
  return attend_pages(q, pages, *row_lists(pages, starts, used), **named)


def attend_tokens(
  q, pages, rows, positions, *, q_positions, sink, window, scale, block_sizes
) -> Partial:
  """See `kernels_pallas.selected_token.attend_tokens`.

  A TPU's DMA takes whole tiles (16 rows of bfloat16), so XLA gathers the
  tokens (codes, scales and zeros: nothing is dequantised) into pages of 128,
  and the kernel attends to those with a position for each token.
  """
  page = 128
  b, kv, width = rows.shape
  rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -width % page)), constant_values=-1)
  pad = rows.shape[2] - width
  positions = jnp.pad(positions, ((0, 0), (0, 0), (0, pad)))
  positions = jnp.where(rows >= 0, positions, mosaic_tpu.NEVER)
  gathered = pages.tokens(jnp.maximum(rows, 0))
  gathered = jax.tree.map(lambda x: x.reshape(-1, page, *x.shape[3:]), gathered)
  ids = jnp.arange(b * kv * (rows.shape[2] // page), dtype=jnp.int32)
  ids = ids.reshape(b, kv, -1)
  return _attend(
    q,
    gathered,
    positions.reshape(-1, page),
    ids,
    jnp.zeros_like(ids),
    q_positions=q_positions,
    sink=sink,
    window=window,
    scale=scale,
    **(block_sizes or {}),
  )
