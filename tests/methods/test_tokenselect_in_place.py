"""TokenSelect's decode in launches of its own does what array operations do."""

import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dispatch, selection_cache
from kernels_pallas.best_in_order import gpu as best_in_order
from lcx.cache import CacheShape, Dense
from lcx.methods.tokenselect import TokenSelectDecode
from lcx.models.presets import PRESETS
from lcx.models.transformer import make_rope
from lcx.select import in_place, key_copies
from tests.methods.test_tokenselect import alone, context

ROWS, HEADS, KV_HEADS, DIM = 3, 6, 2, 64
CONFIG = PRESETS['tiny'].replace(
  n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=DIM, dtype='float32'
)
ROPE = make_rope(CONFIG)
PROMPT, CAPACITY = (300, 7, 180), 384
PART = TokenSelectDecode(k=20, sink=4, local=32, reuse=5)
# Tokens of each row at each step, and which queries turn.
COUNTS = ((5, 5, 0), *[(1, 1, 1)] * 3, (1, 0, 1), *[(1, 1, 1)] * 5, (5, 2, 1))
TURNS = ((1, 1, 1), (0, 1, 1), (0, 0, 0), (0, 0, 1), *[(0, 0, 0)] * 7)
WAYS = {
  'full': ({}, {}),
  'weighted logits': (
    {'heads': 'energy', 'logits': 'scaled', 'pooling': 'l2'},
    {'page': 8},
  ),
  'sums': ({'vote': 'top_k', 'heads': 'energy', 'k': 300}, {}),
  'budget': ({'scoring': 'budget', 'scored': 64}, {'page': 8, 'stats': True}),
  'copies': ({'score_bits': 8}, {}),
  'budget of copies': (
    {'score_bits': 8, 'scoring': 'budget', 'scored': 64},
    {'page': 8, 'stats': True},
  ),
  'budget of sums': (
    {'scoring': 'budget', 'scored': 40, 'vote': 'top_k'},
    {'page': 8, 'stats': True},
  ),
}


def draw(seed, tokens):
  """Unrotated q [B T N H] and k, v [B T K H]."""
  rng = np.random.default_rng(seed)
  return [
    jnp.asarray(rng.normal(size=(ROWS, tokens, n, DIM)), jnp.float32)
    for n in (HEADS, KV_HEADS, KV_HEADS)
  ]


def begun(part, config):
  """(cache, state) behind the prompts."""
  room, lengths = max(PROMPT), jnp.asarray(PROMPT)

  @alone
  def begin(q, k, v):
    at = jnp.tile(jnp.arange(room)[None], (ROWS, 1))
    ctx = context(at, lengths, trace=False)
    shape = CacheShape(ROWS, KV_HEADS, DIM, CAPACITY, 'float32')
    cache = config.init(shape)
    cache = cache.append(ROPE(k, at), v, at, lengths)
    state = part.observe(q, k, v, ROPE, part.init_state(shape), ctx)
    return cache, part.start(cache, state)

  return begin(*draw(0, room))


def decoded(part, cache, state):
  """(output, valid, state) of each step."""
  lengths = jnp.asarray(PROMPT)

  @alone
  def step(q, k, v, cache, state, at, count):
    at = at[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)
    ctx = context(at, count, trace=False)
    return part.attend(q, k, v, ROPE, cache, state, ctx)[:3]

  query = draw(1, 1)[0]
  for i, (count, turns) in enumerate(zip(COUNTS, TURNS)):
    tokens, count = max(count), jnp.asarray(count)
    q, k, v = draw(i + 2, tokens)
    query = jnp.where(jnp.asarray(turns)[:, None, None, None] > 0, q, query)
    query = query[:, :1]
    q = query + 0.05 * q
    out, cache, state = step(q, k, v, cache, state, lengths, count)
    lengths += count
    yield out, jnp.arange(tokens) < count[:, None], state


def check(part, config):
  """Compares two ways; returns the rows that selected, by step."""
  hits, start = [], begun(part, config)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(in_place, 'serves', lambda *_: False)
    plain = list(decoded(part, *start))
  for want, got in zip(plain, decoded(part, *start), strict=True):
    valid = np.asarray(want[1])
    np.testing.assert_allclose(
      np.asarray(got[0])[valid], np.asarray(want[0])[valid], atol=1e-4
    )
    mine, theirs = got[2].copies, want[2].copies
    if mine is not None:
      keys = [x.codes * x.scale[..., None] for x in (mine, theirs)]
      np.testing.assert_allclose(*keys, atol=1e-5)
    mine, theirs = got[2].working, want[2].working
    for name in ('held', 'chosen', 'until', 'age'):
      np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
    for row, held in enumerate(np.asarray(mine.held)):
      for name in ('query', 'k', 'v'):
        a, b = (np.asarray(getattr(x, name)[row]) for x in (mine, theirs))
        a, b = (x if name == 'query' else x[:, :held] for x in (a, b))
        np.testing.assert_allclose(a, b, atol=1e-5)
    hits.append(np.asarray(mine.age) > 0)
  return np.stack(hits)


@pytest.mark.parametrize(
  'name',
  [
    name
    if name == 'budget of copies'
    else pytest.param(name, marks=pytest.mark.long)
    for name in WAYS
  ],
)
def test_interpreted(name, monkeypatch):
  fields, cache = WAYS[name]
  if name == 'full':  # through maxima
    monkeypatch.setattr(best_in_order, 'MOST', 256)
  calls = []

  def interpreted(*args):
    calls.append(args)
    return selection_cache.step(*args, interpret=True)

  monkeypatch.setattr(
    in_place, 'dispatch', types.SimpleNamespace(prefers=lambda _: True)
  )
  monkeypatch.setattr(
    in_place,
    'selection_cache',
    types.SimpleNamespace(**vars(selection_cache) | {'step': interpreted}),
  )
  monkeypatch.setattr(key_copies, 'dispatch', in_place.dispatch)
  monkeypatch.setattr(
    key_copies,
    'selection_cache',
    types.SimpleNamespace(
      copied=functools.partial(selection_cache.copied, interpret=True)
    ),
  )
  judge(fields, cache)
  assert calls


@pytest.mark.gpu
@pytest.mark.parametrize('name', WAYS)
def test_on_a_gpu(name):
  assert dispatch.prefers('gpu'), 'an older GPU would compare XLA with itself'
  judge(*WAYS[name])


def judge(fields, cache):
  part = TokenSelectDecode(**vars(PART) | fields)
  hits = check(part, Dense(**cache))
  # A row hits while another selects, and a list ends of old age.
  np.testing.assert_array_equal(hits[:4, 0], [False, True, True, True])
  np.testing.assert_array_equal(hits[3], [True, True, False])
  assert not hits[5, 0] and hits[6, 0] and not hits[-1, 0]
