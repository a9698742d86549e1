"""Every method, and every legal composition, keeps the contract."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from lcx import cache as caches
from lcx import methods, sharding
from lcx.engine import Engine, make_sampling
from lcx.methods.base import Prompt
from lcx.methods.compose import legal
from lcx.models import transformer
from lcx.models.presets import PRESETS

CONFIG = dataclasses.replace(PRESETS['tiny'], dtype='float32')
CAPACITY = 384
CONTEXT = 300


@pytest.fixture(scope='module')
def weights():
  return transformer.init(CONFIG, jax.random.key(0))


def prompt(seed: int, context: int = CONTEXT, questions: int = 1) -> Prompt:
  draw = np.random.default_rng(seed)

  def tokens(n):
    return draw.integers(0, CONFIG.vocab_size, n).astype(np.int32)

  return Prompt(
    tokens(4), tokens(context), tuple(tokens(9) for _ in range(questions))
  )


def full(method):
  method = method.at_full_budget(CAPACITY)
  if method is None:
    pytest.skip('its docstring says why it is never exact')
  return method


def answer_scores(engine, prompts, steps=5, question=0):
  """Greedy tokens and the logits after them."""
  session = engine.prefill(prompts, question)
  tokens, status = engine.decode(session, steps)
  assert status == ['ok'] * engine.batch
  return tokens, np.asarray(session.scores)


def dense_answer(weights, prompts, **kwargs):
  engine = Engine(
    CONFIG,
    weights,
    methods.get_method('dense'),
    capacity=CAPACITY,
    batch=len(prompts),
  )
  return answer_scores(engine, prompts, **kwargs)


def make_engine(weights, method, batch=1, **kwargs):
  kwargs = {'capacity': CAPACITY, 'room': 64} | kwargs
  return Engine(CONFIG, weights, method, batch=batch, **kwargs)


@pytest.mark.parametrize('name', methods.names())
def test_full_budget_equals_dense(weights, name):
  method = full(methods.get_method(name))
  prompts = [prompt(1)]
  tokens, scores = answer_scores(make_engine(weights, method), prompts)
  want_tokens, want = dense_answer(weights, prompts)
  assert tokens == want_tokens
  chex.assert_trees_all_close(scores, want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize('name', methods.names())
def test_padding_and_batch_order_do_not_matter(weights, name):
  method = methods.get_method(name)
  prompts = [prompt(2), prompt(3, context=190)]
  both = make_engine(weights, method, batch=2)
  tokens, scores = answer_scores(both, prompts)
  swapped, swapped_scores = answer_scores(both, prompts[::-1])
  assert swapped == tokens[::-1]
  chex.assert_trees_all_close(scores, swapped_scores[::-1], rtol=1e-4, atol=1e-4)
  alone = make_engine(weights, method)
  for row, one in enumerate(prompts):
    single, single_scores = answer_scores(alone, [one])
    assert single[0] == tokens[row]
    chex.assert_trees_all_close(
      single_scores[0], scores[row], rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize('name', methods.names())
def test_no_value_from_the_future_reaches_an_output(weights, name):
  """Later tokens change; the cache of a cut prompt must give the same logits.

  The question is fed in two ways: its last tokens differ. Logits after the
  common part must not.
  """
  method = methods.get_method(name)
  engine = make_engine(weights, method)
  first = prompt(4)
  tail = np.random.default_rng(5).integers(0, CONFIG.vocab_size, 4)
  session = engine.prefill([first], None)
  mark = engine.mark(session)
  question = first.question(0)
  engine.extend(session, [question])
  before = np.asarray(session.scores)
  engine.extend(session, [tail.astype(np.int32)])
  engine.rewind(session, mark)
  engine.extend(session, [question])
  chex.assert_trees_all_close(
    np.asarray(session.scores), before, rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize('name', methods.names())
def test_decode_traces_once(weights, name):
  engine = make_engine(weights, methods.get_method(name))
  session = engine.prefill([prompt(6)], 0)
  engine.decode(session, 3)
  compiled = engine.compilations
  engine.decode(session, 5)
  session = engine.prefill([prompt(7)], 0)
  engine.decode(session, 2)
  assert engine.compilations == compiled


@pytest.mark.xdist_group('mesh')
@pytest.mark.parametrize('name', methods.names())
def test_sharded_equals_unsharded(weights, name):
  method = methods.get_method(name)
  prompts = [prompt(8), prompt(9, context=211)]
  tokens, scores = answer_scores(make_engine(weights, method, batch=2), prompts)
  mesh = sharding.make_mesh(2, 2, 2)
  got, got_scores = answer_scores(
    make_engine(weights, method, batch=2, mesh=mesh), prompts
  )
  assert got == tokens
  chex.assert_trees_all_close(got_scores, scores, rtol=2e-3, atol=2e-3)


def test_every_legal_composition_runs(weights):
  """Few tokens through each; at full budget all equal dense."""
  compositions = legal()
  print(f'{len(compositions)} legal compositions')
  assert ('dense', 'dense', 'dense') in compositions
  prompts = [prompt(10, context=150)]
  want_tokens, want = dense_answer(weights, prompts, steps=2)
  for prefill, cache, decode in compositions:
    method = methods.compose(prefill, cache, decode)
    exact = method.at_full_budget(CAPACITY)
    tokens, scores = answer_scores(
      make_engine(weights, exact or method), prompts, steps=2
    )
    assert np.all(np.isfinite(scores)), method.name
    if exact and getattr(caches.CONFIGS[cache], 'bits', 16) >= 16:
      assert tokens == want_tokens, method.name
      chex.assert_trees_all_close(scores, want, rtol=2e-3, atol=2e-3)


def test_an_illegal_composition_is_refused():
  with pytest.raises(ValueError, match='needs .*nearest legal choice is'):
    methods.compose('dense', 'streaming', 'dense')


def test_unknown_names_and_fields_are_refused():
  with pytest.raises(ValueError, match='unknown method'):
    methods.get_method('nothing')
  with pytest.raises(ValueError, match='no part has a field'):
    methods.get_method('quest', bogus=1)
  with pytest.raises(ValueError, match='takes int'):
    methods.get_method('quest', budget='many')


def test_context_longer_than_the_cache_is_refused(weights):
  engine = make_engine(weights, methods.get_method('dense'))
  with pytest.raises(ValueError, match='exceeds the cache'):
    engine.prefill([prompt(11, context=500)])
  session = engine.prefill([prompt(11)], 0)
  with pytest.raises(ValueError, match='exceed the cache'):
    engine.decode(session, 500)


def test_several_questions_of_one_context(weights):
  """Context first, rewound between questions, equals asking each afresh."""
  engine = make_engine(weights, methods.get_method('dense'))
  both = prompt(12, questions=2)
  answers = engine.generate([both], 4, protocol='context_first')[0]
  for i, answer in enumerate(answers):
    alone = dataclasses.replace(both, questions=(both.questions[i],))
    fresh = engine.generate([alone], 4, protocol='context_first')[0][0]
    assert fresh.tokens == answer.tokens
    whole = engine.generate([alone], 4)[0][0]
    assert whole.tokens == answer.tokens
  assert answers[0].density == 1.0


def test_rows_stop_and_sample_on_their_own(weights):
  engine = make_engine(weights, methods.get_method('dense'), batch=2)
  session = engine.prefill([prompt(13), prompt(14)], 0)
  tokens, _ = engine.decode(session, 6)
  stop = tokens[0][2]
  sampling = make_sampling(2, stop=[(stop,), ()])
  session = engine.prefill([prompt(13), prompt(14)], 0)
  stopped, _ = engine.decode(session, 6, sampling)
  cut = tokens[0].index(stop) + 1
  assert stopped == [tokens[0][:cut], tokens[1]]
  hot = make_sampling(2, temperature=[0.0, 1.0], top_p=0.9, seed=[1, 2])
  session = engine.prefill([prompt(13), prompt(14)], 0)
  warm, _ = engine.decode(session, 6, hot)
  assert warm[0] == tokens[0] and warm[1] != tokens[1]
