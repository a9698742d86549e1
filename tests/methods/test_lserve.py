"""LServe: which keys its heads see, step by step, against plain numpy."""

import dataclasses
import functools
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas.page_choice import kv_page_scores
from lcx import head_profile, methods, sharding
from lcx.cache import CacheShape
from lcx.engine import Engine
from lcx.head_profile import HeadProfile
from lcx.methods.base import Context
from lcx.methods.lserve import LServeDecode, LServePrefill, TwoWayPaged
from lcx.models import transformer
from lcx.models.presets import PRESETS
from lcx.select.reused_pages import Choice

K, G, H, PAGE = 2, 2, 8, 8
HEADS = K * G
CAPACITY = 256
# Head 1 streams: sink 8, recent 12.
CACHE = TwoWayPaged(
  page=PAGE,
  logical_page=4,
  ring_heads=((False, True),),
  sink=8,
  recent=12,
  slack=4,
)
DECODE = LServeDecode(budget=48, sink=4, recent=12, reuse=4, crossover=0)
MESH = sharding.make_mesh()


@jax.jit  # a program a shape, not one an operation
def rope(x, positions):
  """A rotation of channel pairs, enough to notice a wrong position."""
  angle = positions[:, :, None, None] * 0.1 ** jnp.arange(H // 2)
  a, b = x[..., : H // 2], x[..., H // 2 :]
  c, s = jnp.cos(angle), jnp.sin(angle)
  return jnp.concatenate([a * c - b * s, b * c + a * s], -1)


def context(lengths, count, n):
  steps = jnp.arange(n, dtype=jnp.int32)
  return Context(
    positions=(lengths - count)[:, None] + steps,
    valid=steps < count[:, None],
    source=(lengths - count)[:, None] + steps,
    lengths=lengths,
    layer=jnp.int32(0),
    key=jax.random.key(0),
    trace=True,
  )


@functools.partial(jax.jit, static_argnames=('decode',))
def step(q, k, v, cache, state, lengths, count, decode=DECODE):
  """One decode call; `lengths` include it."""

  def run(*args):
    q, k, v, cache, state, lengths, count = args
    ctx = context(lengths, count, q.shape[1])
    return decode.attend(q, k, v, rope, cache, state, ctx)

  return jax.shard_map(
    run, mesh=MESH, in_specs=P(), out_specs=P(), check_vma=False
  )(q, k, v, cache, state, lengths, count)


@jax.jit
def append(cache, k, v, at):
  return cache.append(k, v, at)


def tokens(seed, n, batch=1):
  draw = np.random.default_rng(seed)
  return tuple(
    jnp.asarray(draw.normal(size=(batch, n, heads, H)), jnp.float32)
    for heads in (HEADS, K, K)
  )


class Line:
  """One row of one layer: the system, and all keys it was given."""

  def __init__(self, config=CACHE, decode=DECODE):
    self.decode = decode
    self.cache = config.init(
      CacheShape(1, K, H, CAPACITY, jnp.float32, layer=0)
    )
    self.k, self.v = [np.zeros((0, K, H), np.float32) for _ in range(2)]
    self.length = 0

  def read(self, seed, n):
    _, k, v = tokens(seed, n)
    at = jnp.arange(n, dtype=jnp.int32)[None]
    self.cache = append(self.cache, rope(k, at), v, at)
    self._note(k, v)
    self.start = self.length
    self.state = self.decode.start(self.cache, None)

  def feed(self, seed, n=1, width=None):
    """n tokens in a call of `width`; (out [n N H], rotated q, trace)."""
    width = width or n
    q, k, v = tokens(seed, width)
    self._note(k[:, :n], v[:, :n])
    out, self.cache, self.state, trace = step(
      q,
      k,
      v,
      self.cache,
      self.state,
      jnp.full((1,), self.length, jnp.int32),
      jnp.full((1,), n, jnp.int32),
      decode=self.decode,
    )
    at = self.length - n + jnp.arange(n)[None]
    return np.asarray(out[0, :n]), np.asarray(rope(q[:, :n], at))[0], trace

  def _note(self, k, v):
    n = k.shape[1]
    at = self.length + jnp.arange(n)[None]
    self.k = np.concatenate([self.k, np.asarray(rope(k, at))[0]])
    self.v = np.concatenate([self.v, np.asarray(v)[0]])
    self.length += n


def attention(line, q, position, head, seen):
  """Plain softmax over the keys `seen` (a mask over all positions)."""
  seen = seen & (np.arange(line.length) <= position)
  score = line.k[:, head // G] @ q[head] * H**-0.5
  weight = np.where(seen, np.exp(score - score[seen].max()), 0)
  return weight @ line.v[:, head // G] / weight.sum()


def expected_pages(line, q, decode):
  """Pages that head 0 chooses for rotated queries q [T N H]: brute force."""
  newest, page, logical = line.length - 1, PAGE, 4
  scores, loose = [], looseness(line) * decode.looseness
  for first in range(0, line.length, page):
    best = []
    for low in range(first, min(first + page, line.length), logical):
      keys = line.k[low : min(low + logical, line.length), 0]
      bound = np.maximum(q[:, :G] * keys.min(0), q[:, :G] * keys.max(0))
      bound -= np.abs(q[:, :G]) * loose
      best.append(bound.sum(-1).max())
    forced = first < decode.sink or first + page > newest - decode.recent + 1
    scores.append(np.inf if forced else max(best))
  order = np.argsort(-np.asarray(scores), kind='stable')
  return set(order[: decode.pages(page)].tolist())


def looseness(line):
  """Half of the mean width of the bounds of what `read` read, head 0."""
  pages = [
    line.k[i : min(i + 4, line.start), 0] for i in range(0, line.start, 4)
  ]
  return np.mean([np.ptp(k, axis=0) / 2 for k in pages], axis=0)


def ring_mask(line, position):
  at = np.arange(line.length)
  return (at < CACHE.sink) | (at > position - CACHE.recent)


def check(line, out, q, pages, since):
  """Outputs of the newest queries are exact over the expected keys."""
  at = np.arange(line.length)
  for i in range(len(out)):
    position = line.length - len(out) + i
    chosen = np.isin(at // PAGE, list(pages)) | (at > since)
    for head in range(HEADS):
      seen = chosen if head // G == 0 else ring_mask(line, position)
      want = attention(line, q[i], position, head, seen)
      np.testing.assert_allclose(out[i, head], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('n, loose', ((114, 0), (113, 0), (119, 0), (114, 0.9)))
def test_pages_are_chosen_every_fourth_token_and_new_ones_join(n, loose):
  """Crosses page boundaries in every phase of the reuse."""
  decode = dataclasses.replace(DECODE, looseness=loose)
  line = Line(decode=decode)
  line.read(1, n)
  for i in range(14):
    out, q, trace = line.feed(100 + i)
    if i % 4 == 0:
      pages, since = expected_pages(line, q, decode), line.length - 1
      assert len(pages) == DECODE.pages(PAGE) < line.length // PAGE
    check(line, out, q, pages, since)
    seen = np.isin(np.arange(line.length) // PAGE, list(pages))
    seen |= np.arange(line.length) > since
    keys = G * (seen.sum() + ring_mask(line, line.length - 1).sum())
    assert float(trace.keys[0]) == keys


def test_a_question_piece_is_selected_for_as_a_whole():
  line = Line()
  line.read(2, 130)
  for seed, n in ((50, 4), (51, 3)):
    out, q, _ = line.feed(seed, n, width=4)
    pages = expected_pages(line, q, DECODE)
    check(line, out, q, pages, line.length - 1)
  out, q, _ = line.feed(52)  # 3 + 1 tokens: the same pages serve
  check(line, out, q, pages, line.length - 2)
  out, q, _ = line.feed(53)
  check(line, out, q, expected_pages(line, q, DECODE), line.length - 1)


def test_a_longer_piece_sees_everything_and_the_next_token_chooses_anew():
  decode = dataclasses.replace(DECODE, selected_piece=4)
  line = Line(decode=decode)
  line.read(2, 130)
  line.feed(50, 3, width=4)  # a choice, which would serve one token more
  everything = set(range(CAPACITY))
  out, q, trace = line.feed(51, 3, width=5)
  check(line, out, q, everything, line.length)
  positions = line.length - 3 + np.arange(3)
  rings = sum(ring_mask(line, p)[: p + 1].sum() for p in positions)
  assert float(trace.keys[0]) == G * (sum(positions + 1) + rings)
  out, q, _ = line.feed(52)
  pages = expected_pages(line, q, decode)
  assert len(pages) < line.length // PAGE
  check(line, out, q, pages, line.length - 1)


def test_it_sees_everything_within_the_budget_and_below_the_crossover():
  short = Line()
  dense = Line(decode=dataclasses.replace(DECODE, crossover=CAPACITY))
  short.read(3, 40)
  dense.read(4, 100)
  for i in range(8):
    for line in (short, dense):
      out, q, _ = line.feed(i)
      check(line, out, q, set(range(99)), 0)


def test_recycled_pages_leave_nothing_behind():
  """A row that is emptied and read anew answers as a fresh one."""
  used, fresh = Line(), Line()
  used.read(5, 200)
  used.feed(1)
  used.cache = jax.jit(type(used.cache).reset)(used.cache, jnp.ones((1,), bool))
  used.length, used.k, used.v = 0, fresh.k, fresh.v
  for line in (used, fresh):
    line.read(6, 90)
  for i in range(6):
    (a, _, _), (b, _, _) = used.feed(i), fresh.feed(i)
    np.testing.assert_array_equal(a, b)


def test_a_cut_row_chooses_again():
  line = Line()
  line.read(7, 120)
  for i in range(2):
    line.feed(i)
  line.cache = jax.jit(type(line.cache).truncate)(
    line.cache, jnp.full((1,), 119, jnp.int32)
  )
  line.length, line.k, line.v = 119, line.k[:119], line.v[:119]
  out, q, _ = line.feed(9)
  check(line, out, q, expected_pages(line, q, DECODE), line.length - 1)


@hypothesis.given(
  st.integers(1, 16), st.sampled_from((4, 16, 64)), st.integers(0, 300)
)
def test_no_token_since_the_choice_is_missed(reuse, page, first):
  """Whatever the phase of page and reuse (C = 4, page 64: L mod 64 = 2, 3)."""
  width = 400 // page + 1
  starts = np.full((1, 1, width), 2**30, np.int32)
  choice, length = Choice.none(1, 1, 1), first
  for _ in range(20):
    length += 1
    used = -(-length // page)
    starts[0, 0, :used] = np.arange(used) * page
    one = jnp.ones((1,), jnp.int32)
    newest = jnp.full((1,), length - 1, jnp.int32)
    if bool(choice.due(newest, one, reuse)[0]):
      since = length - 1
      slots = jnp.full((1, 1, 1), since // page, jnp.int32)
      choice = choice.replaced(slots, newest, one)
    choice = choice.served(one)
    listed = np.asarray(
      choice.with_new_pages(
        jnp.asarray(starts), newest + 1, page=page, reuse=reuse
      )
    ).ravel()
    listed = listed[listed >= 0]
    assert len(set(listed)) == len(listed)
    assert {t // page for t in range(since, length)} == set(listed.tolist())


@hypothesis.settings(max_examples=5)
@hypothesis.given(st.integers(0, 99), st.sampled_from((16, 8, 4)))
def test_a_score_is_above_every_key_of_its_page(seed, bits):
  line = Line(dataclasses.replace(CACHE, bits=bits))
  line.read(seed, 61)
  q = tokens(seed + 1, 2)[0]
  found = kv_page_scores(
    q,
    *line.cache.bounds(),
    jnp.ones((1, 2), bool),
    width=line.cache.page_starts().shape[2],
    kv_heads=K,
    heads=line.cache.stats_heads(),
  )
  found = np.asarray(found)[0]
  assert found.shape[0] == 1  # head 1 streams and has no statistics
  for page in range(-(-61 // PAGE)):
    keys = line.k[page * PAGE : (page + 1) * PAGE, 0]
    best = np.max(np.asarray(q)[0, :, :G] @ keys.T)
    assert found[0, page] >= best - 1e-4


def test_moments_score_a_page_by_mean_and_deviation_of_its_keys():
  line = Line(dataclasses.replace(CACHE, stats='moments'))
  line.read(3, 64)
  q = tokens(4, 1)[0]
  found = kv_page_scores(
    q,
    *line.cache.moments(),
    jnp.ones((1, 1), bool),
    width=line.cache.page_starts().shape[2],
    kv_heads=K,
    heads=line.cache.stats_heads(),
    moments=True,
  )
  own = np.float64(np.asarray(q)[0, 0, :G])
  for page in range(64 // PAGE):
    keys = np.float64(line.k[page * PAGE : (page + 1) * PAGE, 0])
    keys = keys.reshape(-1, line.cache.config.logical_page, keys.shape[-1])
    spread = np.sqrt(np.square(own) @ np.var(keys, axis=1).T)
    want = np.max(own @ np.mean(keys, axis=1).T + 2 * spread)
    np.testing.assert_allclose(found[0, 0, page], want, rtol=1e-4)


@pytest.mark.long
def test_other_scorers_and_caches_choose_too():
  for cache, decode in (
    ({'stats': 'moments'}, {'scorer': 'moments'}),
    ({'bits': 8}, {'group': 'sum', 'reuse': 1}),
  ):
    line = Line(
      dataclasses.replace(CACHE, **cache), dataclasses.replace(DECODE, **decode)
    )
    line.read(8, 120)
    for i in range(3):
      out, _, trace = line.feed(i)
      assert np.all(np.isfinite(out))
    assert float(trace.keys[0]) < float(trace.pairs[0])


def prefill(part, length=384, valid=300, config=CACHE):
  q, k, v = tokens(11, length)
  cache = config.init(CacheShape(1, K, H, length, jnp.float32, layer=0))

  def run(q, k, v, cache):
    ctx = context(jnp.full((1,), valid), jnp.full((1,), valid), length)
    return part.attend(q, k, v, rope, cache, ctx)

  out, _, trace = jax.jit(
    jax.shard_map(run, mesh=MESH, in_specs=P(), out_specs=P(), check_vma=False)
  )(q, k, v, cache)
  line = Line(config)
  line._note(k[:, :valid], v[:, :valid])
  return (
    line,
    np.asarray(out[0]),
    np.asarray(rope(q, jnp.arange(length)[None]))[0],
    trace,
  )


@pytest.mark.parametrize('dynamic', ('', 'xattention'))
def test_prefill_mixes_both_kinds_of_heads(dynamic):
  part = LServePrefill(sink=5, local=37, dynamic=dynamic, threshold=1.0)
  part = dataclasses.replace(part, threshold=1.0 if dynamic else None)
  line, out, q, trace = prefill(part)
  at = np.arange(line.length)
  for position in (3, 41, 150, 299):
    for head in range(HEADS):
      seen = (at < 5) | (at > position - 37) if head // G else at >= 0
      want = attention(line, q[position], position, head, seen)
      np.testing.assert_allclose(
        out[position, head], want, rtol=1e-4, atol=1e-5
      )
  per_head = [
    sum(min(p + 1, 42) if head // G else p + 1 for p in range(300))
    for head in range(HEADS)
  ]
  assert float(trace.keys[0]) == sum(per_head)
  assert float(trace.mass[0]) < 300 * HEADS


@pytest.mark.long
def test_prefill_with_a_budget_leaves_streaming_heads_alone():
  whole = prefill(LServePrefill(sink=5, local=37))[1]
  part = LServePrefill(sink=5, local=37, dynamic='xattention', density=0.34)
  some = prefill(part, length=1024, valid=1000)
  assert float(some[3].keys[0]) < 0.6 * float(some[3].pairs[0])
  some = prefill(dataclasses.replace(part, dense_below=300))[1]
  np.testing.assert_allclose(some[:300], whole[:300], rtol=1e-4, atol=1e-5)


# The profile.

TINY = PRESETS['tiny']


def profile(gates, **fields):
  return HeadProfile(
    gates, head_profile.fingerprint(TINY), 'ab' * 32, 'tiny', **fields
  )


def test_a_profile_tells_heads_apart_the_same_way_each_time():
  one = profile(((1.0, 1.0, 0.2, 1.0), (1.0, 0.0, 1.0, 1.0)))
  flags = one.streaming(0.5)
  assert flags == ((True, True, True, False), (False, True, False, False))
  balanced = one.streaming(0.5, balanced=True)
  assert [sum(row) for row in balanced] == [2, 2]
  assert not any(map(any, one.streaming(0.0)))
  assert all(map(all, one.streaming(1.0)))
  for layer in range(3):
    assert sum(head_profile.alternate(layer, 8, 0.5)) == 4
    assert sum(head_profile.alternate(layer, 3, 0.34)) == 1


def test_a_profile_survives_its_file_and_refuses_others(tmp_path):
  path = tmp_path / 'profile.json'
  one = profile(((0.5, 1.0), (0.0, 1.0)), recipe={'steps': 3})
  path.write_text(one.to_json())
  assert head_profile.load(str(path)) == one
  one.check(TINY, 'ab' * 32)
  with pytest.raises(ValueError, match='of another model'):
    one.check(PRESETS['smollm2_135m'])
  with pytest.raises(ValueError, match='of other weights'):
    one.check(TINY, 'cd' * 32)
  with pytest.raises(ValueError, match='cannot be read'):
    head_profile.load(str(tmp_path / 'none.json'))
  for bad in ('{', '[]', '{"gates": [[2]]}', json.dumps({'gates': [[1], []]})):
    (tmp_path / 'bad.json').write_text(bad)
    with pytest.raises(ValueError, match='is no head profile'):
      head_profile.load(str(tmp_path / 'bad.json'))
    head_profile.load.cache_clear()
  method = methods.get_method('lserve', profile=str(path), bits=8)
  assert method.cache.ring_heads == ((True, False), (True, False))
  assert 'all_tokens' not in method.cache.provides
  with pytest.raises(ValueError, match='of another model'):
    method.cache.check(PRESETS['smollm2_135m'], 100, 1, None)


@pytest.mark.parametrize(
  'fields, message',
  (
    ({'budget': 300}, 'below sink'),
    ({'reuse': 0}, 'reuse=0'),
    ({'crossover': -2}, 'crossover=-2'),
    ({'selected_piece': 0}, 'selected_piece=0'),
    ({'looseness': 1.5}, 'looseness=1.5 must be within'),
    ({'selected_piece': 17}, 'within 1 and 16'),
    ({'group': 'mean'}, "'max' or 'sum'"),
    ({'local': 0}, 'prefill.local=0'),
    ({'dynamic': 'dense'}, 'selects no blocks'),
  ),
)
def test_bad_numbers_are_refused(fields, message):
  method = methods.get_method('lserve', **fields)
  with pytest.raises(ValueError, match=message):
    for part in (method.prefill, method.decode):
      part.check(TINY, 1000)


@pytest.mark.parametrize(
  'fields, message',
  (
    ({'scorer': 'moments'}, 'provides'),
    ({'scorer': 'guess'}, 'must be'),
    (
      {'scorer': 'moments', 'stats': 'moments', 'looseness': 0.5},
      'is of bounds',
    ),
    ({'stats': 'none'}, 'provides'),
    ({'logical_page': 48}, 'must divide page=64'),
    ({'streaming': 1.5}, 'within 0 and 1'),
    ({'profile': 'nowhere.json'}, 'cannot be read'),
  ),
)
def test_bad_compositions_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    methods.get_method('lserve', **fields)


# The whole model.


@functools.cache
def weights(config):
  return transformer.init(config, jax.random.key(0))


def answer(method, mesh=(1, 1, 1), contexts=(300,), n=11):
  from tests.methods.test_conformance import answer_scores, prompt

  config = dataclasses.replace(TINY, dtype='float32')
  engine = Engine(
    config,
    weights(config),
    method,
    capacity=448,
    batch=len(contexts),
    room=64,
    mesh=sharding.make_mesh(*mesh),
  )
  rows = [prompt(8 + i, context=c) for i, c in enumerate(contexts)]
  return answer_scores(engine, rows, steps=n)


SMALL = {
  'profile': 'alternate',
  'cache.page': 16,
  'cache.logical_page': 8,
  'cache.sink': 16,
  'cache.recent': 32,
  'prefill.sink': 16,
  'local': 64,
}


def test_with_streaming_heads_full_budget_equals_dense():
  method = methods.get_method('lserve', **SMALL).at_full_budget(384)
  tokens, scores = answer(method)
  want_tokens, want = answer(methods.get_method('dense'))
  assert tokens == want_tokens
  np.testing.assert_allclose(scores, want, rtol=2e-3, atol=2e-3)


@pytest.mark.long  # test_paged has a cache of such a layer
@pytest.mark.parametrize('dynamic', ['', 'xattention'])
def test_all_heads_of_a_layer_may_stream(tmp_path, dynamic):
  heads = TINY.n_kv_heads
  path = tmp_path / 'profile.json'
  path.write_text(profile(((0.0,) * heads, (1.0,) * heads)).to_json())
  numbers = SMALL | {'profile': str(path), 'dynamic': dynamic}
  few = {'budget': 128, 'decode.sink': 16, 'decode.recent': 32}
  method = methods.get_method('lserve', **numbers, **few)
  _, scores = answer(method)
  assert np.isfinite(np.concatenate(scores)).all()
  tokens, scores = answer(method.at_full_budget(384))
  want_tokens, want = answer(methods.get_method('dense'))
  assert tokens == want_tokens
  np.testing.assert_allclose(scores, want, rtol=2e-3, atol=2e-3)


@pytest.mark.mesh
@pytest.mark.parametrize(
  'budget, contexts, looseness',
  (
    pytest.param(4096, (300, 120), 0.0, marks=pytest.mark.long),
    (128, (300, 115), 0.0),
    pytest.param(128, (300, 115), 0.7, marks=pytest.mark.long),
  ),
)
def test_sharded_equals_unsharded_with_streaming_heads(
  budget, contexts, looseness
):
  """Windows that cross shards; a half full page behind which others follow.

  With a budget of a third, prompts end at whole pages (a shard's last page is
  not filled up, so that the pages to choose from would be others).
  """
  always = {'decode.sink': 16, 'decode.recent': 32}
  fields = SMALL | always | {'budget': budget, 'looseness': looseness}
  method = methods.get_method('lserve', **fields)
  tokens, scores = answer(method, contexts=contexts)
  got, got_scores = answer(method, (2, 2, 2), contexts)
  assert got == tokens
  np.testing.assert_allclose(got_scores, scores, rtol=2e-3, atol=2e-3)
