"""New keys on the last sequence shard or on all by turns: the same answers."""

import functools
from typing import Any

import chex
import jax
import numpy as np
import pytest

from lcx import methods, sharding
from lcx.engine import Engine
from lcx.engine.placement import Placement
from lcx.methods.base import Prompt
from lcx.models import transformer
from tests.methods import test_conformance

pytestmark = pytest.mark.mesh

CONFIG = test_conformance.CONFIG.replace(n_layers=1)  # compiles sooner
PAGE = 16
NEW = 100  # tokens fed after the prompt
# Budgets bite: a fifth of the tokens, and rings that are shorter.
LISTS = {'decode.budget': 80, 'decode.sink': 4, 'decode.recent': 24}
PAGES = {'cache.page': PAGE, 'cache.logical_page': PAGE}
RINGS = {'cache.sink': 4, 'cache.recent': 40}
METHODS: dict[str, dict[str, Any]] = {
  'dense': {'cache.page': PAGE},
  'quest': LISTS | PAGES | {'decode.dense_layers': 0},
  'lserve': LISTS | PAGES | RINGS | {'cache.profile': 'alternate'},
  'tokenselect': {'cache.page': PAGE},
  'streaming': PAGES
  | {
    f'{p}.{k}': v
    for p in ('prefill', 'cache', 'decode')
    for k, v in (('sink', 4), ('recent', 40))
  },
  'snapkv': {'cache.page': PAGE},
  'retrieval_cluster': {
    'cache.page': PAGE,
    'decode.segment': 32,
    'decode.recent': 24,
    'decode.sink': 4,
    'decode.top': 400,
    'decode.probe': 400,
  },
  'dense+paged_int8+quest': LISTS | PAGES | {'decode.dense_layers': 0},
}


def prompt(seed, context):
  draw = np.random.default_rng(seed)
  parts = (4, context, 9)
  system, text, question = (
    draw.integers(0, CONFIG.vocab_size, n).astype(np.int32) for n in parts
  )
  return Prompt(system, text, (question,))


PROMPTS = [prompt(1, 280), prompt(2, 131)]


def make(name):
  method = methods.get_method(name, **METHODS[name])
  if name in ('tokenselect', 'snapkv'):
    method = method.at_tight_budget(300)
  return method


@functools.cache
def weights():
  return transformer.init(CONFIG, jax.random.key(0))


def engine(method, shards, capacity=420, room=110, **kwargs):
  return Engine(
    CONFIG,
    weights(),
    method,
    capacity=capacity,
    room=room,
    mesh=sharding.make_mesh(1, shards, 1),
    **kwargs,
  )


@functools.cache
def answers(name, shards, piece, new_keys='last'):
  """Logits before every new token, and tokens that came to each shard."""
  runs = engine(make(name), shards, batch=2, new_keys=new_keys)
  session = runs.prefill(PROMPTS)
  before = np.asarray(session.caches[0].used)
  draw = np.random.default_rng(3)
  new = [draw.integers(0, CONFIG.vocab_size, n) for n in (NEW, NEW - 7)]
  found = runs.score(session, [x.astype(np.int32) for x in new], piece)
  for cache in session.caches:
    assert not np.any(cache.status)
  came = np.asarray(session.caches[0].used) - before
  return found, came.reshape(shards, 2).T


CASES = [(n, s, t) for n in METHODS for s in (4, 8) for t in (16, 1)]


@pytest.mark.parametrize(
  ('name', 'shards', 'piece'),
  # test_after_apb_and_rewound says it of quest in the default run.
  [pytest.param(*c, marks=pytest.mark.long) for c in CASES],
)
def test_keys_by_turns_answer_as_one_device(name, shards, piece):
  """A question in pieces of 16 tokens, and one by one as in decode."""
  want, _ = answers(name, 1, piece)
  got, came = answers(name, shards, piece, 'round_robin')
  chex.assert_trees_all_close(got, want, rtol=2e-3, atol=2e-3)
  assert came.sum(axis=1).tolist() == [NEW, NEW - 7]
  # Six pages and more: every shard of four has one, none more than its turns.
  assert np.all(np.sum(came > 0, axis=1) >= min(shards, 6))
  assert came.max() <= PAGE * -(-NEW // (PAGE * shards)) + PAGE


@pytest.mark.long
@pytest.mark.parametrize('new_keys', ['last', 'round_robin'])
def test_after_apb_and_rewound(new_keys):
  """A second question after a rewind is as on one device, by APB's layout."""
  fields: dict[str, Any] = LISTS | PAGES
  fields |= {'hosts': 4, 'compressor': 'snapkv'}
  method = methods.get_method('apb+paged+quest', **fields)

  def scores(shards):
    runs = engine(method, shards, new_keys=new_keys)
    session = runs.prefill(PROMPTS[:1])
    mark = runs.mark(session)
    draw = np.random.default_rng(4)
    first, second = (
      draw.integers(0, CONFIG.vocab_size, n).astype(np.int32) for n in (70, 50)
    )
    runs.extend(session, [first])
    runs.rewind(session, mark)
    return runs.score(session, [second])

  chex.assert_trees_all_close(scores(4), scores(1), rtol=2e-3, atol=2e-3)


def test_shards_hold_what_padding_gives_the_first():
  """A prompt just above a bucket: the first shard is full, the last empty."""
  runs = engine(methods.get_method('dense'), 2, capacity=280, room=10)
  session = runs.prefill([prompt(5, 262)], 0)
  assert np.asarray(session.caches[0].used).tolist() == [256, 275 - 256]
  assert not np.any(session.caches[0].status)


def test_room_by_turns_is_shared():
  """Each shard reserves its turns of the room, not all of it."""
  method = methods.get_method('dense')
  held = {
    keys: Placement(method, 8, 9216, 4096, keys).cache_capacity()
    for keys in ('last', 'round_robin')
  }
  assert held == {'last': 8 * (5120 // 8 + 4096), 'round_robin': 9216}
  assert Placement(method, 1, 9216, 4096).cache_capacity() == 9216


def test_bad_places_are_refused():
  def refused(match, **fields):
    with pytest.raises(ValueError, match=match):
      Placement(methods.get_method('quest'), 4, 512, 64, **fields)

  refused("new_keys='first' must be one of", new_keys='first')
  small = methods.get_method('dense', page=8)
  with pytest.raises(ValueError, match='needs pages of at least 16 tokens'):
    Placement(small, 4, 512, 64, 'round_robin')
