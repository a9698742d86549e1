"""page_choice on NVIDIA GPUs: two small kernels in Pallas Triton.

A decode step is a chain of short launches, and a `cond` costs several. So both
kernels are launched in every step, and end at once where no choice is due; then
what is held stays where it is, as the output is its memory.

  scores   one program for some pages of a (row, row of the bounds): reads their
           bounds once, two products on the tensor core; bound by bytes
  choice   one program for a (row, kv head): a search for the n-th best score,
           then compaction; bound by the latency of counting

`reuse.py` has a second kernel for choices that serve several steps.

Triton, not Mosaic GPU: its arrays have scans, and stores at masked places.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas import nth_best

FEWEST_QUERIES = 16  # columns of the smallest product on the tensor core
MOST_QUERIES = 128


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Static choices of the kernels.

  Attributes:
    tile_bytes: of the least (and of the largest) keys that a program reads;
      4 warps hold 32 registers a thread of each.
    warps: of a program that chooses.
    lanes: pages that stand side by side there; each has W / lanes in a row.
  """

  tile_bytes: int = 16 * 1024
  warps: int = 8
  lanes: int = 1024


SIZES = Sizes()


def refuse(function: str, q, low, high, starts, *_, **__) -> str | None:
  """Why this implementation cannot serve; None if it can."""
  del function, high
  t, n_heads, h = q.shape[1:]
  kv, width = starts.shape[1:]
  per_page = low.shape[2] // width
  if h not in (64, 128, 256):
    return f'head dim {h} is not one of 64, 128, 256'
  if any(
    x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) for x in (q, low)
  ):
    return f'{q.dtype=} or {low.dtype=} is no 16 or 32 bit float'
  queries = _padded(t) * _padded(n_heads // kv)
  if queries > MOST_QUERIES:
    return (
      f'{t} x {n_heads // kv} padded queries a kv head exceed {MOST_QUERIES}'
    )
  rows = _tile_rows(q, low)
  if per_page != _padded(per_page) or per_page > rows:
    return f'{per_page} logical pages a page are no power of 2 up to {rows}'
  if width > nth_best.MOST:
    return f'{width} pages exceed {nth_best.MOST}'
  return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Served:
  """How long a choice has served: from it follows whether the next one is due.

  Attributes:
    since: int32 [B] newest position when pages were chosen.
    age: int32 [B] tokens answered from them.
    newest: int32 [B] newest position now.
    count: int32 [B] tokens to answer now.
    reuse: tokens that a choice serves, at most (static).
  """

  since: Any
  age: Any
  newest: Any
  count: Any
  reuse: int = dataclasses.field(metadata={'static': True})

  def due(self):
    """Whether a row's choice is too old, or the row was cut behind it."""
    row = _iota((_padded(self.age.shape[0]),), 0)
    real = row < self.age.shape[0]
    since, age, newest, count = (
      plgpu.load(x.at[row], mask=real, other=0)
      for x in (self.since, self.age, self.newest, self.count)
    )
    due = (age + count > self.reuse) | (newest - count < since)
    return jnp.max(jnp.where(due & (count > 0), 1, 0)) > 0


class Call(NamedTuple):
  """Whether and for whom to choose: operands of both kernels, or their refs."""

  valid: Any  # bool [B T]
  unscored: Any  # bool [K], or None
  due: Any  # bool or int32 [1], or a `Served`, or None

  def given(self) -> list:
    return jax.tree.leaves(self)

  def read(self, refs) -> 'Call':
    """The same of the first refs, which come in the order of `given`."""
    given, tree = jax.tree.flatten(self)
    return tree.unflatten(refs[: len(given)])

  def is_due(self):
    """Whether to choose now, if not None."""
    return self.due.due() if isinstance(self.due, Served) else self.due[0] != 0

  def chooses(self, b_at):
    """Whether a row of the batch chooses now."""
    now = self.valid[b_at, 0]
    for t in range(1, self.valid.shape[1]):
      now |= self.valid[b_at, t]
    return now if self.due is None else now & self.is_due()

  def head_of(self, row):
    """The kv head of a row of the bounds; -1: none."""
    if self.unscored is None:
      return row
    head, rows = jnp.int32(-1), jnp.int32(0)
    for k in range(self.unscored.shape[0]):
      scored = ~self.unscored[k]
      head = jnp.where(scored & (rows == row), k, head)
      rows += scored.astype(jnp.int32)
    return head

  def row_of(self, head, rows: int):
    """The row of the bounds of a kv head; -1: none."""
    if self.unscored is None:
      return head
    row, before = jnp.int32(-1), jnp.int32(0)
    for k in range(self.unscored.shape[0]):
      scored = ~self.unscored[k]
      row = jnp.where(scored & (head == k), before, row)
      before += scored.astype(jnp.int32)
    return jnp.where(row < rows, row, -1)


def choose_pages(
  q: Float[Array, 'B T N H'],
  low: Float[Array, 'B h C H'],
  high: Float[Array, 'B h C H'],
  starts: Int32[Array, 'B K W'],
  newest: Int32[Array, 'B'],
  valid: Bool[Array, 'B T'],
  *,
  n: int,
  sink: int,
  recent: int,
  page: int,
  group: str,
  unscored: Bool[Array, 'K'] | None,
  held: Int32[Array, 'B K n'] | None,
  due: Bool[Array, ''] | None,
  interpret: bool = False,
) -> Int32[Array, 'B K n']:
  """`kernels_pallas.page_choice.choose_pages` on an NVIDIA GPU.

  Raises:
    NotImplementedError: with the reason, where the kernels do not apply.
  """
  if reason := refuse('choose_pages', q, low, high, starts):
    raise NotImplementedError(reason)
  call = Call(valid, unscored, None if due is None else due.reshape(1))
  scores, call = page_scores(
    q, low, high, starts, newest, call, n=n, sink=sink, recent=recent,
    page=page, group=group, interpret=interpret,
  )  # fmt: skip
  return best_pages(
    scores, held, call, n=n, kv_heads=starts.shape[1], interpret=interpret
  )


def page_scores(
  q, low, high, starts, newest, call: Call, *, n: int, sink: int, recent: int,
  page: int, group: str, interpret: bool = False,
) -> tuple[Float[Array, 'B h W'], Call]:  # fmt: skip
  """Scores of all pages: inf where always seen, -inf where unused.

  Rows whose pages all fit into n get any other number below inf. Nothing is
  written for rows that do not choose, nor for rows of the bounds without head.

  Returns:
    The scores, and the call for the kernel that chooses by them: whether a
    choice is due, where it was to be found out of a `Served`.
  """
  b, t, n_heads, h = q.shape
  kv, width = starts.shape[1:]
  rows, logical, per_head = low.shape[1], low.shape[2], n_heads // kv
  per_page = logical // width
  tile = _tile_rows(q, low)
  pages = tile // per_page
  # Query t, g of the kv head stands in column t * lead + g.
  lead = _padded(per_head)
  columns = max(FEWEST_QUERIES, _padded(t) * lead)
  dtype = jnp.promote_types(q.dtype, low.dtype)
  exact = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
  operands = [q.reshape(-1), low, high, starts, newest, *call.given()]
  shapes = [jax.ShapeDtypeStruct((b, rows, width), jnp.float32)]
  if isinstance(call.due, Served):
    shapes.append(jax.ShapeDtypeStruct((1,), jnp.int32))

  def kernel(*refs):
    scores_ref, *due_refs = refs[len(operands) :]
    q_ref, low_ref, high_ref, starts_ref, newest_ref, *refs = refs
    own = call.read(refs)
    first = pl.program_id(0) * pages
    row, b_at = pl.program_id(1), pl.program_id(2)
    head = own.head_of(row)
    last = newest_ref[b_at]
    for ref in due_refs:

      @pl.when((pl.program_id(0) == 0) & (row == 0) & (b_at == 0))
      def _(ref=ref):
        ref[0] = own.is_due().astype(jnp.int32)

    def products():
      column = _iota((h, columns), 1)
      at, mate = column // lead, column % lead
      channel = _iota((h, columns), 0)
      index = (b_at * t + at) * n_heads + head * per_head + mate
      real = (at < t) & (mate < per_head)
      queries = plgpu.load(
        q_ref.at[index * h + channel], mask=real, other=0.0
      ).astype(jnp.float32)
      place = first * per_page + _iota((tile, h), 0)
      window = (b_at, row, pl.ds(first * per_page, tile), slice(None))

      def product(ref, some):
        bounds = plgpu.load(ref.at[window], mask=place < logical, other=0.0)
        return jnp.dot(
          bounds.astype(dtype),
          some.astype(dtype),
          precision=exact,
          preferred_element_type=jnp.float32,
        )

      found = product(high_ref, jnp.maximum(queries, 0.0))
      return found + product(low_ref, jnp.minimum(queries, 0.0))

    def best():
      found = products()  # [tile columns]
      column = _iota((tile, columns), 1)
      if group == 'max':
        found = jnp.where(column % lead < per_head, found, -jnp.inf)
      found = found.reshape(tile, columns // lead, lead)
      found = found.max(axis=2) if group == 'max' else found.sum(axis=2)
      token = _iota((columns // lead,), 0)
      counts = plgpu.load(own.valid.at[b_at, jnp.minimum(token, t - 1)])
      counts &= token < t
      found = jnp.where(counts[None], found, -jnp.inf).max(axis=1)
      return found.reshape(pages, per_page).max(axis=1)

    @pl.when(own.chooses(b_at) & (head >= 0))
    def _():
      slot = first + _iota((pages,), 0)
      start = plgpu.load(
        starts_ref.at[b_at, head, pl.ds(first, pages)],
        mask=slot < width,
        other=2**30,
      )
      # A page in slot w starts at w * page or later.
      idle = (last < n * page) | (first * page > last)
      scores = lax.cond(idle, lambda: jnp.zeros((pages,), jnp.float32), best)
      forced = (start < sink) | (start + page > last - recent + 1)
      scores = jnp.where(forced, jnp.inf, scores)
      plgpu.store(
        scores_ref.at[b_at, row, pl.ds(first, pages)],
        jnp.where(start <= last, scores, -jnp.inf),
        mask=slot < width,
      )

  scores, *due = pl.pallas_call(
    kernel,
    out_shape=shapes,
    grid=(pl.cdiv(width, pages), rows, b),
    compiler_params=plgpu.CompilerParams(num_warps=4),
    interpret=interpret,
    name='page_scores',
  )(*operands)
  return scores, call._replace(due=due[0]) if due else call


def best_pages(
  scores: Float[Array, 'B h W'],
  held: Int32[Array, 'B K n'] | None,
  call: Call,
  *,
  n: int,
  kv_heads: int,
  interpret: bool = False,
) -> Int32[Array, 'B K n']:
  """Slots of the n best scores above -inf, of equal ones the first."""
  b, rows, _ = scores.shape

  def kernel(*refs):
    scores_ref, *refs, out_ref = refs
    own = call.read(refs)
    head, b_at = pl.program_id(0), pl.program_id(1)
    row, now = own.row_of(head, rows), own.chooses(b_at)
    place = _iota((_padded(n),), 0)

    def fill(begin):
      plgpu.store(
        out_ref.at[b_at, head, pl.ds(0, _padded(n))],
        jnp.full(place.shape, -1, jnp.int32),
        mask=(place >= begin) & (place < n),
      )

    @pl.when(now & (row >= 0))
    def _():
      found, total = best_slots(scores_ref, b_at, row, n)
      for slot, taken, at in found:
        plgpu.store(
          out_ref.at[b_at, head, jnp.where(taken, at, n)], slot, mask=taken
        )
      fill(total)

    # Without a score, nothing is chosen; without a choice, what is held stays.
    empty = now & (row < 0)
    if held is None:
      empty = ~(now & (row >= 0))

    @pl.when(empty)
    def _():
      fill(0)

  operands = [scores, *call.given()]
  aliases = {}
  if held is not None:
    aliases = {len(operands): 0}
    operands.append(held)
  return pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((b, kv_heads, n), jnp.int32),
    grid=(kv_heads, b),
    input_output_aliases=aliases,
    compiler_params=plgpu.CompilerParams(num_warps=SIZES.warps),
    interpret=interpret,
    name='best_pages',
  )(*operands)


def best_slots(scores_ref, b_at, row, n: int):
  """The n best slots of a row of scores: ([(slot, taken, place)], how many)."""
  width = scores_ref.shape[2]
  slots, keys = nth_best.slots(width, SIZES.lanes), []
  for slot in slots:
    score = plgpu.load(scores_ref.at[b_at, row, jnp.minimum(slot, width - 1)])
    keys.append(
      jnp.where(slot < width, nth_best.ordered(score), nth_best.LOWEST)
    )
  found, total = nth_best.places(keys, n)
  return [(slot, *where) for slot, where in zip(slots, found)], total


def _tile_rows(q, low) -> int:
  """Logical pages that a program scores."""
  size = jnp.promote_types(q.dtype, low.dtype).itemsize
  return max(16, SIZES.tile_bytes // (q.shape[3] * size))


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
  return lax.broadcasted_iota(jnp.int32, shape, axis)


def _padded(x: int) -> int:
  """The next power of 2: Triton's arrays have no other size."""
  return 1 << (x - 1).bit_length()
