"""Long outputs: rows beside dense attention's, made once."""

import json

import pytest

from experiments import long_output, run

KEPT = {'sink': 4, 'recent': 60}


def config(**fields):
  found = {
    'model': 'preset:tiny',
    'methods': {
      'streaming': dict.fromkeys(('prefill', 'cache', 'decode'), KEPT)
    },
    'task': 'niah_single_2',
    'length': 512,
    'new_tokens': 12,
    'samples': 1,
    'dtype': 'float32',
  }
  return long_output.Config(**(found | fields))


def test_the_first_difference_and_the_share():
  assert long_output._beside([1, 2, 3, 4], [1, 2, 9, 4]) == {
    'diverges_at': 2,
    'alike': 0.75,
  }
  assert long_output._beside([1, 2], [1, 2]) == {'diverges_at': 2, 'alike': 1.0}


@pytest.mark.long  # the smoke of its config runs in every test
def test_rows_stand_beside_dense_and_are_made_once(tmp_path, capsys):
  long_output.run(config(), tmp_path)
  lines = (tmp_path / 'results.jsonl').read_text().splitlines()
  dense, other = map(json.loads, lines)
  assert (dense['method'], other['method']) == ('dense', 'streaming')
  assert dense['diverges_at'] == len(dense['tokens']) == 12
  assert other['status'] == 'ok' and other['score'] is not None
  assert other['alike'] < 1.0 and other['diverges_at'] < 12
  assert 'leaves dense at token' in capsys.readouterr().out
  long_output.run(config(), tmp_path)
  assert (tmp_path / 'results.jsonl').read_text().splitlines() == lines


def test_the_kind_is_known():
  assert 'long_output' in run.KINDS
