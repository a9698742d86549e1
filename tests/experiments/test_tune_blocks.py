"""The sweep of block sizes: what it enters into the tuned table, what not."""

import json
import subprocess
import types

import pytest
from absl.testing import flagsaver

from experiments import tune_blocks
from kernels_pallas import dispatch

CHIP = 'NVIDIA H200'


@pytest.fixture
def sweep(tmp_path, monkeypatch):
  """times -> the table after a sweep; a candidate's time is by its sizes."""
  table = tmp_path / 'tuned.json'
  monkeypatch.setattr(tune_blocks, 'TABLE', table)
  monkeypatch.setattr(dispatch, '_TUNED', table)

  def run(time_of):
    def child(command, **kwargs):
      sizes = json.loads(command[-1].partition('=')[2])
      ms = time_of(sizes)
      if ms is None:
        return types.SimpleNamespace(returncode=1, stdout='', stderr='no\nwhy')
      if ms < 0:
        raise subprocess.TimeoutExpired(command, kwargs['timeout'])
      line = json.dumps({'ms': ms, 'device': CHIP})
      return types.SimpleNamespace(returncode=0, stdout=f'a\n{line}\n')

    monkeypatch.setattr(subprocess, 'run', child)
    given = {'function': 'attend_pages', 'bits': '8', 'tokens': '4096'}
    with flagsaver.as_parsed(candidate='', **given):
      tune_blocks.main([])
    dispatch._table.cache_clear()
    return dispatch.tuned('attend_pages', CHIP, 'bits8')

  yield run
  dispatch._table.cache_clear()


def test_the_best_candidate_is_what_a_kernel_reads(sweep, capsys):
  best = {'keys': 128, 'splits': 16, 'stages': 2}

  def time_of(sizes):
    if not sizes:
      return 1.0
    if sizes['splits'] == 8:  # one that does not compile, one that hangs
      return None if sizes['keys'] == 64 else -1
    return 0.5 if sizes == best else 2.0

  assert sweep(time_of) == best
  said = capsys.readouterr().out
  assert 'why' in said and 'longer than' in said
  entry = json.loads(tune_blocks.TABLE.read_text())['attend_pages'][CHIP]
  assert entry['bits8']['evidence'] == {
    'tokens': 4096,
    'ms': 0.5,
    'default_ms': 1.0,
    'candidates': 1 + 2 * 2 * 3,
  }
  # Another bucket's entry stays when one is written anew.
  entry['bits4'] = {'sizes': {'keys': 64}}
  tune_blocks.TABLE.write_text(json.dumps({'attend_pages': {CHIP: entry}}))
  assert sweep(lambda sizes: 0.9 if sizes == best else 1.0) == best
  assert dispatch.tuned('attend_pages', CHIP, 'bits4') == {'keys': 64}


def test_a_default_that_is_nearly_the_best_stays(sweep):
  assert sweep(lambda sizes: 0.995 if sizes else 1.0) == {}
  assert not tune_blocks.TABLE.exists()


def test_without_the_default_there_is_nothing_to_compare(sweep):
  with pytest.raises(ValueError, match='the default sizes did not run'):
    sweep(lambda sizes: 1.0 if sizes else None)
