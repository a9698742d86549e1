"""No method falls below its record; `tests.quality.record` makes records."""

import pytest

from tests.quality import measure, records

CASES = [
  pytest.param(
    label,
    name,
    id=f'{label}-{name}',
    marks=[pytest.mark.long] * is_long + [pytest.mark.xdist_group(label)],
  )
  for label, (_, after, is_long) in measure.GROUPS.items()
  for name in measure.names(after)
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(('label', 'name'), CASES)
def test_no_method_falls_below_its_record(label, name):
  command = f'python -m tests.quality.record {name}'
  record = records.read().get(label, {}).get(name)
  assert record is not None, f'{name} has no record: {command}'
  for cell, score in measure.group(label).measure(name).items():
    fall = records.worse(score, record[cell])
    assert fall is None, f'{name}, {cell}: {fall}; if it must be, {command}'


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
  record = records.row(score('1' * 16))
  assert records.worse(score('1' * 16), record) is None
  assert records.worse(score('0' * 4 + '1' * 12), record) is None
  assert '5 answers lost' in records.worse(score('0' * 5 + '1' * 11), record)
  assert records.worse(score('1' * 16, kl=0.019), record) is None
  assert 'KL to dense' in records.worse(score('1' * 16, kl=0.021), record)


def test_sign_test():
  assert measure.falls(0, 0) == 1.0
  assert measure.falls(5, 0) == 1 / 32
  assert measure.falls(1, 1) == 3 / 4
  assert measure.lost_and_won('1100', '1010') == (1, 1)


def test_a_method_that_sees_less_is_caught():
  """A budget cut to nothing falls below the record of the method."""
  record = records.read()['with']['tokenselect']
  group = measure.group('with')
  group.measure('dense')
  broken = group.measure('streaming')  # stands in for a method gone blind
  cell = 'niah_multikey_1 1024'
  assert 'answers lost' in records.worse(broken[cell], record[cell])
