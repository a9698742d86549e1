"""What every block selector promises, and XAttention against its definition."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas.block_sparse import reference
from lcx.select import audit, window
from lcx.select.sparge import sparge
from lcx.select.vertical_slash import _sums, vertical_slash
from lcx.select.xattention import xattention

BATCH, LENGTH, HEADS, KV_HEADS, DIM = 2, 256, 4, 2, 8
BLOCK = 16
LENGTHS = (256, 201)


def draw(seed: int = 0, length: int = LENGTH):
  """Queries [B T N H] and keys [B K S H] whose blocks differ in weight."""
  rng = np.random.default_rng(seed)
  drift = rng.normal(size=(BATCH, length // BLOCK, 1, 1, DIM))
  k = rng.normal(size=(BATCH, length // BLOCK, BLOCK, KV_HEADS, DIM)) / 2
  k = (k + drift).reshape(BATCH, length, KV_HEADS, DIM).swapaxes(1, 2)
  drift = rng.normal(size=(BATCH, length // BLOCK, 1, 1, DIM)) * 2
  q = rng.normal(size=(BATCH, length // BLOCK, BLOCK, HEADS, DIM))
  q = (q + drift).reshape(BATCH, length, HEADS, DIM)
  return jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32)


def slashes(
  q, k, *, q_start, lengths, columns, diagonals=5, n_queries=None, **kwargs
):
  """vertical_slash from the whole prompt's queries."""
  at = q_start[:, None] + jnp.arange(q.shape[1])
  last, last_at = window.last_queries(q, at, at < lengths[:, None], 8)
  return vertical_slash(
    last,
    last_at,
    k,
    n_queries=n_queries or q.shape[1],
    q_start=q_start,
    lengths=lengths,
    columns=columns,
    diagonals=diagonals,
    sink=2,
    recent=4,
    **kwargs,
  )


# name -> (selector with a budget left open, the budget's name, its full value)
SELECTORS = {
  'xattention': (functools.partial(xattention, stride=4), 'threshold', 1.0),
  'fixed': (functools.partial(xattention, stride=8), 'density', 1.0),
  'grouped': (
    functools.partial(xattention, stride=4, per='group'),
    'threshold',
    1.0,
  ),
  'sparge': (functools.partial(sparge, similarity=0.3), 'threshold', 1.0),
  'vertical_slash': (slashes, 'columns', LENGTH),
}
EVERY = pytest.mark.parametrize(
  'name', [name for name in SELECTORS if name != 'grouped']
)


@functools.cache
def compiled(name: str, budget: float, **static):
  select, field, full = SELECTORS[name]
  value = full * budget
  if name == 'vertical_slash':  # keys: what is a small share marks all blocks
    value = full if budget == 1 else int(64 * budget**2)

  @jax.jit
  def run(q, k, q_start, lengths):
    return select(
      q,
      k,
      q_start=q_start,
      lengths=lengths,
      block_q=BLOCK,
      block_k=BLOCK,
      **{field: value},
      **static,
    )

  return run


def select(name, q, k, budget=0.5, lengths=LENGTHS, q_start=0, **static):
  lengths = jnp.asarray(lengths, jnp.int32)
  start = jnp.full(lengths.shape, q_start, jnp.int32)
  return compiled(name, budget, **static)(q, k, start, lengths)


def sets(blocks):
  """{(b, n, i): the list} of rows as tuples."""
  ids, count = np.asarray(blocks.ids), np.asarray(blocks.count)
  return {at: tuple(ids[at][: count[at]]) for at in np.ndindex(*count.shape)}


@pytest.mark.parametrize('name', SELECTORS)
@pytest.mark.parametrize('q_start', [0, 40])
def test_lists_are_causal_sorted_and_hold_sink_and_diagonal(name, q_start):
  q, k = draw(1)
  found = select(name, q[:, q_start:], k, q_start=q_start)
  lists, causal = sets(found.blocks), 0
  for (b, _, i), row in lists.items():
    first = q_start + i * BLOCK
    last = min(first + BLOCK, LENGTHS[b]) - 1
    if first > last:
      assert row == ()
      continue
    causal += last // BLOCK + 1
    assert list(row) == sorted(set(row)) and row[0] == 0
    assert row[-1] == last // BLOCK and first // BLOCK in row
  assert sum(map(len, lists.values())) < 0.9 * causal
  assert np.all(np.asarray(found.captured) <= 1 + 1e-5)
  assert not np.asarray(found.cut).any()


@EVERY
def test_full_budget_lists_every_causal_block(name):
  q, k = draw(3)
  found = select(name, q, k, budget=1)
  for (b, _, i), row in sets(found.blocks).items():
    last = min((i + 1) * BLOCK, LENGTHS[b]) - 1
    want = range(last // BLOCK + 1) if i * BLOCK <= last else ()
    assert row == tuple(want)


@EVERY
@hypothesis.settings(max_examples=12)
@hypothesis.given(seed=st.integers(0, 2**20))
def test_captured_mass_never_falls_as_the_budget_grows(name, seed):
  """What the selector estimates, and the softmax's own mass."""
  q, k = draw(seed)
  whole = block_mass(q, k)
  found = [select(name, q, k, budget) for budget in (0.5, 0.8, 1)]
  captured = np.stack([x.captured for x in found])
  shapes = *captured.shape[1:], LENGTH // BLOCK
  marked = [np.zeros(shapes, bool) for _ in found]
  for mask, x in zip(marked, found):
    for at, row in sets(x.blocks).items():
      mask[*at, list(row)] = True
  exact = np.stack([(whole * mask).sum(-1) for mask in marked])
  for small, large in itertools.pairwise(marked):
    assert np.all(small <= large)
  alive = np.asarray(found[0].blocks.count) > 0
  for mass in captured[:, alive], exact[:, alive]:
    assert np.all(np.diff(mass, axis=0) >= -1e-6)
    assert mass[0].mean() + 0.02 < mass[2].mean()
    np.testing.assert_allclose(mass[2], 1, atol=1e-5)


@jax.jit
def block_mass(q, k):
  """Softmax mass of key blocks, a mean over a block's queries: [B N Tb Sb]."""
  score = jnp.einsum('btngh,bnsh->bngts', q.reshape(*q.shape[:2], 2, 2, -1), k)
  at, lengths = jnp.arange(LENGTH), jnp.asarray(LENGTHS)
  valid = at[None] < lengths[:, None]  # [B T]
  score = jnp.where(at <= at[:, None], score * DIM**-0.5, -jnp.inf)
  weight = jax.nn.softmax(score) * valid[:, None, None, :, None]
  tiles = LENGTH // BLOCK
  shape = (BATCH, HEADS, tiles, BLOCK, tiles, BLOCK)
  count = jnp.maximum(valid.reshape(BATCH, 1, tiles, 1, BLOCK).sum(-1), 1)
  return weight.reshape(shape).sum((3, 5)) / count


@EVERY
def test_padding_and_batch_order_do_not_matter(name):
  q, k = draw(4)
  want = select(name, q, k)
  junk = jnp.asarray(np.random.default_rng(9).normal(size=q.shape) * 50)
  at = jnp.arange(LENGTH)
  lengths = jnp.asarray(LENGTHS)[:, None]
  loud_q = jnp.where((at < lengths)[..., None, None], q, junk)
  loud_k = jnp.where(
    (at < lengths)[:, None, :, None], k, junk[:, :, :KV_HEADS].swapaxes(1, 2)
  )
  loud = select(name, loud_q, loud_k)
  assert sets(loud.blocks) == sets(want.blocks)
  swapped = select(name, q[::-1], k[::-1], lengths=LENGTHS[::-1])
  for (b, n, i), row in sets(swapped.blocks).items():
    assert row == sets_at(want, 1 - b, n, i)


def sets_at(found, b, n, i):
  return tuple(
    np.asarray(found.blocks.ids[b, n, i, : found.blocks.count[b, n, i]])
  )


@EVERY
def test_chunked_prefill_equals_the_whole(name):
  q, k = draw(5)
  whole = sets(select(name, q, k).blocks)
  late = sets(select(name, q[:, 96:], k, q_start=96).blocks)
  for (b, n, i), row in late.items():
    assert row == whole[b, n, i + 96 // BLOCK]


@EVERY
def test_an_early_chunk_needs_no_later_key(name):
  """But for vertical_slash, which the prompt's last queries decide."""
  q, k = draw(15)
  whole = sets(select(name, q, k).blocks)
  if name == 'vertical_slash':
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    start = jnp.zeros(BATCH, jnp.int32)
    early = jax.jit(
      functools.partial(
        slashes,
        n_queries=96,
        columns=16,
        block_q=BLOCK,
        block_k=BLOCK,
      )
    )(q, k, q_start=start, lengths=lengths)
    # Its own last queries, as if the prompt ended with it, say another thing.
    alone = sets(select(name, q, k, lengths=(96, 96)).blocks)
    assert any(row != alone[at] for at, row in sets(early.blocks).items())
  else:
    early = select(name, q[:, :96], k[:, :, :96], lengths=(96, 96))
  for at, row in sets(early.blocks).items():
    assert row == whole[at]


@EVERY
def test_small_pieces_give_the_same_lists(name, monkeypatch):
  """Chunks, tiles and key ranges as at 1M tokens, moved back at the end."""
  q, k = draw(13)
  want = select(name, q, k)
  for module, sizes in (
    ('lcx.select.xattention', {'_ROWS': 48}),
    (
      'kernels_pallas.block_scores.xla',
      {'_TILE': 32 * 4 * 8 * 3, '_RUNG': 8},
    ),
    ('lcx.select.sparge', {'_KEPT': BATCH * HEADS * 16 * 5, '_PIECE': 256}),
    (
      'lcx.select.vertical_slash',
      {'_KEPT': BATCH * HEADS * 16 * 5, '_TILE': 80},
    ),
  ):
    for field, size in sizes.items():
      monkeypatch.setattr(f'{module}.{field}', size)
  got = compiled.__wrapped__(name, 0.5)(
    q, k, jnp.zeros(BATCH, jnp.int32), jnp.asarray(LENGTHS, jnp.int32)
  )
  assert sets(got.blocks) == sets(want.blocks)
  np.testing.assert_allclose(got.captured, want.captured, atol=1e-5)


@EVERY
def test_the_width_bound_holds_and_reports_what_it_cut(name):
  q, k = draw(6)
  want, cut = select(name, q, k, 0.8), select(name, q, k, 0.8, width=4)
  assert cut.blocks.ids.shape[-1] == 4
  lists = sets(cut.blocks)
  for at, row in sets(want.blocks).items():
    assert set(lists[at]) <= set(row) and len(lists[at]) == min(4, len(row))
  lost = np.asarray(cut.cut)
  shorter = np.asarray(cut.blocks.count) < np.asarray(want.blocks.count)
  assert np.all((lost > 0) <= shorter) and lost[shorter].mean() > 0.01
  total = np.asarray(cut.captured) + lost
  np.testing.assert_allclose(total, np.asarray(want.captured), atol=1e-5)


@pytest.mark.parametrize('width', [16, 4])
def test_sparge_counts_blocks_where_no_mean_is_trusted(width):
  """Everything is listed then, and not 0 of its mass captured."""
  q, k = draw(14)
  found = select('sparge', q, k, width=width, similarity=1.0)
  count = np.asarray(found.blocks.count)
  alive = count > 0
  causal = np.minimum(np.arange(16), (np.array(LENGTHS)[:, None] - 1) // 16) + 1
  share = np.minimum(causal, width)[:, None] / causal[:, None]
  share = np.broadcast_to(share, count.shape)[alive]
  np.testing.assert_allclose(found.captured[alive], share, rtol=1e-5)
  np.testing.assert_allclose(found.cut[alive], 1 - share, atol=1e-5)


@EVERY
def test_short_rows_list_everything(name):
  q, k = draw(7)
  mixed = sets(select(name, q, k, dense_below=201).blocks)
  plain = sets(select(name, q, k).blocks)
  for (b, n, i), row in mixed.items():
    last = min((i + 1) * BLOCK, LENGTHS[b]) - 1
    if b == 0:
      assert row == plain[b, n, i]
    elif i * BLOCK <= last:
      assert row == tuple(range(last // BLOCK + 1))


@pytest.mark.xdist_group('mesh')
@pytest.mark.parametrize(
  ('name', 'padded'),
  [
    ('xattention', False),
    ('grouped', False),
    ('fixed', False),
    ('sparge', False),
    # A head at a time, as where 3 blocks are wanted of a shard that has 2.
    pytest.param('fixed', True, marks=pytest.mark.long),
  ],
)
def test_sharded_keys_give_the_unsharded_lists(name, padded, monkeypatch):
  q, k = draw(8)
  whole = select(name, q, k)
  if padded:
    monkeypatch.setattr('lcx.select.xattention._COPIED', 0)
    monkeypatch.setattr('kernels_pallas.block_scores.xla.granule', lambda: 3)
  mesh = jax.make_mesh((8,), ('seq',), axis_types=(jax.sharding.AxisType.Auto,))
  run, budget, _ = SELECTORS[name]

  def piece(q, k, lengths):
    first = jax.lax.axis_index('seq') * q.shape[1]
    found = run(
      q,
      k,
      q_start=jnp.full(lengths.shape, first, jnp.int32),
      lengths=lengths,
      block_q=BLOCK,
      block_k=BLOCK,
      axis='seq',
      **{budget: 0.5},
    )
    return found.blocks.ids, found.blocks.count, found.captured

  rows = P(None, None, 'seq')
  ids, count, captured = jax.jit(
    jax.shard_map(
      piece,
      mesh=mesh,
      in_specs=(P(None, 'seq'), P(None, None, 'seq'), P()),
      out_specs=(rows, rows, rows),
      check_vma=False,
    )
  )(q, k, jnp.asarray(LENGTHS, jnp.int32))
  np.testing.assert_array_equal(count, whole.blocks.count)
  np.testing.assert_array_equal(ids, whole.blocks.ids)
  np.testing.assert_allclose(captured, whole.captured, atol=1e-5)


def antidiagonal_mass(q, k, length: int, stride: int):
  """XAttention's block masses of one head, cell by cell, in float64."""
  mass = np.zeros((LENGTH // BLOCK, LENGTH // BLOCK))
  for i in range(-(-length // stride)):
    score = []
    for j in range(min(i + 1, length // stride)):
      pairs = [
        (i * stride + stride - 1 - u, j * stride + u) for u in range(stride)
      ]
      dots = [q[t] @ k[s] for t, s in pairs if t < length]
      score.append(np.mean(dots) / np.sqrt(DIM))
    weight = np.exp(np.array(score) - np.max(score, initial=-1e9))
    for j, w in enumerate(weight / max(weight.sum(), 1e-30)):
      mass[i * stride // BLOCK, j * stride // BLOCK] += w
  return mass / np.maximum(mass.sum(1, keepdims=True), 1e-30)


def test_xattention_is_its_definition():
  q, k = draw(10)
  found = select('xattention', q, k)
  lists, captured = sets(found.blocks), np.asarray(found.captured)
  for b, n in np.ndindex(BATCH, HEADS):
    head = np.asarray(q[b, :, n], np.float64)
    keys = np.asarray(k[b, n // 2], np.float64)
    mass = antidiagonal_mass(head, keys, LENGTHS[b], 4)
    for i in range(-(-LENGTHS[b] // BLOCK)):
      want = {0, (min((i + 1) * BLOCK, LENGTHS[b]) - 1) // BLOCK}
      for j in np.argsort(-mass[i], kind='stable'):
        if mass[i, sorted(want)].sum() >= 0.5:
          break
        want.add(int(j))
      assert set(lists[b, n, i]) == want
      np.testing.assert_allclose(
        captured[b, n, i], mass[i, sorted(want)].sum(), atol=1e-5
      )


def test_vertical_slash_finds_a_column_and_a_diagonal():
  """All look at key 40; and each query at the one 100 tokens before it."""
  code = np.random.default_rng(0).normal(size=(LENGTH, DIM))
  code *= 8 / np.linalg.norm(code, axis=1, keepdims=True)
  k = np.zeros((1, 1, LENGTH, DIM))
  k[0, 0] = code
  q = np.zeros((1, LENGTH, 2, DIM))
  q[0, :, 0] = code[40]
  q[0, 100:, 1] = code[:-100]
  run = functools.partial(
    slashes, columns=4, diagonals=6, block_q=BLOCK, block_k=BLOCK
  )
  found = jax.jit(run)(
    jnp.asarray(q, jnp.float32),
    jnp.asarray(k, jnp.float32),
    q_start=jnp.zeros(1, jnp.int32),
    lengths=jnp.full(1, LENGTH, jnp.int32),
  )
  lists = sets(found.blocks)
  for i in range(8, LENGTH // BLOCK):
    assert 40 // BLOCK in lists[0, 0, i]
    assert (i * BLOCK - 100) // BLOCK in lists[0, 1, i]
    assert (i * BLOCK + BLOCK - 1 - 100) // BLOCK in lists[0, 1, i]


@pytest.mark.parametrize('tile', [256, 48])
def test_vertical_and_slash_sums_are_their_definition(tile, monkeypatch):
  monkeypatch.setattr('lcx.select.vertical_slash._TILE', tile)
  rng = np.random.default_rng(1)
  size, length = 8, 201
  q, k = rng.normal(size=(2, size, DIM)) * 2, rng.normal(size=(LENGTH, DIM))
  at = np.arange(length - size, length)
  vertical, slash = jax.jit(lambda q, k: _sums(q, k, at, length, DIM**-0.5))(
    jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32)
  )
  want = np.zeros((2, 2, LENGTH))
  for g, (r, p) in itertools.product(range(2), enumerate(at)):
    score = k[: p + 1] @ q[g, r] / np.sqrt(DIM)
    weight = np.exp(score - score.max())
    weight /= weight.sum()
    want[0, g, : p + 1] += weight
    want[1, g, : p + 1] += weight[::-1]
  np.testing.assert_allclose(vertical, want[0], atol=1e-5)
  np.testing.assert_allclose(slash, want[1], atol=1e-5)


def test_vertical_slash_estimates_mass_from_its_windows_sums():
  """A block's columns, and offsets by the queries that they lead there."""
  q, k = draw(12)
  found = select('vertical_slash', q, k)
  lists, captured = sets(found.blocks), np.asarray(found.captured)
  for b, n, i in ((0, 0, 15), (0, 3, 9), (1, 1, 12), (1, 2, 4), (1, 0, 0)):
    at = LENGTHS[b] - 8 + np.arange(8)
    score = np.asarray(q[b, at, n] @ k[b, n // 2].T) / np.sqrt(DIM)
    score = np.where(np.arange(LENGTH) <= at[:, None], score, -np.inf)
    weight = np.asarray(jax.nn.softmax(score))
    mass = np.zeros(i + 1)
    for r, s in zip(*np.nonzero(weight)):
      if s // BLOCK <= i:
        mass[s // BLOCK] += weight[r, s]
      for query in range(i * BLOCK, (i + 1) * BLOCK):
        key = query - (at[r] - s)
        if key >= 0:
          mass[key // BLOCK] += weight[r, s] / BLOCK
    want = mass[list(lists[b, n, i])].sum() / mass.sum()
    np.testing.assert_allclose(captured[b, n, i], want, rtol=1e-4)
  assert 0.1 < captured[0].mean() < 0.95


def test_audit_counts_keys_and_mass():
  q, k = draw(11)
  found = select('xattention', q, k)
  start, lengths = jnp.zeros(BATCH, jnp.int32), jnp.asarray(LENGTHS, jnp.int32)
  mass = jax.jit(
    functools.partial(audit.sampled_mass, samples=1024),
    static_argnames='sliding_window',
  )
  attend = jax.jit(
    functools.partial(reference.masked_attention, scale=DIM**-0.5)
  )
  for sliding in (None, 50):
    mask = reference.visible(
      found.blocks, start, lengths, LENGTH, LENGTH, sliding
    )
    seen = audit.listed_keys(found.blocks, start, lengths, sliding)
    np.testing.assert_array_equal(seen, mask.sum((1, 2, 3)))
    part = attend(q, k, k, mask)
    at = jnp.arange(LENGTH)
    whole = (at <= at[:, None]) & (at < lengths[:, None, None, None])
    whole &= at[:, None] < lengths[:, None, None, None]
    if sliding:
      whole &= at > at[:, None] - sliding
    whole = jnp.broadcast_to(whole, mask.shape)
    dense = attend(q, k, k, whole)
    share = jnp.where(part.lse > -jnp.inf, jnp.exp(part.lse - dense.lse), 0.0)
    got = mass(
      q,
      k,
      part.lse,
      q_start=start,
      lengths=lengths,
      sliding_window=sliding,
    )
    np.testing.assert_allclose(got, share.sum((1, 2)), rtol=2e-2)


def test_refusals():
  q, k = draw()
  where = {
    'q_start': jnp.zeros(BATCH, jnp.int32),
    'lengths': jnp.asarray(LENGTHS, jnp.int32),
    'block_q': BLOCK,
    'block_k': BLOCK,
  }
  for select_by, message, kwargs in (
    (xattention, 'stride=3 must divide', {'threshold': 0.5, 'stride': 3}),
    (xattention, r'threshold=0.0 must lie in \(0, 1\]', {'threshold': 0.0}),
    (xattention, r'density=1.5 must lie in \(0, 1\]', {'density': 1.5}),
    (xattention, 'width=0 must be', {'threshold': 0.5, 'width': 0}),
    (xattention, r'threshold\[2\]=1.5 must lie', {'threshold': per_head(1.5)}),
    (xattention, r'threshold\[2\]=0.0 must lie', {'threshold': per_head(0)}),
    (
      xattention,
      r'threshold\[2\]=nan must lie',
      {'threshold': jnp.asarray(per_head(np.nan))},
    ),
    (
      xattention,
      r'shape \(3,\): give one number, or one for each of 4 query heads',
      {'threshold': per_head(0.5)[:3]},
    ),
    (
      xattention,
      'give one of threshold and density, not both',
      {'threshold': per_head(0.5), 'density': 0.5},
    ),
    (xattention, "per='layer' must be", {'threshold': 0.5, 'per': 'layer'}),
    (sparge, r'threshold=2 must lie in \(0, 1\]', {'threshold': 2}),
    (sparge, 'similarity=3 must lie', {'threshold': 0.5, 'similarity': 3}),
    (sparge, 'width=0 must be', {'threshold': 0.5, 'width': 0}),
    (slashes, 'columns=0 and', {'columns': 0}),
    (slashes, 'width=0 must be', {'columns': 9, 'width': 0}),
  ):
    with pytest.raises(ValueError, match=message) as error:
      select_by(q, k, **where, **kwargs)
    assert '\n' not in str(error.value)


def per_head(third) -> np.ndarray:
  return np.array([0.5, 0.5, third, 0.5], np.float32)
