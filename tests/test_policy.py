"""The policy file: evidence decides, contradictions are refused."""

import dataclasses
import types
from typing import Any

import pytest

from experiments import answers, fit_policy
from lcx import engine, methods, policy
from lcx.models.presets import PRESETS
from lcx.policy import Entry, Policy

SHAPE = {'heads': 32, 'kv_heads': 8, 'head_dim': 128, 'bits': 16}


def pairs(**ratios):
  """Evidence of one setting from a4=0.9, a8=1.1."""
  return tuple((int(n[1:]), ratio, 'a') for n, ratio in ratios.items())


def entry(evidence, device='H100', **fields):
  crossover = policy.crossover_of(evidence)
  assert crossover is not None
  return Entry(
    'step',
    'lserve',
    device,
    **(SHAPE | fields),
    crossover=crossover,
    evidence=evidence,
  )


def test_a_crossover_is_where_it_is_faster_from_then_on():
  assert policy.crossover_of(pairs(a4=1.2, a8=0.9, a16=1.1, a32=2.0)) == 16
  # A gap belongs to dense, however wide; a tie is no win.
  assert policy.crossover_of(pairs(a4=0.9, a512=1.1)) == 512
  assert policy.crossover_of(pairs(a4=1.0, a8=1.1)) == 8
  # One setting that loses is enough.
  mixed = ((4, 0.9, '1/16'), (8, 1.1, '1/16'), (8, 0.9, '1/8'), (16, 2.0, 'b'))
  assert policy.crossover_of(mixed) == 16


def test_what_is_not_bracketed_has_no_crossover():
  assert policy.crossover_of(pairs(a4=1.2, a8=1.3)) is None
  assert policy.crossover_of(pairs(a4=0.2, a8=0.3)) is None
  assert policy.crossover_of(pairs(a4=0.9, a8=1.2, a16=1.0)) is None
  assert policy.crossover_of(()) is None


def test_a_policy_survives_its_file_and_answers(tmp_path):
  path = tmp_path / 'policy.json'
  both = (
    entry(pairs(a16=0.9, a32=1.1)),
    entry(pairs(a16=0.8, a64=1.3), device='v5e'),
  )
  path.write_text(Policy(both).to_json())
  found = policy.load(path)
  assert found.entries == both
  assert found.crossover('step', 'lserve', device='H100', **SHAPE) == 32
  assert found.crossover('step', 'lserve', device='v5e') == 64
  assert found.crossover('step', 'lserve') is None  # two chips disagree
  assert found.crossover('step', 'quest', device='H100') is None


def test_what_is_no_policy_is_refused(tmp_path):
  path = tmp_path / 'policy.json'
  with pytest.raises(ValueError, match='cannot be read'):
    policy.load(path)
  good = Policy((entry(pairs(a16=0.9, a32=1.1)),)).to_json()
  wrong = good.replace('"crossover": 32', '"crossover": 16')
  assert wrong != good
  for text in ('{', '[]', '{"entries": [{}]}', wrong):
    path.write_text(text)
    with pytest.raises(ValueError, match='is no policy'):
      policy.load(path)
  with pytest.raises(ValueError, match='ascending'):
    entry(pairs(a32=1.1, a16=0.9))


def test_entries_come_from_rows():
  rows = [
    {
      'op': 'step',
      'case': f'llama3_8b {length}',
      'implementation': name,
      'peer': 'dense',
      'device': '1 x H100',
      'parts': f"Method(name='{method}', prefill=P(budget=3), cache=C(bits=8), "
      'decode=D(budget=9))',
      'length': length,
      'ratio': ratio,
    }
    for length in (16, 32)
    for name, method, ratio in (
      ('dense', 'dense', 1.0),
      ('lserve, int8', 'lserve', length / 20),
      ('static only', 'lserve', length / 10),
    )
  ]
  evidence = ((16, 0.8, 'D(budget=9)'), (32, 1.6, 'D(budget=9)'))
  assert fit_policy.fit(rows).entries == (entry(evidence, bits=8),)
  assert fit_policy.fit(rows[:3]).entries == ()  # one length, which lost
  low = [x | {'case': x['case'].replace(' ', ' w8a8 ')} for x in rows]
  assert fit_policy.fit(low).entries == ()


def selector_rows(name, length, dense, sparse, git='a', host=1.0):
  """Rows as selector_bench has them; `host` times as slow from the host."""

  def row(case, implementation, ms, host=1.0):
    return {
      'op': 'attention',
      'case': case,
      'implementation': implementation,
      'device': '1 x H200',
      'git': git,
      'kernel_ms': [ms, ms, 9 * ms],
      'repeats_ms': [host * ms],
      'ratio': 7.0,
    }

  case = f'{name} 1/8 of {length}, density 0.1250'
  return [
    row(f'dense {length}', 'ours', dense),
    row(f'dense {length}', 'cudnn', dense / 9),
    row(case, 'ours', sparse, host),
    row(case, 'cudnn', dense / 9),
    row(case, 'ours', sparse, host) | {'op': 'estimate'},
  ]


def test_a_selector_is_compared_with_the_dense_that_takes_its_place():
  rows = [
    *selector_rows('sparge', '4K', 1.0, 2.0),
    *selector_rows('sparge', '64K', 1.0, 0.25),
    *selector_rows('never', '4K', 1.0, 2.0),
    *selector_rows('always', '4K', 1.0, 0.5),
    *selector_rows('waiting', '4K', 1.0, 2.0),
    *selector_rows('waiting', '8K', 1.0, 0.5, host=4.0),
    *selector_rows('waiting', '16K', 1.0, 0.5),
  ]
  sparge, waiting = fit_policy.fit(rows).entries
  setting = '1/8, density 0.1250'
  assert sparge == Entry(
    'attention',
    'sparge',
    'H200',
    **SHAPE,
    crossover=65536,
    evidence=((4096, 0.5, setting), (65536, 4.0, setting)),
  )
  # The worse of two clocks counts.
  assert waiting.crossover == 16384
  assert waiting.evidence[1] == (8192, 0.5, setting)
  # What lists by a model's keys is weighed on them, against dense on the same.
  whose = ', keys of m-1.5b'
  for name, by in ('vertical_slash_1_2', ''), ('sparge_60', ' threshold 0.98'):
    crossed = [
      row | {'case': row['case'].replace(' 1/8', by) + mass + whose}
      for n, ms in (('8K', 2.0), ('16K', 0.5))
      for row in selector_rows(name, n, 1.0, ms)
      for mass in (', mass 0.9' * ('density' in row['case']),)
    ]
    (found,) = fit_policy.fit(crossed + rows[:5]).entries
    assert (found.method, found.crossover) == (name, 16384)
    setting = f'{by}, density 0.1250'.strip(' ,')
    assert found.evidence[0] == (8192, 0.5, setting)
  # Dense rows of other code or another length are no rivals.
  alone = [row for row in rows if not row['case'].startswith('dense')]
  other = selector_rows('other', '4K', 1.0, 1.0, git='b')
  assert fit_policy.groups(alone + other[:2]) == {}


def test_the_committed_policy_is_what_the_committed_rows_say():
  """Run `python -m experiments.fit_policy` when rows have changed."""
  found = fit_policy.fit(fit_policy.read(fit_policy.committed()))
  assert policy.DEFAULT.read_text('utf-8') == found.to_json()
  assert policy.load() == found
  assert found.entries  # rows of one H200


def test_files_that_hold_no_rows_are_refused(tmp_path):
  path = tmp_path / 'rows.jsonl'
  with pytest.raises(ValueError, match='No such file'):
    fit_policy.read([path])
  path.write_text('{"op": "step"}\n{')
  with pytest.raises(ValueError, match='no row'):
    fit_policy.read([path])


def test_below_its_crossover_one_device_reads_densely(monkeypatch, caplog):
  """Rows of several devices give an entry, which APB asks for, and obeys."""
  rows = [
    {
      'op': 'layer',
      'case': f'tiny {length}',
      'implementation': 'apb',
      'peer': 'one device',
      'device': '8 x cpu',
      'devices': 4,
      'parts': '',
      'length': length,
      'ratio': ratio,
    }
    for length, ratio in ((256, 0.5), (512, 0.9), (1024, 1.5))
  ]
  (found,) = fit_policy.fit(rows).entries
  assert (found.op, found.device, found.crossover) == (
    'prefill',
    '4 x cpu',
    1024,
  )
  monkeypatch.setattr(policy, 'load', lambda: Policy((found,)))
  config = PRESETS['tiny']
  apb = methods.get_method('apb').prefill
  assert apb.alone_below(config, '4 x cpu') == 1024
  assert apb.alone_below(config, '2 x cpu') == 0
  asked = methods.get_method('apb', crossover=7).prefill
  assert asked.alone_below(config, '4 x cpu') == 7
  # It is APB's: Star, its subclass, has its own.
  star = methods.get_method('star').prefill
  assert star.alone_below(config, '4 x cpu') == 0

  made: list[Any] = []
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
  # 8 devices are visible: those of the mesh count, along the sequence.
  method = methods.get_method('apb')
  for mesh in ((1, 1, 1), (1, 2, 1), (1, 1, 4), (1, 4, 2), (2, 1, 2)):
    setting = dataclasses.replace(setting, mesh=mesh)
    answers.make_engine(model, method, 512, setting)
    assert made[-1][2].prefill == apb, mesh
  setting = dataclasses.replace(setting, mesh=(2, 4, 1))
  answers.make_engine(model, method, 512, setting)
  assert made[-1][2].prefill != apb
