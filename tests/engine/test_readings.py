"""A shared dense prefill gives what an own one gives; every token's logits."""

import chex
import numpy as np
import pytest

from lcx import methods
from lcx.engine import Engine
from lcx.engine.readings import Readings
from tests.methods.test_conformance import CAPACITY, CONFIG, make_engine, prompt

PROMPTS = [prompt(1, questions=2), prompt(2, context=170, questions=2)]


def sharing(name, readings):
  own = make_engine(methods.get_method(name).at_tight_budget(300))
  return Engine(
    CONFIG,
    own.weights,
    own.method,
    capacity=CAPACITY,
    batch=2,
    room=64,
    readings=readings,
  )


def essence(answers):
  return [[(a.tokens, a.density, a.kv_bytes) for a in row] for row in answers]


@pytest.mark.parametrize(
  'protocol',
  [pytest.param(x, marks=pytest.mark.long) for x in ('context_first', 'whole')],
)
def test_a_shared_prefill_gives_the_same_answers(protocol):
  readings = Readings(1e9)
  first, second = sharing('dense', readings), sharing('quest', readings)
  own = make_engine(second.method)
  first.generate(PROMPTS, 2, protocol=protocol)
  got = second.generate(PROMPTS, 2, protocol=protocol)
  assert essence(got) == essence(own.generate(PROMPTS, 2, protocol=protocol))
  assert got[0][0].prefill_ms > 0
  assert 'prefill kept' in {key[0] for key in first._programs}
  assert not {key[0] for key in second._programs} & {'prefill kept', 'embed'}
  readings.clear()
  second.prefill(PROMPTS, 0)
  assert 'prefill kept' in {key[0] for key in second._programs}


def test_only_what_fits_and_is_dense_is_shared():
  size = 2 * 384 * CONFIG.d_model * CONFIG.n_layers * 4
  plan = make_engine(methods.get_method('quest').at_tight_budget(300)).plan
  assert Readings(size).fits(plan, (2, 384))
  assert not Readings(size - 1).fits(plan, (2, 384))
  other = make_engine(methods.get_method('streaming').at_tight_budget(300)).plan
  assert not Readings(1e9).fits(other, (2, 384))


def test_bytes_are_of_a_sequence_whatever_the_batch():
  two = make_engine(methods.get_method('dense'))
  one = Engine(
    CONFIG, two.weights, two.method, capacity=CAPACITY, batch=1, room=64
  )
  sizes = [
    engine.generate(PROMPTS[:n], 2)[0][0].kv_bytes
    for n, engine in ((1, one), (2, two))
  ]
  assert sizes[0] == pytest.approx(sizes[1], rel=0.01) and sizes[0] > 2**16


def test_scores_are_the_logits_before_each_token():
  engine = make_engine(methods.get_method('quest').at_tight_budget(300))
  asked = [p.question(0)[:n] for p, n in zip(PROMPTS, (9, 4))]
  session = engine.prefill(PROMPTS)
  mark = engine.mark(session)
  got = engine.score(session, asked, piece=1)
  after = np.asarray(session.scores)
  assert [len(x) for x in got] == [9, 4]
  engine.rewind(session, mark)
  chex.assert_trees_all_close(got[1][0], np.asarray(session.scores)[1])
  for i in range(9):
    rows = np.asarray(session.scores)
    for row in range(2):
      if i < len(asked[row]):
        chex.assert_trees_all_close(got[row][i], rows[row], atol=1e-5)
    engine.extend(session, [x[i : i + 1] for x in asked])
  chex.assert_trees_all_close(after, np.asarray(session.scores), atol=1e-5)
  with pytest.raises(ValueError, match='exceed the cache'):
    engine.score(session, [np.zeros(300, np.int32)] * 2)
