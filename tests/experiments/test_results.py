"""Rows survive kills, torn lines and full disks; keys follow content."""

import errno
import json
import os
import random
import subprocess
import sys
import textwrap

import pytest

from experiments import errors
from experiments.results import Results, key_of, write_file


def row(i, **more):
  return {'key': f'k{i}', 'value': i, 'text': 'naïve\n' * 3, **more}


def test_rows_come_back_and_the_newest_of_a_key_wins(tmp_path):
  with Results(tmp_path / 'a' / 'r.jsonl') as results:
    results.append([row(0), row(1)])
    results.append([row(1, value=7)])
  with Results(tmp_path / 'a' / 'r.jsonl') as results:
    assert results.rows == {'k0': row(0), 'k1': row(1, value=7)}


@pytest.mark.parametrize('cut', [1, 2, 17, 60])
def test_torn_last_line_is_cut_away(tmp_path, cut):
  path = tmp_path / 'r.jsonl'
  with Results(path) as results:
    results.append([row(0)])
    whole = path.stat().st_size
    results.append([row(1)])
  os.truncate(path, path.stat().st_size - cut)
  with Results(path) as results:
    assert list(results.rows) == ['k0']
    assert results.repaired > 0
    assert path.stat().st_size == whole
    results.append([row(2)])
  assert [json.loads(line)['key'] for line in path.open()] == ['k0', 'k2']


def test_a_torn_only_line_leaves_an_empty_file(tmp_path):
  path = tmp_path / 'r.jsonl'
  path.write_bytes(b'{"key": "k0", "sc')
  with Results(path) as results:
    assert not results.rows
  assert path.read_bytes() == b''


def test_lines_that_are_no_rows_are_skipped_and_kept(tmp_path):
  path = tmp_path / 'r.jsonl'
  good = json.dumps(row(0)).encode()
  path.write_bytes(b'\0\0\0\n' + good + b'\n[1]\n{"a": 1}\n\n')
  with Results(path) as results:
    assert list(results.rows) == ['k0']
    assert results.skipped == [1, 3, 4, 5]
    results.append([row(1)])
  assert path.read_bytes().startswith(b'\0\0\0\n' + good)
  with Results(path) as results:
    assert list(results.rows) == ['k0', 'k1']


def test_two_runs_do_not_share_a_file(tmp_path):
  with Results(tmp_path / 'r.jsonl') as first:
    first.append([row(0)])
    with pytest.raises(ValueError, match='another run writes here'):
      Results(tmp_path / 'r.jsonl')
  with Results(tmp_path / 'r.jsonl') as again:
    assert list(again.rows) == ['k0']


@pytest.mark.parametrize('short', [0, 5])
def test_full_disk_keeps_what_was_written(tmp_path, monkeypatch, short):
  path = tmp_path / 'r.jsonl'
  write = os.write
  with Results(path) as results:
    results.append([row(0)])
    before = path.read_bytes()
    calls = iter([lambda f, d: write(f, d[:short]), None])

    def full(file, data):
      now = next(calls)
      if now is None or not short:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      return now(file, data)

    monkeypatch.setattr(os, 'write', full)
    with pytest.raises(OSError) as caught:
      results.append([row(1), row(2)])
    monkeypatch.undo()
    line, code = errors.describe(caught.value)
    assert code == 1
    assert str(path) in line
    assert 'what was written before is kept' in line
    assert path.read_bytes() == before
    assert list(results.rows) == ['k0']
    results.append([row(1)])
  with Results(path) as results:
    assert list(results.rows) == ['k0', 'k1']


def test_file_size_limit_is_a_full_disk(tmp_path):
  program = textwrap.dedent("""
    import resource, sys
    from experiments import errors
    from experiments.results import Results
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    with Results(sys.argv[1]) as results:
      try:
        for i in range(1000):
          results.append([{'key': str(i), 'text': 'x' * 100}])
      except OSError as error:
        print(len(results.rows), errors.describe(error)[1])
  """)
  done = subprocess.run(
    [sys.executable, '-c', program, tmp_path / 'r.jsonl'],
    capture_output=True,
    text=True,
    timeout=60,
    check=True,
  )
  count, code = done.stdout.split()
  assert (int(count) > 10, code) == (True, '1')
  with Results(tmp_path / 'r.jsonl') as results:
    assert len(results.rows) == int(count)
    assert not results.repaired


def test_full_disk_of_a_checkpoint_is_no_lack_of_memory():
  error = ValueError(  # as orbax passes on what tensorstore says
    'RESOURCE_EXHAUSTED: Error writing "x" in OCDBT database: Failed writing: '
    '"/run/d/c0": Failed to write 9 bytes to file 18: No space left on device '
    "[os_error_code='28']"
  )
  line, code = errors.describe(error)
  assert code == 1
  assert line.startswith('/run/d/c0: No space left on device: what was written')


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / 'report.md'
  write_file(path, 'old')

  def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='No space'):
    write_file(path, 'new' * 100)
  assert path.read_text() == 'old'
  assert [p.name for p in tmp_path.iterdir()] == ['report.md']


def test_kill_at_any_byte(tmp_path):
  """Whatever prefix of the file a kill leaves, whole rows come back."""
  path = tmp_path / 'r.jsonl'
  rng = random.Random(0)
  with Results(path) as results:
    results.append([row(i, text='x' * rng.randrange(40)) for i in range(20)])
  data = path.read_bytes()
  for size in rng.sample(range(len(data)), 60):
    path.write_bytes(data[:size])
    with Results(path) as results:
      assert len(results.rows) == data[:size].count(b'\n')
      results.append([row(99)])
    with Results(path) as results:
      assert len(results.rows) == data[:size].count(b'\n') + 1


def test_keys():
  identity = {'length': 1024, 'method': 'quest', 'samples': (1, 2)}
  same = dict(reversed(identity.items()))
  assert key_of(identity) == key_of(same)
  for name, value in (('length', 1025), ('method', 'x'), ('samples', (2, 1))):
    assert key_of(identity) != key_of(identity | {name: value})


def test_rows_hold_no_nan(tmp_path):
  with Results(tmp_path / 'r.jsonl') as results:
    with pytest.raises(ValueError):
      results.append([row(0, score=float('nan'))])
    assert not results.rows
  assert (tmp_path / 'r.jsonl').read_bytes() == b''
