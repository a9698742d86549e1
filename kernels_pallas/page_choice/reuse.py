"""A choice of pages that serves several steps, and the list that it gives.

Whether a choice is due, the choice, its age and the list of pages to attend to
are a dozen small launches in array operations (`lcx.select.reused_pages`). Here
they are the two that make a choice (`gpu.py`), in place: the first says whether
one is due, the second writes the list and counts on. The append of the token
that is answered can be part of the first (`scoring`). It has no twin here:
elsewhere those operations say the same, against which it is tested.

A row's list: the pages chosen; those that began since; of a kv head without
bounds, its first slots.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas import dispatch
from kernels_pallas.keys import NEVER
from kernels_pallas.page_choice import gpu

LONG_AGO = 2**30  # of the age: it grows no further


class Held(NamedTuple):
  """A choice, a row; `lcx.select.reused_pages.Choice` has the meanings.

  Attributes:
    slots: int32 [B K n].
    newest: int32 [B].
    age: int32 [B].
  """

  slots: Int32[Array, 'B K n']
  newest: Int32[Array, 'B']
  age: Int32[Array, 'B']


class Table(NamedTuple):
  """A row's pages by slot.

  Attributes:
    ids: int32 [B K W] pages of a pool; those whose start is NEVER are not seen.
    starts: int32 [B K W] position of each page's first token.
    used: int32 [B] tokens that the row holds.
  """

  ids: Int32[Array, 'B K W']
  starts: Int32[Array, 'B K W']
  used: Int32[Array, 'B']


@dataclasses.dataclass(frozen=True)
class Rules:
  """Static numbers.

  Attributes:
    reuse: tokens that a choice serves, at most.
    sink: first tokens that are always seen.
    recent: last tokens that are always seen.
    page: tokens of a page.
    group: 'max' or 'sum' over the query heads of a kv head.
    first_slots: of the list of a kv head without bounds.
    moments: low and high are sums of keys and of their squares, not bounds.
  """

  reuse: int
  sink: int
  recent: int
  page: int
  group: str
  first_slots: int = 0
  moments: bool = False

  @property
  def new_pages(self) -> int:
    """Pages that may begin before the next choice."""
    return -(-(self.reuse - 1) // self.page)


def serves(q, low, starts) -> bool:
  """Whether the default device runs `list_pages` on such arguments."""
  if not dispatch.prefers('gpu'):
    return False
  return gpu.refuse('choose_pages', q, low, low, starts) is None


def scoring(
  q: Float[Array, 'B T N H'],
  low: Float[Array, 'B h C H'],
  starts: Int32[Array, 'B K W'],
  newest: Int32[Array, 'B'],
  valid: Bool[Array, 'B T'],
  count: Int32[Array, 'B'],
  held: Held,
  *,
  rules: Rules,
  loose: Float[Array, 'B h H'] | None = None,
  unscored: Bool[Array, 'K'] | None = None,
) -> gpu.Scoring:
  """The scores that a choice is made by, where one is due: work of a launch.

  Args:
    q: as in `choose_pages`, like all that is not said here; of it, `low` and
      `starts` the shapes count.
    low: see there.
    starts: see there.
    newest: position of each row's newest token.
    valid: which queries count.
    count: how many do, a row.
    held: the choice until now; all rows choose when one's is due.
    rules: static numbers.
    loose: see there.
    unscored: kv heads without bounds.
  """
  since = gpu.Served(held.newest, held.age, newest, count, rules.reuse)
  call = gpu.Call(valid, unscored, since)
  return gpu.Scoring.of(
    q,
    low,
    starts,
    newest,
    call,
    n=held.slots.shape[2],
    page=rules.page,
    group=rules.group,
    loose=loose,
    moments=rules.moments,
  )


def list_pages(
  q: Float[Array, 'B T N H'],
  low: Float[Array, 'B h C H'],
  high: Float[Array, 'B h C H'],
  table: Table,
  count: Int32[Array, 'B'],
  held: Held,
  work: gpu.Scoring,
  *,
  rules: Rules,
  scored: tuple[Float[Array, 'B h W'], gpu.Call] | None = None,
  interpret: bool = False,
) -> tuple[Int32[Array, 'B K m'], Int32[Array, 'B K m'], Held]:
  """The pages that rows attend to, after a choice where one is due.

  Args:
    q: rotated queries.
    low: as in `choose_pages`.
    high: see there.
    table: of the rows; the new tokens are in it.
    count: as in `scoring`.
    held: see there.
    work: of `scoring`.
    rules: static numbers.
    scored: what `work` found in another launch; None: it gets one here.
    interpret: runs on the CPU, for tests.

  Returns:
    (ids, starts, held): -1 and NEVER where the list has no page; `held` in the
    place of the old one.
  """
  if scored is None:
    scored = gpu.page_scores(q, low, high, work, interpret=interpret)
  return _list(*scored, table, work.newest, count, held, rules, interpret)


def _list(scores, call, table, newest, count, held, rules, interpret):
  """Chooses by the scores where it is due, lists, and counts on."""
  (b, kv, n), rows = held.slots.shape, scores.shape[1]
  m = n + rules.new_pages
  if call.unscored is not None:
    m = max(m, rules.first_slots)
  operands = [scores, *table, newest, count, *call.given()]

  def kernel(*refs):
    scores_ref, ids_of, starts_of, used, newest, count, *rest = refs
    own = call.read(rest)
    old_slots, old_newest, old_age, *rest = rest[len(call.given()) :]
    new_slots, new_newest, new_age, ids_ref, starts_ref = rest
    head, b_at = pl.program_id(0), pl.program_id(1)
    row, now = own.row_of(head, rows), own.chooses(b_at)
    always = gpu.Always(starts_of, newest, rules.sink, rules.recent, rules.page)

    def put(ref, place, value, mask):
      # Other lanes point behind the end: interpreted, they write, too.
      place = jnp.where(mask, place, ref.shape[2])
      plgpu.store(ref.at[b_at, head, place], value, mask=mask)

    def enter(place, slot, real, mask, after=None):
      """The page in `slot` at `place`, if real (and it starts late enough)."""
      at = b_at, head, jnp.where(real, slot, 0)
      start = plgpu.load(starts_of.at[at], mask=real, other=NEVER)
      page = plgpu.load(ids_of.at[at], mask=real, other=-1)
      if after is not None:
        start = jnp.where(start > after, start, NEVER)
      put(ids_ref, place, jnp.where(start < NEVER, page, -1), mask)
      put(starts_ref, place, start, mask)

    def empty(refs, begin, end):
      place = _lanes(end)
      for ref, none in refs:
        value = jnp.full(place.shape, none, jnp.int32)
        put(ref, place, value, (place >= begin) & (place < end))

    listed = (ids_ref, -1), (starts_ref, NEVER)

    @pl.when(now & (row >= 0))
    def _():
      found, total = gpu.best_slots(scores_ref, always, b_at, row, head, n)
      for slot, taken, at in found:
        put(new_slots, at, slot, taken)
        enter(at, slot, taken, taken)
      empty([(new_slots, -1), *listed], total, n)

    @pl.when(now & (row < 0))
    def _():
      empty([(new_slots, -1)], 0, n)

    @pl.when(~now & (row >= 0))
    def _():
      place = _lanes(n)
      slot = plgpu.load(
        old_slots.at[b_at, head, place], mask=place < n, other=-1
      )
      enter(place, slot, slot >= 0, place < n)

    @pl.when(row >= 0)
    def _():
      # Since the choice of now, none began.
      since = jnp.where(now, newest[b_at], old_newest[b_at])
      if rules.new_pages:
        i = _lanes(rules.new_pages)
        slot = lax.div(used[b_at] + (rules.page - 1), rules.page) - 1 - i
        real = (i < rules.new_pages) & (slot >= 0)
        enter(n + i, slot, real, i < rules.new_pages, after=since)
      if m > n + rules.new_pages:
        empty(listed, n + rules.new_pages, m)

    @pl.when(row < 0)
    def _():
      place = _lanes(m)
      enter(place, place, place < rules.first_slots, place < m)

    # Programs of other heads read `since` only where it stays.
    @pl.when((head == 0) & now)
    def _():
      new_newest[b_at] = newest[b_at]

    @pl.when(head == 0)
    def _():
      age = jnp.where(now, 0, old_age[b_at]) + count[b_at]
      new_age[b_at] = jnp.minimum(age, LONG_AGO)

  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in held]
  shapes += [jax.ShapeDtypeStruct((b, kv, m), jnp.int32)] * 2
  *moved, ids, starts = pl.pallas_call(
    kernel,
    out_shape=shapes,
    grid=(kv, b),
    input_output_aliases={len(operands) + i: i for i in range(len(held))},
    compiler_params=plgpu.CompilerParams(num_warps=gpu.SIZES.warps),
    interpret=interpret,
    name='list_pages',
  )(*operands, *held)
  return ids, starts, Held(*moved)


def _lanes(n: int) -> jax.Array:
  """0, 1, ... to a power of 2: Triton's arrays have no other size."""
  return lax.broadcasted_iota(jnp.int32, (1 << (n - 1).bit_length(),), 0)
