"""No method falls below its record; `tests.quality.record` makes records."""

import functools

import pytest

from tests.quality import measure, records

# They read prompts as apb does with nothing passed, and as streaming.
ALIKE = ('star', 'a_shape')
CASES = [
  pytest.param(
    label,
    name,
    id=f'{label}-{name}',
    marks=[
      *[pytest.mark.long]
      * (is_long or measure.is_exact(name) or name in ALIKE),
      pytest.mark.xdist_group(label),
    ],
  )
  for label, (_, after, is_long) in measure.GROUPS.items()
  for name in measure.names(after)
]


@functools.cache
def scores(label, name):
  return measure.group(label).measure(name)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(('label', 'name'), CASES)
def test_no_method_falls_below_its_record(label, name):
  command = f'python -m tests.quality.record {name}'
  record = records.read().get(label, {}).get(name)
  if record is None and measure.GROUPS[label][2]:
    pytest.skip(f'no long record yet: {command} --long')
  assert record is not None, f'{name} has no record: {command}'
  fall = records.worse(scores(label, name), record)
  assert fall is None, f'{name}: {fall}; if it must be, {command}'


def test_dense_masters_what_is_watched():
  for label, methods in records.read().items():
    for cell, row in methods['dense'].items():
      assert row['score'] >= 0.9, (label, cell)


def test_every_record_is_of_a_method_and_a_cell():
  for label, found in records.read().items():
    cells, after, _ = measure.GROUPS[label]
    assert set(found) <= set(measure.names(after))
    for rows in found.values():
      assert set(rows) == {cell.name for cell in cells}


def score(hits, kl=0.0):
  return measure.Score(hits, '1' * len(hits), kl, 1.0, 0.0)


def test_a_fall_is_found_and_an_accident_is_not():
  record = {'a': records.row(score('1' * 16)), 'b': records.row(score('11'))}

  def worse(hits, kl=0.0):
    return records.worse({'a': score(hits, kl), 'b': score('11')}, record)

  assert worse('1' * 16) is None
  assert worse('0' * 4 + '1' * 12) is None
  assert '5 answers lost' in worse('0' * 5 + '1' * 11)
  assert worse('1' * 16, kl=0.019) is None
  assert 'a: KL to dense' in worse('1' * 16, kl=0.021)


def test_sign_test():
  assert measure.falls(0, 0) == 1.0
  assert measure.falls(5, 0) == 1 / 32
  assert measure.falls(1, 1) == 3 / 4
  assert measure.lost_and_won('1100', '1010') == (1, 1)


@pytest.mark.timeout(600)
@pytest.mark.xdist_group('with')  # which measures it, too
def test_a_method_that_sees_less_is_caught():
  """A budget cut to nothing falls below the record of the method."""
  record = records.read()['with']['tokenselect']
  broken = scores('with', 'streaming')  # stands in for a method gone blind
  assert 'answers lost' in records.worse(broken, record)
