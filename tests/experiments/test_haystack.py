"""Texts to hide needles in that cannot serve are refused, with the reason."""

import pytest

from experiments import evaluate
from lcx import methods
from tests.experiments import fake
from tests.experiments.test_evaluate import config, essence


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
  fake.install(monkeypatch.setattr)
  fake.Engine.calls = 0


@pytest.mark.parametrize(
  ('raw', 'says'),
  [
    (b'', 'is empty'),
    (b' \n\t', 'is empty'),
    (b'Some words.\0 And more.' * 99, 'is binary: it holds NUL bytes'),
    (b'\xff\xfe words' * 99, 'is not UTF-8'),
    (b'A short text. ' * 9, 'has 126 tokens, contexts of 900 need'),
  ],
)
def test_bad_texts(tmp_path, raw, says):
  path = tmp_path / 'text.txt'
  path.write_bytes(raw)
  with pytest.raises(ValueError, match=f'config.haystack.*{says}'):
    evaluate.run(config(haystack=str(path)), tmp_path / 'run')
  assert fake.Engine.calls == 0


def test_a_text_that_is_not_there(tmp_path):
  with pytest.raises(OSError, match='nowhere.txt'):
    evaluate.run(config(haystack='nowhere.txt'), tmp_path / 'run')


def test_a_text_of_ones_own_is_used(tmp_path):
  path = tmp_path / 'text.txt'
  path.write_text('The sea is calm tonight. ' * 200)
  evaluate.run(config(haystack=str(path)), tmp_path / 'run')
  assert fake.Engine.calls


def test_sharing_a_prefill_changes_the_order_alone(tmp_path):
  evaluate.run(config(), tmp_path / 'one')
  evaluate.run(config(shared_gib=1.0), tmp_path / 'shared')
  assert essence(tmp_path / 'one') == essence(tmp_path / 'shared')


def test_a_star_is_every_method_that_is_not_named():
  found = dict(evaluate._every({'quest': {'decode': {'budget': 9}}, '*': {}}))
  assert set(found) == set(methods.names())
  assert found['quest'] and not found['streaming']
  assert [n for n, _ in evaluate._every({'dense': {}})] == ['dense']
