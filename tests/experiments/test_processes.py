"""One command in several processes: agreement, deaths, resuming, results."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from experiments import evaluate, processes, resolve, run, witness
from tests import xla_flags
from tests.experiments import two_devices

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(240)]

ROOT = pathlib.Path(__file__).parent.parent.parent
FAKE = [str(pathlib.Path(__file__).parent / 'fake.py')]
REAL = ['-m', 'experiments.run']
SMOKE = [f'--config={ROOT}/configs/quickstart.py:smoke']
MESH = '--config.mesh=(1, 2, 1)'
HEARTBEAT = 4


def free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


class Group:
  """Processes of one run; output goes to files, so that nobody blocks."""

  def __init__(self, folder, n, args, program=FAKE, extra=(), **environment):
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    self.logs = [folder / f'log{i}' for i in range(n)]
    self.all = []
    for i, log in enumerate(self.logs):
      more = extra[i] if extra else []
      with open(log, 'wb') as out:
        self.all.append(
          subprocess.Popen(
            [sys.executable, *program, *args, *more]
            + [f'--coordinator=localhost:{port}', f'--processes={n}']
            + [f'--process={i}', f'--heartbeat={HEARTBEAT}'],
            env=os.environ
            | {
              'PYTHONPATH': str(ROOT),
              'XLA_FLAGS': ' '.join(xla_flags.FAST_TO_COMPILE),
              'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
            }
            | environment,
            cwd=ROOT,
            stdout=out,
            stderr=out,
          )
        )

  def wait(self, seconds=200):
    """Exit codes and what each wrote, the witness' line included."""
    codes = [p.wait(seconds) for p in self.all]
    time.sleep(0.3)
    return codes, [log.read_text() for log in self.logs]

  def kill(self):
    for p in self.all:
      if p.poll() is None:
        p.kill()


@pytest.fixture
def start():
  made = []

  def call(*args, **kwargs):
    made.append(Group(*args, **kwargs))
    return made[-1]

  yield call
  for group in made:
    group.kill()


def rows(workdir):
  log = workdir / 'results.jsonl'
  lines = log.read_text().splitlines() if log.exists() else []
  return [json.loads(line) for line in lines]


def until_rows(group, workdir, n, seconds=60):
  end = time.monotonic() + seconds
  while len(rows(workdir)) < n:
    assert group.all[0].poll() is None, group.wait()
    assert time.monotonic() < end, f'no {n} rows after {seconds} s'
    time.sleep(0.1)


@pytest.mark.parametrize('victim', [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_dead_process_ends_the_others_and_the_run_goes_on(
  tmp_path, start, victim
):
  workdir = tmp_path / 'run'
  args = [*SMOKE, MESH, f'--workdir={workdir}']
  group = start(tmp_path / 'logs', 2, args, FAKE_MS='700')
  until_rows(group, workdir, 2)
  group.all[victim].send_signal(signal.SIGKILL)
  killed = time.monotonic()
  codes, texts = group.wait(60)
  assert time.monotonic() - killed < 60
  assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, None)
  last = texts[1 - victim].strip().splitlines()[-1]
  name = re.escape(socket.gethostname())
  assert re.match(rf'error: process {victim} \({name}\) died', last), last
  before = rows(workdir)
  assert 2 <= len(before) < 12
  again = start(tmp_path / 'again', 2, args)
  codes, texts = again.wait()
  assert codes == [0, 0], texts
  assert rows(workdir)[: len(before)] == before
  assert len(rows(workdir)) == 12 == len({r['key'] for r in rows(workdir)})
  assert 'report:' in texts[0] and 'report:' not in texts[1]


@pytest.mark.parametrize(
  ('extra', 'says'),
  [
    (
      [['--config.seed=1'], ['--config.seed=2']],
      r'disagree on config\.seed: process 0 \(.*\) has 1, process 1 .* has 2',
    ),
    (
      [[], ['--config.nothing=2']],
      r'config\.nothing does not exist',
    ),
    pytest.param(
      [['--config.mesh=(1, 8, 1)']] * 2,
      r'mesh data=1 x seq=8 x model=1 needs 8 devices',
      marks=pytest.mark.long,
    ),
  ],
  ids=['seed', 'field', 'mesh'],
)
def test_what_is_wrong_is_said_on_every_host(tmp_path, start, extra, says):
  begin = time.monotonic()
  args = [*SMOKE, f'--workdir={tmp_path / "run"}']
  group = start(tmp_path / 'logs', 2, args, extra=extra)
  codes, texts = group.wait(60)
  assert time.monotonic() - begin < 60
  assert all(code in (1, 2) for code in codes), texts
  for text in texts:
    errors = [x for x in text.splitlines() if x.startswith('error: ')]
    assert len(errors) == 1 and re.search(says, errors[0]), text


def check_real(tmp_path, start, n, hosts):
  """n processes give the row that one process with n devices gives."""
  size = f'--config.mesh=(1, {n}, 1)'
  arguments = [
    f'--config={ROOT}/tests/experiments/two_devices.py',
    f'--workdir={tmp_path / "run"}',
    f'--config.methods.apb.hosts={hosts}',
    size,
  ]
  codes, texts = start(tmp_path / 'logs', n, arguments, REAL).wait()
  assert codes == [0] * n, texts
  values = run._plain(two_devices.get_config())
  del values['kind'], values['compilation_cache']
  values['methods']['apb']['hosts'] = hosts
  config = resolve.resolve(evaluate.Config, values)
  config = dataclasses.replace(config, mesh=(1, n, 1))
  evaluate.run(config, tmp_path / 'one')
  (got,), (want,) = rows(tmp_path / 'run'), rows(tmp_path / 'one')
  for name in ('prediction', 'score', 'keys_attended', 'density', 'digest'):
    assert got[name] == want[name], name


LEAVES = """
import atexit, sys, threading
from experiments import processes
names = lambda: [thread.name for thread in threading.enumerate()]
atexit.register(lambda: print('left:', 'listener' in names()))
_, coordinator, total, process, heartbeat = (
  x.rpartition('=')[2] for x in ['', *sys.argv[1:]]
)
processes._POLL = 1e-4
processes.start(coordinator, int(total), int(process), heartbeat=int(heartbeat))
print('begun:', 'listener' in names())
processes.finish()
"""


def test_no_thread_outlives_a_good_run(tmp_path, start):
  """The interpreter's end aborts a process whose thread is in C++ then."""
  codes, texts = start(tmp_path, 2, [], ['-c', LEAVES]).wait(60)
  assert codes == [0, 0], texts
  for text in texts:
    assert 'begun: True' in text and 'left: False' in text, text


def test_two_processes_answer_as_one(tmp_path, start):
  check_real(tmp_path, start, 2, 2)


@pytest.mark.long
def test_four_processes_answer_as_one(tmp_path, start):
  check_real(tmp_path, start, 4, 8)


@pytest.mark.long
def test_delay_changes_time_and_no_result(tmp_path, start):
  """One process is held up, again and again, as a slow network would."""
  args = [f'--config={ROOT}/tests/experiments/two_devices.py']
  found, times = [], []
  for name, pause in (('fast', 0.0), ('slow', 0.4)):
    group = start(
      tmp_path / name, 2, [*args, f'--workdir={tmp_path / name}/run'], REAL
    )
    begin = time.monotonic()
    while group.all[0].poll() is None and time.monotonic() - begin < 200:
      if pause:
        group.all[1].send_signal(signal.SIGSTOP)
        time.sleep(pause)
        group.all[1].send_signal(signal.SIGCONT)
      time.sleep(0.1)
    codes, texts = group.wait()
    times.append(time.monotonic() - begin)
    assert codes == [0, 0], texts
    (row,) = rows(tmp_path / name / 'run')
    found.append({k: row[k] for k in ('prediction', 'keys_attended')})
  assert found[0] == found[1]
  assert times[1] > times[0]


def test_a_missing_cluster_or_number_is_refused():
  with pytest.raises(ValueError, match=r'--process=2 must be'):
    processes.start('localhost:1', 2, 2)
  with pytest.raises(ValueError, match='must be HOST:PORT'):
    processes.start('localhost', 2, 1)
  with pytest.raises(ValueError, match='--heartbeat=1'):
    processes.start('localhost:1', 2, 1, heartbeat=1)


def test_one_process_needs_no_others():
  assert processes.count() == 1 and processes.index() == 0
  assert processes.share([1]) == [1]
  processes.agree({'x': 1})
  processes.finish()
  processes.fail('nothing', 1)  # returns


def test_the_verdict_names_who_died():
  fatal = 'F1125 client.h:86] Terminating process because the ' + witness._FATAL
  names = ['a', 'b', 'c']
  assert witness.verdict(['all well'], names, 9) is None
  silent = ['The following tasks are unhealthy (stopped sending heartbeats):']
  line = witness.verdict([fatal, *silent, '1', '2', 'The tasks'], names, 9)
  assert line.startswith('error: process 1 (b), 2 (c) died: nothing heard')
  leader = [f'{fatal}. {witness._LEADER} was preempted']
  assert 'process 0 (a) died' in witness.verdict(leader, names, 9)
  assert 'another process died' in witness.verdict([fatal], names, 9)
