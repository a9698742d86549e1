"""What a cache cannot take or give back ends a row, or is refused before."""

import dataclasses

import jax
import numpy as np
import pytest

from lcx import head_profile, methods
from lcx.cache import Paged
from lcx.engine import Engine
from lcx.methods.base import Prompt
from lcx.methods.lserve import TwoWayPaged
from lcx.models import transformer
from lcx.models.presets import PRESETS

CONFIG = PRESETS['tiny'].replace(dtype='float32')


def prompt(seed: int, context: int, questions: tuple[int, ...] = (9,)):
  draw = np.random.default_rng(seed)

  def tokens(n):
    return draw.integers(0, CONFIG.vocab_size, n).astype(np.int32)

  return Prompt(tokens(4), tokens(context), tuple(map(tokens, questions)))


def engine(method, batch=1):
  weights = transformer.init(CONFIG, jax.random.key(0))
  return Engine(CONFIG, weights, method, capacity=384, batch=batch, room=64)


def test_a_row_without_a_page_ends_and_the_others_go_on():
  method = dataclasses.replace(
    methods.get_method('dense'), cache=Paged(page=16, logical_page=16)
  )
  prompts = [prompt(1, 150), prompt(2, 48)]
  many = engine(method, 2)
  want, _ = many.decode(many.prefill(prompts, 0), 18)
  read = [4 + 150 + 9, 4 + 48 + 9]
  pages = [-(-n // 16) for n in read]
  pages[1] += 1  # which row 1 takes before row 0 needs one
  cache = dataclasses.replace(
    method.cache, pool_pages=CONFIG.n_kv_heads * sum(pages)
  )
  few = engine(dataclasses.replace(method, cache=cache), 2)
  session = few.prefill(prompts, 0)
  tokens, status = few.decode(session, 15)
  more, again = few.decode(session, 3)
  room = 16 * pages[0] - read[0]
  assert 0 < room < 15
  assert status[0] == again[0] == 'out_of_pages' and again[1] == 'ok'
  # The last one is what the scores before it say; the cache did not take it.
  assert tokens[0] == want[0][: room + 1] and not more[0]
  assert tokens[1] + more[1] == want[1]
  used = [np.asarray(c.used) for c in session.caches]
  assert all(np.all(u == np.asarray(session.lengths)) for u in used)


def streaming(slack: int):
  cache = TwoWayPaged(
    page=16, logical_page=16, profile='alternate', sink=16, recent=32,
    slack=slack,
  )  # fmt: skip
  method = methods.get_method('lserve').at_tight_budget(300)
  return dataclasses.replace(method, cache=cache)


def test_questions_that_rings_cannot_go_back_from_are_refused():
  both = prompt(3, 300, (40, 9))
  short = engine(streaming(16))
  with pytest.raises(ValueError, match=r'take up to 44 tokens.*slack=16'):
    short.generate([both], 4, protocol='context_first')
  cache = short.method.cache.rewindable(44)
  assert cache.slack == 44 and cache.rewindable(9) == cache


@pytest.mark.long
def test_rings_that_keep_enough_go_back():
  both = prompt(3, 300, (40, 9))
  long, short = engine(streaming(44)), engine(streaming(16))
  answers = long.generate([both], 4, protocol='context_first')[0]
  assert [a.status for a in answers] == ['ok', 'ok']
  alone = dataclasses.replace(both, questions=both.questions[1:])
  fresh = short.generate([alone], 4, protocol='context_first')[0][0]
  assert fresh.tokens == answers[1].tokens


def test_a_head_profile_of_another_model_is_refused(tmp_path):
  path = tmp_path / 'profile.json'
  other = PRESETS['smollm2_135m']
  rows = ((0.5,) * CONFIG.n_kv_heads,) * CONFIG.n_layers
  path.write_text(
    head_profile.HeadProfile(
      rows, head_profile.fingerprint(other), 'ab' * 32
    ).to_json()
  )
  with pytest.raises(ValueError, match='profile is of another model'):
    engine(methods.get_method('lserve', profile=str(path)))
