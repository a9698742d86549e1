"""page_choice on NVIDIA GPUs: two small kernels in Pallas Triton.

A decode step is a chain of short launches, and a `cond` costs several. So both
kernels are launched in every step, and end at once where no choice is due; then
what is held stays where it is, as the output is its memory.

  scores   one program for some pages of a (row, row of the bounds): reads their
           bounds once, two products on the tensor core; bound by bytes
  choice   one program for a (row, kv head): a search for the n-th best score,
           then compaction; bound by the latency of counting

`reuse.py` has a second kernel for choices that serve several steps. The scores
may be found by the launch that appends the token of the query (`Scoring`), and
of sums of keys and of their squares instead of bounds (`moments`).

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
    programs: that score by sums, about. Of small logical pages they would be
      thousands, which cost time in steps without a choice, too: each looks
      whether one is due. Bounds of 16 keys take 516 at 128K.
  """

  tile_bytes: int = 16 * 1024
  warps: int = 8
  lanes: int = 1024
  programs: int = 512


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


@dataclasses.dataclass(frozen=True)
class Scoring:
  """Scores of all pages, as work of a launch's programs.

  The launch is `page_scores` or one that appends the newest token meanwhile
  (`kernels_pallas.append_token`): nothing that an append moves is read here but
  bounds, and those that it moves are of the newest page, whose score is
  `Always` replaced. So starts of pages are for whom chooses.

  Rows whose pages all fit into n get any numbers. Nothing is written for rows
  that do not choose, nor for rows of the bounds without head.

  By `moments` a page scores as `likely_page_scores` says, of sums over logical
  pages that are full: all are but those of the newest page. Products of 16 bit
  queries are of 16 bit numbers: a mean is two of them, squares are rounded, by
  which the deviation of q . k is within 2^-9 of itself.

  Attributes:
    newest: int32 [B] position of each row's newest token.
    call: whether and for whom.
    q: shape and dtype of the queries, [B T N H].
    low: shape and dtype of the least keys, [B h C H].
    kv_heads: K.
    width: W, pages.
    n: pages to choose.
    page: tokens of a page.
    group: 'max' or 'sum' over the query heads of a kv head.
    loose: float32 [B h H] as in `choose_pages`, or None.
    moments: low and high are no bounds but sums, of keys and of their squares.
  """

  newest: Int32[Array, 'B']
  call: Call
  q: jax.ShapeDtypeStruct
  low: jax.ShapeDtypeStruct
  kv_heads: int
  width: int
  n: int
  page: int
  group: str
  loose: Float[Array, 'B h H'] | None = None
  moments: bool = False

  @classmethod
  def of(cls, q, low, starts, newest, call: Call, **rules) -> 'Scoring':
    """Of arrays with the shapes of q, low and starts [B K W]."""
    q, low = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, low))
    kv_heads, width = starts.shape[1:]
    return cls(newest, call, q, low, kv_heads, width, **rules)

  @property
  def per_page(self) -> int:
    """Logical pages of a page."""
    return self.low.shape[2] // self.width

  @property
  def pages(self) -> int:
    """Pages of a tile, which a program scores at once."""
    return _tile_rows(self.q, self.low) // self.per_page

  @property
  def tiles(self) -> int:
    """Tiles that a program scores, one by one."""
    if not self.moments:
      return 1
    (b, rows), tiles = self.low.shape[:2], pl.cdiv(self.width, self.pages)
    return min(tiles, pl.cdiv(tiles * rows * b, SIZES.programs))

  @property
  def grid(self) -> tuple[int, int, int]:
    """Programs: pages, rows of the bounds, rows of the batch."""
    programs = pl.cdiv(self.width, self.pages * self.tiles)
    return programs, self.low.shape[1], self.low.shape[0]

  def operands(self) -> list:
    """What `run` reads beside queries and bounds."""
    loose = [] if self.loose is None else [self.loose]
    return [self.newest, *loose, *self.call.given()]

  def outputs(self) -> list[jax.ShapeDtypeStruct]:
    """What it writes: scores [B h W]; whether a choice is due, if not known."""
    b, rows = self.low.shape[:2]
    shapes = [jax.ShapeDtypeStruct((b, rows, self.width), jnp.float32)]
    if isinstance(self.call.due, Served):
      shapes.append(jax.ShapeDtypeStruct((1,), jnp.int32))
    return shapes

  def found(self, outputs) -> tuple[Float[Array, 'B h W'], Call]:
    """The scores, and the call for the kernel that chooses by them."""
    scores, *due = outputs
    return scores, self.call._replace(due=due[0]) if due else self.call

  def run(self, at, scored, operands, outputs):
    """One program.

    Args:
      at: its place in `grid`.
      scored: refs of [B*T heads H], of which the queries are the first heads,
        of the least and of the largest keys (or of the sums).
      operands: refs of `operands`.
      outputs: refs of `outputs`.
    """
    newest_ref, *refs = operands
    loose_ref = None if self.loose is None else refs.pop(0)
    scores_ref, *due_refs = outputs
    own = self.call.read(refs)
    program, row, b_at = at
    head, last = own.head_of(row), newest_ref[b_at]
    for ref in due_refs:

      @pl.when((program == 0) & (row == 0) & (b_at == 0))
      def _(ref=ref):
        ref[0] = own.is_due().astype(jnp.int32)

    def score(tile):
      first = tile * self.pages
      slot = first + _iota((self.pages,), 0)
      # A page in slot w starts at w * page or later.
      idle = (last < self.n * self.page) | (first * self.page > last)
      scores = lax.cond(
        idle,
        lambda: jnp.zeros((self.pages,), jnp.float32),
        lambda: self._best(
          scored, loose_ref, own.valid, first, row, b_at, head
        ),
      )
      plgpu.store(
        scores_ref.at[b_at, row, pl.ds(first, self.pages)],
        scores,
        mask=slot < self.width,
      )

    @pl.when(own.chooses(b_at) & (head >= 0))
    def _():
      if self.tiles == 1:
        score(program)
      else:
        pl.loop(0, self.tiles)(lambda i: score(program * self.tiles + i))

  def _best(self, scored, loose_ref, valid, first, row, b_at, head):
    """Scores of the pages from `first` on."""
    q_ref, *parts = scored
    _, t, n_heads, h = self.q.shape
    per_head, per_page = n_heads // self.kv_heads, self.per_page
    tile = self.pages * per_page
    # Query t, g of the kv head stands in column t * lead + g.
    lead = _padded(per_head)
    columns = max(FEWEST_QUERIES, _padded(t) * lead)
    column = _iota((h, columns), 1)
    at, mate = column // lead, column % lead
    queries = plgpu.load(
      q_ref.at[b_at * t + at, head * per_head + mate, _iota((h, columns), 0)],
      mask=(at < t) & (mate < per_head),
      other=0.0,
    ).astype(jnp.float32)
    place = first * per_page + _iota((tile, h), 0)
    window = (b_at, row, pl.ds(first * per_page, tile), slice(None))

    def load(ref):
      return plgpu.load(
        ref.at[window], mask=place < self.low.shape[2], other=0.0
      )

    by = self._likely if self.moments else self._bound
    found = by(load, queries, *parts)  # [tile columns]
    if loose_ref is not None:
      loose = plgpu.load(loose_ref.at[b_at, row, _iota((h, columns), 0)])
      found -= jnp.sum(jnp.abs(queries) * loose, axis=0)[None]
    column = _iota((tile, columns), 1)
    if self.group == 'max':
      found = jnp.where(column % lead < per_head, found, -jnp.inf)
    found = found.reshape(tile, columns // lead, lead)
    found = found.max(axis=2) if self.group == 'max' else found.sum(axis=2)
    token = _iota((columns // lead,), 0)
    counts = plgpu.load(valid.at[b_at, jnp.minimum(token, t - 1)])
    counts &= token < t
    found = jnp.where(counts[None], found, -jnp.inf).max(axis=1)
    return found.reshape(self.pages, per_page).max(axis=1)

  def _bound(self, load, queries, low_ref, high_ref):
    """What no q . k of a logical page exceeds."""
    dtype = jnp.promote_types(self.q.dtype, self.low.dtype)
    found = self._product(load(high_ref), jnp.maximum(queries, 0.0), dtype)
    return found + self._product(
      load(low_ref), jnp.minimum(queries, 0.0), dtype
    )

  def _likely(self, load, queries, total_ref, square_ref):
    """What the best q . k of a full logical page is likely to be."""
    part = self.per_page / self.page
    mean, square = (load(x) * part for x in (total_ref, square_ref))
    variance = jnp.maximum(square - mean * mean, 0.0)
    # A query's square may be too large for float16.
    wide = self.q.dtype == jnp.float32
    dtype = jnp.float32 if wide else jnp.bfloat16
    spread = self._product(variance, queries * queries, dtype)
    found = 2 * jnp.sqrt(spread) + self._product(mean, queries, self.q.dtype)
    if wide:
      return found
    # All keys of a channel may be far from 0, as those of Qwen2.5 are: what
    # tells pages apart is then in the bits that 16 leave out.
    rest = mean - mean.astype(self.q.dtype).astype(jnp.float32)
    return found + self._product(rest, queries, self.q.dtype)

  def _product(self, x, queries, dtype):
    """Of logical pages and queries, in `dtype`."""
    exact = self.q.dtype == jnp.float32
    return jnp.dot(
      x.astype(dtype),
      queries.astype(dtype),
      precision=lax.Precision.HIGHEST if exact else None,
      preferred_element_type=jnp.float32,
    )


class Always(NamedTuple):
  """The pages that are seen or not whatever they score: operands, or refs."""

  starts: Any  # int32 [B K W] position of each page's first token
  newest: Any  # int32 [B] position of each row's newest token
  sink: int
  recent: int
  page: int

  def replaced(self, scores, b_at, head, slot):
    """Scores of pages: inf where they are always seen, -inf where unused."""
    start = plgpu.load(self.starts.at[b_at, head, slot])
    last = self.newest[b_at]
    forced = (start < self.sink) | (start + self.page > last - self.recent + 1)
    scores = jnp.where(forced, jnp.inf, scores)
    return jnp.where(start <= last, scores, -jnp.inf)


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
  loose: Float[Array, 'B h H'] | None,
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
  rules = {'n': n, 'page': page, 'group': group, 'loose': loose}
  work = Scoring.of(q, low, starts, newest, call, **rules)
  scores, call = page_scores(q, low, high, work, interpret=interpret)
  always = Always(starts, newest, sink, recent, page)
  return best_pages(scores, held, call, always, n=n, interpret=interpret)


def page_scores(
  q: Float[Array, 'B T N H'],
  low: Float[Array, 'B h C H'],
  high: Float[Array, 'B h C H'],
  scoring: Scoring,
  *,
  interpret: bool = False,
) -> tuple[Float[Array, 'B h W'], Call]:
  """A launch that scores pages, and does nothing else."""
  operands = scoring.operands()
  n = 3 + len(operands)

  def kernel(*refs):
    at = [pl.program_id(i) for i in range(3)]
    scoring.run(at, refs[:3], refs[3:n], refs[n:])

  outputs = pl.pallas_call(
    kernel,
    out_shape=scoring.outputs(),
    grid=scoring.grid,
    compiler_params=plgpu.CompilerParams(num_warps=4),
    interpret=interpret,
    name='page_scores',
  )(q.reshape(-1, *q.shape[2:]), low, high, *operands)
  return scoring.found(outputs)


def best_pages(
  scores: Float[Array, 'B h W'],
  held: Int32[Array, 'B K n'] | None,
  call: Call,
  always: Always,
  *,
  n: int,
  interpret: bool = False,
) -> Int32[Array, 'B K n']:
  """Slots of the n best scores above -inf, of equal ones the first."""
  b, rows, _ = scores.shape
  kv_heads = always.starts.shape[1]

  def kernel(*refs):
    scores_ref, starts_ref, newest_ref, *refs, out_ref = refs
    seen = always._replace(starts=starts_ref, newest=newest_ref)
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
      found, total = best_slots(scores_ref, seen, b_at, row, head, n)
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

  operands = [scores, always.starts, always.newest, *call.given()]
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


def best_slots(scores_ref, always: Always, b_at, row, head, n: int):
  """The n best slots of a row of scores: ([(slot, taken, place)], how many).

  Args:
    scores_ref: of `Scoring`.
    always: refs, and rules.
    b_at: row of the batch.
    row: of the bounds.
    head: its kv head.
    n: how many to choose.
  """
  width = scores_ref.shape[2]
  slots, keys = nth_best.slots(width, SIZES.lanes), []
  for slot in slots:
    real = jnp.minimum(slot, width - 1)
    score = plgpu.load(scores_ref.at[b_at, row, real])
    score = always.replaced(score, b_at, head, real)
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
