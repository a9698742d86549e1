"""TokenSelect against the paper's sections in plain numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lcx import methods, sharding
from lcx.cache import CacheShape, Dense, Shards
from lcx.methods.base import Context, Tail
from lcx.methods.tokenselect import TokenSelectDecode, TokenSelectPrefill
from lcx.models import transformer
from lcx.models.presets import PRESETS
from lcx.models.rope import frequencies
from lcx.select import chunk_votes

CONFIG = dataclasses.replace(PRESETS['tiny'], dtype='float32')
ROPE = transformer.make_rope(CONFIG)
HEADS, KV_HEADS, DIM = CONFIG.n_heads, CONFIG.n_kv_heads, CONFIG.head_dim
GROUP = HEADS // KV_HEADS
LENGTH = 256  # of the prompt
SMALL = {'k': 20, 'sink': 4, 'local': 32}


def draw(seed, length=LENGTH, batch=1):
  """Unrotated q [B T N H] and k, v [B T K H]."""
  rng = np.random.default_rng(seed)

  def normal(heads):
    x = rng.normal(size=(batch, length, heads, DIM))
    return jnp.asarray(x, jnp.float32)

  return normal(HEADS), normal(KV_HEADS), normal(KV_HEADS)


def context(positions, count, tail=None, trace=True, room=0):
  positions = jnp.asarray(positions, jnp.int32)
  length = positions.shape[1]
  count = jnp.asarray(count, jnp.int32)
  return Context(
    positions=positions,
    valid=jnp.arange(length) < count[:, None],
    source=positions,
    lengths=positions[:, 0] + count,
    layer=jnp.int32(0),
    key=jax.random.key(0),
    room=room,
    trace=trace,
    **({} if tail is None else {'tail': tail}),
  )


def alone(function):
  """Runs it where collectives have their axes: on a mesh of one device."""
  return jax.jit(
    jax.shard_map(
      function,
      mesh=sharding.make_mesh(1, 1, 1),
      in_specs=P(),
      out_specs=P(),
      check_vma=False,
    )
  )


def rotated(x, positions):
  """x [n heads H] at positions [n], in float64."""
  angle = np.asarray(positions)[:, None, None] * frequencies(CONFIG.rope, DIM)
  a, b = np.split(np.float64(x), 2, axis=-1)
  cos, sin = np.cos(angle), np.sin(angle)
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


# The paper's method for one row.


def chosen(asked, keys, low, high, part):
  """Section 5.1: k tokens of [low, high), ascending."""
  votes = np.zeros(high)
  order = part.voters or range(HEADS)
  for place, h in enumerate(order):
    much = 1.0 if part.heads == 'equal' else np.linalg.norm(asked[h])
    scores = keys[:high, place // GROUP] @ asked[h]
    scores *= 1.0 if part.logits == 'raw' else DIM**-0.5
    some = scores[low:]
    if part.vote == 'top_k':
      votes[low:] += much * some
    elif part.vote == 'head_vote':
      votes[low + np.argsort(-some, kind='stable')[: part.k]] += much
    elif len(some):
      weight = np.exp(some - some.max())
      votes[low:] += much * weight / weight.sum()
  if part.pool > 1:
    padded = np.pad(votes[low:], part.pool // 2, constant_values=-np.inf)
    if high > low:
      windows = np.lib.stride_tricks.sliding_window_view(padded, part.pool)
      votes[low:] = windows.max(1)
  order = np.argsort(-votes[low:], kind='stable')[: part.k]
  return sorted(low + order)


def attend(q, k, v, at_q, at_k):
  """One query [N H] over keys and values [n K H], at these positions."""
  q, k = rotated(q[None], [at_q])[0], rotated(k, at_k)
  out = np.zeros((HEADS, DIM))
  for h in range(HEADS):
    scores = k[:, h // GROUP] @ q[h] * DIM**-0.5
    weight = np.exp(scores - scores.max())
    out[h] = weight / weight.sum() @ np.float64(v[:, h // GROUP])
  return out


def frames(q, k, begin, part):
  """What is scored: (queries of a chunk, all keys)."""
  if part.positions == 'rank':
    return rotated(q, part.local + np.arange(len(q))), np.float64(k)
  return rotated(q, begin + np.arange(len(q))), rotated(k, np.arange(len(k)))


def expected_prefill(q, k, v, part):
  q, k, v = (np.asarray(x[0], np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  for begin in range(0, len(q), part.chunk):
    asked, keys = frames(q[begin : begin + part.chunk], k, begin, part)
    if part.merge == 0:  # all neighbours are alike
      alone = part.merged // part.chunk * part.chunk
      first = begin // alone * alone
      asked, _ = frames(q[first : first + alone], k, first, part)
    if part.pooling == 'l2':
      norm = np.linalg.norm(asked, axis=-1, keepdims=True)
      asked = (asked * norm).sum(0) / norm.sum(0)
    else:
      asked = asked.mean(0)
    high = max(begin + part.chunk - part.local, 0)
    low = min(part.sink, high)
    ids = [*range(low), *chosen(asked, keys, low, high, part)]
    for t in range(begin, begin + part.chunk):
      seen = np.array([*ids, *range(high, t + 1)])
      if part.positions == 'rank':
        where = len(seen) - 1, np.arange(len(seen))
      else:
        where = t, seen
      out[t] = attend(q[t], k[seen], v[seen], *where)
  return out


@pytest.mark.parametrize(
  ('fields', 'once'),
  [
    pytest.param({}, True, marks=pytest.mark.long),
    ({'positions': 'rank', 'logits': 'scaled', 'k': 40}, False),
    pytest.param({'vote': 'top_k', 'local': 64}, False, marks=pytest.mark.long),
    ({'vote': 'head_vote', 'pooling': 'l2'}, True),
    ({'pool': 3, 'heads': 'energy', 'local': 64}, False),
    ({'merge': 0.0, 'merged': 64, 'voters': (0, 2, 1, 3)}, True),
  ],
  ids=str,
)
def test_prefill_is_the_papers(fields, once, monkeypatch):
  if not once:  # as for a prompt whose logits do not fit
    monkeypatch.setattr(chunk_votes, 'ONCE_SCORES', 0)
  part = TokenSelectPrefill(chunk=32, **SMALL | fields)
  part.check(CONFIG, LENGTH)
  q, k, v = draw(0)
  if part.merge == 0:
    q = q + 2  # every cosine is above 0

  def run(q, k, v):
    cache = Dense().init(CacheShape(1, KV_HEADS, DIM, LENGTH, 'float32'))
    ctx = context(jnp.arange(LENGTH)[None], [LENGTH], room=LENGTH)
    out, _, trace = part.attend(q, k, v, ROPE, cache, ctx)
    return out, trace.keys

  out, keys = alone(run)(q, k, v)
  want = expected_prefill(q, k, v, part)
  np.testing.assert_allclose(out[0], want, rtol=1e-3, atol=1e-3)
  dense = HEADS * LENGTH * (LENGTH + 1) / 2
  assert 0 < float(keys[0]) < dense / 2


@pytest.mark.xdist_group('mesh')
@pytest.mark.parametrize('fields', [{'chunk': 96}, {'merge': 0.1}], ids=str)
def test_a_chunk_that_two_shards_share_selects_once(fields):
  """The prompt's grid of chunks does not depend on the mesh."""
  fields = {'k': 20, 'sink': 4, 'local': 96, 'chunk': 32, 'merged': 96} | fields
  part = TokenSelectPrefill(**fields)
  q, k, v = draw(1)

  def run(q, k, v):
    length = q.shape[1]
    first = jax.lax.axis_index('seq') * length
    cache = Dense().init(CacheShape(1, k.shape[2], DIM, LENGTH, 'float32'))
    ctx = context(first + jnp.arange(length)[None], [length], room=LENGTH)
    ctx = dataclasses.replace(ctx, lengths=jnp.array([LENGTH]))
    return part.attend(q, k, v, ROPE, cache, ctx)[0]

  def on(mesh):
    spec = P(None, 'seq', 'model')
    sharded = jax.shard_map(
      run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    return jax.jit(sharded)(q, k, v)

  one = on(sharding.make_mesh(1, 1, 1))
  two = on(sharding.make_mesh(1, 2, 2))
  np.testing.assert_allclose(one, two, rtol=2e-4, atol=2e-4)


PROMPT, ROOM = 200, 48


@functools.lru_cache
def programs(part, config, batch, rope):
  """(the prompt's keys into a cache, a step), compiled once."""
  shape = CacheShape(batch, KV_HEADS, DIM, LENGTH, 'float32')

  def begin(q, k, v):
    positions = jnp.tile(jnp.arange(PROMPT)[None], (batch, 1))
    ctx = context(positions, [PROMPT] * batch)
    keys = ROPE(k, ctx.positions) if config.rotated else k
    cache = config.init(shape).append(keys, v, ctx.positions)
    state = part.observe(q, k, v, rope, part.init_state(shape), ctx)
    return cache, part.start(cache, state)

  def step(q, k, v, cache, state, at, count):
    positions = at[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)
    ctx = context(positions, count)
    return part.attend(q, k, v, rope, cache, state, ctx)

  return alone(begin), alone(step)


class Run:
  """Decode of one layer, token by token, on one device."""

  def __init__(self, part, cache=None, seed=0, batch=1, rope=ROPE):
    part.check(CONFIG, LENGTH)
    config = cache or Dense(rotated=part.positions == 'true')
    self.part, self.at = part, PROMPT
    self.q, self.k, self.v = draw(seed, PROMPT + ROOM, batch)
    begin, self._step = programs(part, config, batch, rope)
    self.cache, self.state = begin(
      *(x[:, :PROMPT] for x in (self.q, self.k, self.v))
    )

  def step(self, query=None, tokens=1):
    """The output and counters of the next tokens; `query` [N H] for all."""
    piece = slice(self.at, self.at + tokens)
    q, k, v = (x[:, piece] for x in (self.q, self.k, self.v))
    if query is not None:
      q = jnp.broadcast_to(jnp.asarray(query, jnp.float32), q.shape)
      self.q = self.q.at[:, piece].set(q)
    batch = q.shape[0]
    out, self.cache, self.state, trace = self._step(
      q,
      k,
      v,
      self.cache,
      self.state,
      jnp.full((batch,), self.at, jnp.int32),
      jnp.full((batch,), tokens, jnp.int32),
    )
    self.at += tokens
    return np.asarray(out), {
      n: np.asarray(c) for n, c in trace.counters.items()
    }

  def expected(self, tokens=1):
    """Of the last piece, by a selection at its end; and the list."""
    part, end = self.part, self.at
    q, k, v = (np.asarray(x[0, :end]) for x in (self.q, self.k, self.v))
    begin = end - tokens
    asked, keys = frames(q[begin:], k, begin, part)
    high = max(end - (part.local - part.reuse + 1), 0)
    low = min(part.sink, high)
    ids = [*range(low), *chosen(asked.mean(0), keys, low, high, part)]
    out = []
    for t in range(begin, end):
      seen = np.array([*ids, *range(high, t + 1)])
      where = (t, seen)
      if part.positions == 'rank':
        where = (len(seen) - 1, np.arange(len(seen)))
      out.append(attend(q[t], k[seen], v[seen], *where))
    return np.stack(out), [*ids, *range(high, end)]


@pytest.mark.parametrize(
  'fields',
  [
    pytest.param({'reuse': 1}, marks=pytest.mark.long),
    {'positions': 'rank', 'vote': 'top_k'},
    pytest.param(
      {'scoring': 'pruned', 'vote': 'top_k', 'scored': 64},
      marks=pytest.mark.long,
    ),
    {'scoring': 'pruned', 'scored': 64},
    pytest.param(
      {'scoring': 'budget', 'scored': LENGTH}, marks=pytest.mark.long
    ),
  ],
  ids=str,
)
def test_decode_is_the_papers(fields):
  part = TokenSelectDecode(**SMALL | {'reuse': 2} | fields)
  cache = None
  if part.scoring != 'full':
    cache = Dense(page=8, stats=True)
  run = Run(part, cache)
  for tokens in (5, 1, 1):  # independent queries: each selects
    out, counters = run.step(tokens=tokens)
    want, _ = run.expected(tokens)
    np.testing.assert_allclose(out[0], want, rtol=1e-3, atol=1e-3)
    assert counters['selections'] == 1 and counters['hits'] == 0
    if part.scoring == 'budget':
      assert counters['lost_votes'] < 1e-5
    if part.scoring == 'pruned' and part.vote == 'soft':
      assert counters['fallbacks'] == 1  # bounds of random keys skip nothing


def test_a_repeated_query_hits_and_an_orthogonal_one_selects():
  run = Run(TokenSelectDecode(**SMALL, reuse=8))
  query = np.random.default_rng(9).normal(size=(HEADS, DIM))
  _, counters = run.step(query)
  assert counters['selections'] == 1
  held = int(run.state.working.held[0])
  before = np.asarray(run.state.working.k)[:, :, :held]
  _, ids = run.expected()
  assert held == len(ids)
  out, counters = run.step(query)
  assert counters['hits'] == 1 and counters['selections'] == 0
  # The same list, with the new token behind it.
  np.testing.assert_array_equal(
    np.asarray(run.state.working.k)[:, :, :held], before
  )
  seen = np.array([*ids, run.at - 1])
  k, v = np.asarray(run.k[0]), np.asarray(run.v[0])
  want = attend(query, k[seen], v[seen], run.at - 1, seen)
  np.testing.assert_allclose(out[0, 0], want, rtol=1e-3, atol=1e-3)
  other = np.random.default_rng(10).normal(size=(HEADS, DIM))
  other -= query * (np.sum(query * other) / np.sum(query * query))
  _, counters = run.step(other)
  assert counters['hits'] == 0 and counters['selections'] == 1


def test_a_list_serves_reuse_tokens_and_none_leaves_the_window():
  part = TokenSelectDecode(**SMALL, reuse=8)
  run = Run(part)
  query = np.random.default_rng(9).normal(size=(HEADS, DIM))
  hits = []
  for _ in range(17):
    _, counters = run.step(query)
    hits.append(int(counters['hits'][0]))
    # Sink, list and every token since: at most the three budgets.
    assert int(run.state.working.held[0]) <= part.width
  assert hits == [0, *[1] * 7] * 2 + [0]


def test_rows_keep_their_own_lists():
  """A row that must select does not change another's answer."""
  part = TokenSelectDecode(**SMALL, reuse=8)
  both, one = Run(part, batch=2, seed=4), Run(part, batch=2, seed=4)
  query = np.random.default_rng(9).normal(size=(2, 1, HEADS, DIM))
  for run in (both, one):
    run.step(query)
  turned = query.copy()
  turned[1] *= -1
  out, counters = both.step(turned)
  same, _ = one.step(query)
  np.testing.assert_array_equal(counters['hits'], [1, 0])
  np.testing.assert_allclose(out[0], same[0], rtol=1e-5, atol=1e-6)


def test_a_cut_row_selects_anew():
  run = Run(TokenSelectDecode(**SMALL, reuse=8))
  query = np.random.default_rng(9).normal(size=(HEADS, DIM))
  for _ in range(3):
    run.step(query)
  run.at -= 2
  run.cache = run.cache.truncate(jnp.array([run.at], jnp.int32))
  _, counters = run.step(query)
  assert counters['selections'] == 1


def spied(highest):
  """The rotation, which notes the highest position it is given."""

  def rope(x, positions):
    jax.debug.callback(lambda p: highest.append(int(p)), jnp.max(positions))
    return ROPE(x, positions)

  return rope


def test_extrapolation_keeps_positions_short_in_prefill():
  """Every position that is rotated to, in attention and in scoring."""
  highest = []
  part = TokenSelectPrefill(chunk=32, positions='rank', **SMALL | {'k': 40})
  part.check(CONFIG, LENGTH)
  q, k, v = draw(0)

  def run(q, k, v):
    config = Dense(rotated=False)
    cache = config.init(CacheShape(1, KV_HEADS, DIM, LENGTH, 'float32'))
    ctx = context(jnp.arange(LENGTH)[None], [LENGTH], room=LENGTH)
    return part.attend(q, k, v, spied(highest), cache, ctx)[0]

  jax.block_until_ready(alone(run)(q, k, v))
  jax.effects_barrier()
  assert highest and max(highest) < part.width < LENGTH


def test_extrapolation_keeps_positions_short_in_decode():
  highest = []
  part = TokenSelectDecode(positions='rank', reuse=8, **SMALL)
  run = Run(part, rope=spied(highest))
  for tokens in (5, 1, 1):
    run.step(tokens=tokens)
  query = np.random.default_rng(9).normal(size=(HEADS, DIM))
  for _ in range(9):  # hits add tokens up to the whole window
    run.step(query)
  jax.effects_barrier()
  assert highest and max(highest) == part.width - 1 < run.at


def test_extrapolation_at_full_budget_is_dense():
  part = TokenSelectDecode(positions='rank', **SMALL).at_full_budget(LENGTH)
  run = Run(part)
  run.step()
  out, _ = run.step()
  q, k, v = (np.asarray(x[0, : run.at]) for x in (run.q, run.k, run.v))
  want = attend(q[-1], k, v, run.at - 1, np.arange(run.at))
  np.testing.assert_allclose(out[0, 0], want, rtol=1e-3, atol=1e-3)


@pytest.mark.xdist_group('mesh')
@pytest.mark.parametrize(
  'fields',
  [
    pytest.param({'positions': 'rank'}, marks=pytest.mark.long),
    pytest.param(
      {'scoring': 'pruned', 'vote': 'top_k', 'scored': 64},
      marks=pytest.mark.long,
    ),
    # test_conformance shards the default in the default run.
    pytest.param(
      {'scoring': 'budget', 'scored': 64, 'score_bits': 8},
      marks=pytest.mark.long,
    ),
  ],
  ids=str,
)
def test_shards_decode_as_one_device(fields):
  """Row 0 hits while row 1 selects, on another data shard or on the same."""
  part = TokenSelectDecode(**SMALL, reuse=4, **fields)
  rotates = part.positions == 'true'
  config = Dense(page=8, stats=True, rotated=rotates)
  prompt, steps = 128, 3
  q, k, v = draw(6, prompt + 5 + steps, batch=2)
  q = q.at[0, prompt + 5 :].set(q[0, prompt + 5])

  def on(*shards):
    mesh, rows = sharding.make_mesh(*shards), 2 // shards[0]
    shape = CacheShape(
      2, KV_HEADS, DIM, 2 * LENGTH, 'float32', shards=Shards(*shards)
    )

    def run(cache, state, before, after):
      length = before[0].shape[1]
      first = jax.lax.axis_index('seq') * length
      first = jnp.full((rows, 1), first)
      ctx = context(first + jnp.arange(length), [length] * rows)
      bk = ROPE(before[1], ctx.positions) if rotates else before[1]
      cache = cache.append(bk, before[2], ctx.positions)
      state = part.observe(*before, ROPE, state, ctx)
      state = part.start(cache, state)
      tail = Tail(
        jnp.full((rows,), shards[1] - 1, jnp.int32),
        jnp.full((rows,), prompt, jnp.int32),
      )

      def step(carry, piece):
        cache, state, at = carry
        tokens = piece[0].shape[1]
        positions = at[:, None] + jnp.arange(tokens)
        ctx = context(positions, [tokens] * rows, tail)
        ctx = dataclasses.replace(ctx, lengths=at + tokens)
        out, cache, state, _ = part.attend(*piece, ROPE, cache, state, ctx)
        return (cache, state, at + tokens), (out, state.working.age)

      carry = cache, state, jnp.full((rows,), prompt, jnp.int32)
      carry, (first, _) = step(carry, tuple(x[:, :5] for x in after))
      rest = tuple(x[:, 5:, None].swapaxes(0, 1) for x in after)
      _, (outs, ages) = jax.lax.scan(step, carry, rest)
      return jnp.concatenate([first, outs[:, :, 0].swapaxes(0, 1)], 1), ages

    heads = P('data', 'seq', 'model')
    whole = P('data', None, 'model')
    axes = Context.__dataclass_fields__['axes'].default_factory()
    sharded = jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(config.specs(), part.state_specs(axes), heads, whole),
      out_specs=(whole, P(None, 'data')),
      check_vma=False,
    )
    out, ages = jax.jit(sharded)(
      config.init(shape),
      part.init_state(shape),
      tuple(x[:, :prompt] for x in (q, k, v)),
      tuple(x[:, prompt:] for x in (q, k, v)),
    )
    np.testing.assert_array_equal(ages, [[0, 0], [1, 0], [2, 0]])
    return out

  want, got = on(1, 1, 1), on(2, 2, 2)
  np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
  ('part', 'fields', 'reason'),
  [
    ('prefill', {'local': 64}, 'must hold the chunk'),
    ('prefill', {'pool': 4}, 'must be odd'),
    ('prefill', {'chunk': 96}, 'multiple or a divisor'),
    ('prefill', {'k': 0}, 'must be at least 1'),
    ('prefill', {'k': LENGTH + 1}, 'above the 256 tokens of the context'),
    ('prefill', {'positions': 'rank', 'sink': 0}, 'votes at local and beyond'),
    ('prefill', {'merge': 2.0}, 'merge=2.0 must be within'),
    ('prefill', {'merged': 64}, 'must be at least chunk=128'),
    ('prefill', {'heads': 'some'}, 'heads='),
    ('prefill', {'voters': (0, 0, 1, 2)}, 'each of the 4 query heads once'),
    ('decode', {'k': LENGTH + 1}, 'above the 256 tokens of the context'),
    ('decode', {'score_bits': 4}, 'must be 8 or 16'),
    ('decode', {'scoring': 'pruned', 'score_bits': 8}, 'no certificate can'),
    ('decode', {'pool': 2}, 'must be odd'),
    ('decode', {'threshold': 1.5}, 'within 0 and 1'),
    ('decode', {'threshold': -0.1}, 'within 0 and 1'),
    ('decode', {'reuse': 0}, 'at least 1'),
    ('decode', {'local': 16, 'reuse': 8}, 'tokens to come'),
    ('decode', {'vote': 'loud'}, 'vote='),
    ('decode', {'scoring': 'pruned', 'pool': 3}, 'pooled votes'),
    ('decode', {'scoring': 'pruned', 'vote': 'head_vote'}, 'no certificate'),
    ('decode', {'scoring': 'budget', 'scored': 8}, 'at least k='),
  ],
  ids=str,
)
def test_bad_numbers_are_refused(part, fields, reason):
  part = getattr(methods.get_method('tokenselect'), part)
  part = dataclasses.replace(part, k=64)
  if isinstance(part, TokenSelectPrefill):
    part = dataclasses.replace(part, chunk=128, local=128)
  with pytest.raises(ValueError, match=reason):
    dataclasses.replace(part, **fields).check(CONFIG, LENGTH)


def test_models_that_do_not_fit_are_refused():
  part = TokenSelectDecode(positions='rank', k=64)
  config = dataclasses.replace(CONFIG, sliding_window=64)
  with pytest.raises(ValueError, match='sliding_window=64'):
    part.check(config, LENGTH)

  class WithoutRope:
    sliding_window = None
    rope = None

  with pytest.raises(ValueError, match='no rotary positions'):
    part.check(WithoutRope(), LENGTH)


def test_int8_copies_choose_almost_what_keys_choose():
  """Logits within a copy's rounding; the list is another only at its edge."""
  run = Run(TokenSelectDecode(**SMALL, reuse=1, score_bits=8, logits='scaled'))
  lost = []
  for _ in range(4):
    _, counters = run.step(tokens=3)
    lost.append(float(counters['lost_votes'][0]))
    copies = run.state.copies
    keys = np.asarray(run.cache.k)[:, :, : run.at]
    codes = np.asarray(copies.codes)[:, :, : run.at]
    scale = np.asarray(copies.scale)[:, :, : run.at]
    error = np.abs(codes * scale[..., None] - keys)
    assert np.all(error <= 0.51 * scale[..., None])  # the new tokens', too
  assert max(lost) < 0.01


def test_the_cache_must_keep_what_is_asked_for():
  with pytest.raises(ValueError, match='unrotated'):
    methods.get_method('tokenselect', **{'decode.positions': 'rank'})
  with pytest.raises(ValueError, match='bounds'):
    methods.get_method('tokenselect', **{'decode.scoring': 'budget'})
  fields = {'decode.scoring': 'budget', 'cache.page': 16, 'cache.stats': True}
  assert methods.get_method('tokenselect', **fields)
