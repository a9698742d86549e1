"""The benchmarks' scoring rules, by example."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcx.tasks import scores, text_scores

CASES = [
  # RULER: share of the answers that occur, whatever the case and order.
  ('all_parts', 'b, then A', ('a', 'b'), 1),
  ('all_parts', 'only 123', ('123', '456'), 0.5),
  ('all_parts', '  \x07 X\x00y', ('x', 'y'), 1),
  ('all_parts', 'x\x00y', ('xy',), 0),
  ('any_part', 'it was Paris.', ('London', 'paris'), 1),
  ('any_part', 'Rome', ('London', 'Paris'), 0),
  # InfiniteBench.
  ('first_integer', 'The key is 04711.', ('04711',), 1),
  ('first_integer', '1. 04711', ('04711',), 0),
  ('first_integer', '4711', ('04711',), 0),
  ('first_number', 'median 45.5!', ('45.5',), 1),
  ('first_number', '7, or 8', ('8',), 0),
  ('first_number', '45.0', ('45',), 1),
  ('last_integer', 'func_1(3) returns `-7`.', ('-7',), 1),
  ('last_integer', '12 it is', ('12',), 0),
  ('last_integer', '-7 or so: 8', ('8',), 1),
  ('word', 'value: "ab-c".', ('ab-c',), 1),
  ('word', 'value xab-c', ('ab-c',), 0),
  ('name', 'It is alice.', ('ALICE',), 1),
  ('name', 'It is Alices', ('ALICE',), 0),
  ('choice', 'B is right', ('B', 'text'), 1),
  ('choice', 'the answer is: C', ('C', 'text'), 1),
  ('choice', 'the answer is: C', ('B', 'text'), 0),
  ('choice', 'I think D maybe', ('D', 'text'), 1),
  ('choice', 'nothing', ('D', 'text'), 0),
  ('letter_or_name', 'A. parse', ('A', 'parse'), 1),
  ('letter_or_name', 'The answer is: parse()', ('A', 'parse'), 1),
  ('letter_or_name', 'The answer is: B', ('A', 'parse'), 0),
  ('letter_or_name', 'parse', ('A', 'parse'), 0),
  ('partial_sums', '[1, 4, 9]', ('1', '4', '8', '2'), 0.5),
  # LongBench.
  ('numbers', 'Paragraph 12', ('Paragraph 12',), 1),
  ('numbers', '12 or 13', ('Paragraph 12',), 0.5),
  ('numbers', 'none', ('7',), 0),
  ('f1', 'The cat sat.', ('a cat sat down',), 0.8),
  ('f1', 'cat', ('dog', 'the cat'), 1),
  ('f1_characters', '北京。', ('北京市',), 0.8),
  ('rouge_l', 'a b c d', ('a x c d',), 0.75),
  ('rouge_l_sum', 'a b\nc d', ('c d\na b',), 1),
  ('code_line', '# note\nx = 1\ny', ('x = 1',), 1),
  ('first_line_f1', '\nParis\nLondon', ('Paris',), 1),
  ('first_line_rouge_l', 'one two\nthree', ('one two',), 1),
]


@pytest.mark.parametrize('metric, prediction, answers, want', CASES)
def test_vectors(metric, prediction, answers, want):
  got = scores.METRICS[metric](prediction, answers, ())
  assert got == pytest.approx(want)


def test_every_metric_has_a_vector():
  tested = {case[0] for case in CASES} | {'first_line_classes'}
  assert tested == set(scores.METRICS)


def test_classes():
  metric = scores.METRICS['first_line_classes']
  choices = ('city', 'Other city', 'person')
  assert metric('city', ('city',), choices) == 1
  assert metric('city or person', ('city',), choices) == 0.5
  # A class within the right one's name does not count as a second one.
  assert metric('Other city', ('Other city',), choices) == 1
  assert metric('person\ncity', ('city',), choices) == 0


@pytest.mark.parametrize('metric', sorted(scores.METRICS))
@given(prediction=st.text(max_size=60))
def test_any_text_scores_between_0_and_1(metric, prediction):
  answers = ('12', '34')
  got = scores.METRICS[metric](prediction, answers, ('12', '5'))
  assert 0 <= got <= 1
  assert scores.METRICS[metric]('', answers, ('12', '5')) == 0


@given(st.lists(st.sampled_from('abc')), st.lists(st.sampled_from('abc')))
def test_longest_common_subsequence(a, b):
  found = text_scores._common(a, b)
  picked = iter(b)
  assert all(a[i] in picked for i in found)  # a subsequence of b, in order
  assert found == sorted(set(found))
  # Brute force over subsets of the shorter inputs.
  if len(a) <= 8:
    best = 0
    for mask in range(2 ** len(a)):
      rest = iter(b)
      chosen = [x for i, x in enumerate(a) if mask >> i & 1]
      if all(x in rest for x in chosen):
        best = max(best, len(chosen))
    assert len(found) == best
