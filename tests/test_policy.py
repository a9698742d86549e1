"""The policy file: evidence decides, contradictions are refused."""

import json

import pytest

from experiments import fit_policy
from lcx import policy
from lcx.policy import Entry, Policy

WHERE = {'heads': 32, 'kv_heads': 8, 'head_dim': 128, 'bits': 16}


def entry(evidence, device='H100', **fields):
  return Entry(
    'step',
    'lserve',
    device,
    **(WHERE | fields),
    crossover=policy.crossover_of(evidence),
    evidence=evidence,
  )


def test_a_crossover_is_where_it_is_faster_from_then_on():
  assert policy.crossover_of(((4, 1.2), (8, 0.9), (16, 1.1), (32, 2.0))) == 16
  assert policy.crossover_of(((4, 1.2), (8, 1.3))) == 4
  assert policy.crossover_of(((4, 1.2), (8, 1.0))) is None


def test_a_policy_survives_its_file_and_answers(tmp_path):
  path = tmp_path / 'policy.json'
  one = entry(((16, 0.9), (32, 1.1)))
  found = Policy().with_entry(entry(((16, 1.5),))).with_entry(one)
  assert found.entries == (one,)
  found = found.with_entry(entry(((16, 0.8),), device='v5e'))
  path.write_text(found.to_json())
  found = policy.load(path)
  assert found.crossover('step', 'lserve', device='H100', **WHERE) == 32
  assert found.crossover('step', 'lserve', device='v5e') == 2**30
  assert found.crossover('step', 'lserve') is None  # two chips disagree
  assert found.crossover('step', 'quest', device='H100') is None


def test_what_is_no_policy_is_refused(tmp_path):
  path = tmp_path / 'policy.json'
  with pytest.raises(ValueError, match='cannot be read'):
    policy.load(path)
  wrong = json.loads(Policy((entry(((16, 0.9), (32, 1.1))),)).to_json())
  wrong['entries'][0]['crossover'] = 16
  for text in ('{', '[]', '{"entries": [{}]}', json.dumps(wrong)):
    path.write_text(text)
    with pytest.raises(ValueError, match='is no policy'):
      policy.load(path)
  with pytest.raises(ValueError, match='ascending'):
    entry(((32, 1.1), (16, 0.9)))


def test_entries_come_from_rows():
  rows = [
    {
      'op': 'step',
      'case': f'llama3_8b {length}',
      'implementation': name,
      'peer': 'dense',
      'device': '1 x H100',
      'parts': 'bits=8',
      'length': length,
      'ratio': ratio,
    }
    for length in (16, 32)
    for name, ratio in (('dense', 1.0), ('lserve', length / 20))
  ]
  assert fit_policy.entries(rows) == [entry(((16, 0.8), (32, 1.6)), bits=8)]
