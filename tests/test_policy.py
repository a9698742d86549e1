"""The policy file: evidence decides, contradictions are refused."""

import json
import types

import pytest

from experiments import answers, fit_policy
from lcx import engine, methods, policy
from lcx.models.presets import PRESETS
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


def test_below_its_crossover_one_device_reads_densely(monkeypatch, caplog):
  """Rows of several devices give an entry, which APB asks for, and obeys."""
  rows = [
    {
      'op': 'layer',
      'case': f'tiny {length}',
      'implementation': 'apb',
      'peer': 'one device',
      'device': '8 x CPU',
      'devices': 4,
      'parts': '',
      'length': length,
      'ratio': ratio,
    }
    for length, ratio in ((256, 0.5), (512, 0.9), (1024, 1.5))
  ]
  (found,) = fit_policy.entries(rows)
  assert (found.op, found.device, found.crossover) == (
    'prefill',
    '4 x CPU',
    1024,
  )
  monkeypatch.setattr(policy, 'load', lambda: Policy((found,)))
  config = PRESETS['tiny']
  apb = methods.get_method('apb').prefill
  assert apb.alone_below(config, '4 x CPU') == 1024
  assert apb.alone_below(config, '2 x CPU') == 0
  asked = methods.get_method('apb', crossover=7).prefill
  assert asked.alone_below(config, '4 x CPU') == 7

  monkeypatch.setattr(answers.environment, 'device', lambda: '4 x CPU')
  made = []
  monkeypatch.setattr(
    engine, 'Engine', lambda *args, **kwargs: made.append((*args, kwargs))
  )
  setting = answers.Setting(1, 0, 1, 0, None, 'allow', mesh=(1, 4, 1))
  model = types.SimpleNamespace(config=config, weights=None)
  for length in (512, 1024):
    answers.make_engine(model, methods.get_method('apb'), length, setting)
  (*_, short, first), (*_, long, second) = made
  assert short.prefill == methods.get_method('dense').prefill
  assert short.decode == long.decode
  assert long.prefill == apb
  assert first['mesh'].size == 1 and second['mesh'].size == 4
  assert '512 tokens are below its crossover of 1024' in caplog.text
