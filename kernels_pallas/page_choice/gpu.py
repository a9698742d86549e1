"""page_choice on NVIDIA GPUs: two small kernels in Pallas Triton.

A decode step is a chain of short launches, and a `cond` costs several. So both
kernels are launched in every step, and end at once where no choice is due; then
what is held stays where it is, as the output is its memory.

  scores   one program for some pages of a (row, row of the bounds): reads their
           bounds once, two products on the tensor core; bound by bytes
  choice   one program for a (row, kv head): a search for the n-th best score,
           then compaction; bound by the latency of counting

Triton, not Mosaic GPU: its arrays have scans, and stores at masked places.

The search is for a number, not an order: floats map to integers of the same
order, each pass cuts the interval in three by counting what lies above two
thresholds (in the halves of one integer: one reduction), and ends as soon as
exactly n lie above one: 5 to 12 passes on average for 2K to 16K normal or
log-normal scores, 16 at most seen.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

# Integers in the order of the floats that they stand for, see `_ordered`.
LOWEST = -(2**31)  # below every float
MINUS_INF = -0x7F800001
PLUS_INF = 0x7F800000
FEWEST_QUERIES = 16  # columns of the smallest product on the tensor core
MOST_QUERIES = 128
MOST_PAGES = 2**16 - 1  # two counts share an int32


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
  if width > MOST_PAGES:
    return f'{width} pages exceed {MOST_PAGES}'
  return None


class Call(NamedTuple):
  """Whether and for whom to choose: operands of both kernels, or their refs."""

  valid: Any  # bool [B T]
  unscored: Any  # bool [K], or None
  due: Any  # bool [1], or None

  def given(self) -> list:
    return [x for x in self if x is not None]

  def read(self, refs) -> 'Call':
    """The same of refs, which come in the order of `given`."""
    refs = iter(refs)
    return Call(*(None if x is None else next(refs) for x in self))

  def chooses(self, b_at):
    """Whether a row of the batch chooses now."""
    now = self.valid[b_at, 0]
    for t in range(1, self.valid.shape[1]):
      now |= self.valid[b_at, t]
    return now if self.due is None else now & self.due[0]

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
  scores = page_scores(
    q, low, high, starts, newest, call, n=n, sink=sink, recent=recent,
    page=page, group=group, interpret=interpret,
  )  # fmt: skip
  return best_pages(
    scores, held, call, n=n, kv_heads=starts.shape[1], interpret=interpret
  )


def page_scores(
  q, low, high, starts, newest, call: Call, *, n: int, sink: int, recent: int,
  page: int, group: str, interpret: bool = False,
) -> Float[Array, 'B h W']:  # fmt: skip
  """Scores of all pages: inf where always seen, -inf where unused.

  Rows whose pages all fit into n get any other number below inf. Nothing is
  written for rows that do not choose, nor for rows of the bounds without head.
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

  def kernel(*refs):
    *refs, scores_ref = refs
    q_ref, low_ref, high_ref, starts_ref, newest_ref, *refs = refs
    own = call.read(refs)
    first = pl.program_id(0) * pages
    row, b_at = pl.program_id(1), pl.program_id(2)
    head = own.head_of(row)
    last = newest_ref[b_at]

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

  operands = [q.reshape(-1), low, high, starts, newest, *call.given()]
  return pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((b, rows, width), jnp.float32),
    grid=(pl.cdiv(width, pages), rows, b),
    compiler_params=plgpu.CompilerParams(num_warps=4),
    interpret=interpret,
    name='page_scores',
  )(*operands)


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
  b, rows, width = scores.shape
  lanes = min(SIZES.lanes, _padded(width))
  depth = pl.cdiv(width, lanes)

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
      # A lane's pages follow one another, so that one scan counts them all.
      slots = [_iota((lanes,), 0) * depth + i for i in range(depth)]
      keys = []
      for slot in slots:
        inside = slot < width
        score = plgpu.load(
          scores_ref.at[b_at, row, jnp.minimum(slot, width - 1)]
        )
        keys.append(jnp.where(inside, _ordered(score), LOWEST))
      cut, ties, total = _nth_best(keys, n)
      flags = [
        jnp.where(key > cut, 1, jnp.where(key == cut, 1 << 16, 0))
        for key in keys
      ]
      lane = sum(flags)
      before = jnp.cumsum(lane) - lane  # above the cut, equal to it << 16
      for slot, key, flag in zip(slots, keys, flags):
        equal = lax.shift_right_logical(before, 16)
        taken = (key > cut) | ((key == cut) & (equal < ties))
        at = (before & 0xFFFF) + jnp.minimum(equal, ties)
        plgpu.store(
          out_ref.at[b_at, head, jnp.where(taken, at, n)], slot, mask=taken
        )
        before += flag
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


def _nth_best(keys: list[jax.Array], n: int):
  """Where to cut so that n remain: (cut, ties, total), scalars.

  What lies above `cut` is chosen, and the first `ties` of what equals it:
  `total` in all, fewer than n only where fewer are above -inf.
  """

  def count(low, high):
    """How many keys are >= low, and >= high."""
    both = [
      jnp.where(key >= high, 0x10001, jnp.where(key >= low, 1, 0))
      for key in keys
    ]
    both = jnp.sum(sum(both))
    return both & 0xFFFF, lax.shift_right_logical(both, 16)

  used, forced = count(jnp.int32(MINUS_INF + 1), jnp.int32(PLUS_INF))
  finite = [(key > MINUS_INF) & (key < PLUS_INF) for key in keys]
  least = [jnp.where(f, k, PLUS_INF) for f, k in zip(finite, keys)]
  largest = [jnp.where(f, k, MINUS_INF) for f, k in zip(finite, keys)]
  least = jnp.min(_fold(jnp.minimum, least))
  largest = jnp.max(_fold(jnp.maximum, largest))

  # At least n keys are >= low, fewer than n are >= high.
  search = (forced < n) & (n < used)
  low = jnp.where(search, least, PLUS_INF)
  high = jnp.where(search, largest + 1, PLUS_INF + 1)
  above = jnp.where(search, forced, 0)
  exact = used <= n

  def unsettled(carry):
    low, high, _, exact = carry
    return ~exact & (low + 1 < high)

  def narrow(carry):
    low, high, above, _ = carry
    span = (high - low).astype(jnp.uint32)  # wraps to the true distance
    third = jnp.maximum(span // 3, 1).astype(jnp.int32)
    first, second = low + third, high - third
    n_first, n_second = count(first, second)
    low = jnp.where(n_second >= n, second, jnp.where(n_first >= n, first, low))
    high = jnp.where(n_first < n, first, jnp.where(n_second < n, second, high))
    above = jnp.where(
      n_first < n, n_first, jnp.where(n_second < n, n_second, above)
    )
    return low, high, above, (n_first == n) | (n_second == n)

  low, _, above, exact = lax.while_loop(
    unsettled, narrow, (low, high, above, exact)
  )
  cut = jnp.where(used <= n, MINUS_INF, jnp.where(exact, low - 1, low))
  ties = jnp.where(exact, 0, n - above)
  return cut, ties, jnp.minimum(used, n)


def _ordered(x: jax.Array) -> jax.Array:
  """float32 to int32 of the same order; both zeros to 0, NaN to inf's.

  (Were NaN above inf, more than n could be chosen, and written.)
  """
  bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
  bits ^= lax.shift_right_arithmetic(bits, 31) & 0x7FFFFFFF
  return jnp.minimum(bits, PLUS_INF)


def _tile_rows(q, low) -> int:
  """Logical pages that a program scores."""
  size = jnp.promote_types(q.dtype, low.dtype).itemsize
  return max(16, SIZES.tile_bytes // (q.shape[3] * size))


def _fold(f, parts: list[jax.Array]) -> jax.Array:
  whole = parts[0]
  for part in parts[1:]:
    whole = f(whole, part)
  return whole


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
  return lax.broadcasted_iota(jnp.int32, shape, axis)


def _padded(x: int) -> int:
  """The next power of 2: Triton's arrays have no other size."""
  return 1 << (x - 1).bit_length()
