"""The run with a fake engine: rows, restarts, kills, bad input."""

import errno
import importlib
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time

import jax
import pytest
from absl.testing import flagsaver

from experiments import (
  answers,
  environment,
  errors,
  evaluate,
  models,
  report,
  resolve,
  results,
  run,
)
from lcx import head_profile
from lcx.cache import host_calls
from lcx.select import vector_index
from tests.experiments import fake

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = str(ROOT / 'configs' / 'quickstart.py')
APB = str(ROOT / 'configs' / 'apb_quality.py')
FAKE = str(pathlib.Path(__file__).parent / 'fake.py')
CODE_VERSION = environment.code_version
ARGS = [f'--config={CONFIG}:smoke', '--config.max_new_tokens=16']


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
  fake.install(monkeypatch.setattr)
  fake.Engine.calls = 0


def rows_of(workdir):
  text = (workdir / 'results.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def essence(workdir):
  """Rows without what is measured, in the order of their keys."""
  found = rows_of(workdir)
  for row in found:
    for name in report.MEASURED:
      row.pop(name, None)
  return sorted(found, key=lambda row: row['key'])


def quality(workdir):
  """The report's part that must not depend on how the run went."""
  text = (workdir / 'report.md').read_text()
  return text[: text.index('## Cost')]


def config(**changes):
  values = {
    'model': 'preset:tiny',
    'methods': {
      'dense': {},
      'streaming': {'prefill': {'recent': 99}, 'decode': {'recent': 99}},
      'quest': {'decode': {'budget': 256}},
    },
    'tasks': {'niah_single_2': {}, 'niah_multikey_1': {'questions': 2}},
    'lengths': (600, 900),
    'samples': 3,
    'max_new_tokens': 16,
  }
  return resolve.resolve(evaluate.Config, values | changes)


def test_without_faiss_the_cluster_index_serves_under_its_name(
  tmp_path, monkeypatch, caplog
):
  monkeypatch.setattr(vector_index, 'has_faiss', lambda: False)
  numbers = {'top': 77, 'decode': {'sink': 64}}
  table = {
    'dense': {},
    'mine': {'method': 'retrieval', **numbers},
    'scan': {'method': 'retrieval', 'index': 'exact', **numbers},
  }
  evaluate.run(
    config(
      methods=table, lengths=(600,), samples=1, tasks={'niah_single_2': {}}
    ),
    tmp_path,
  )
  (line,) = [
    r.getMessage() for r in caplog.records if 'faiss' in r.getMessage()
  ]
  assert line.startswith('config.methods.mine: ') and 'lcx[index]' in line
  assert '\n' not in line and 'retrieval_cluster' in line
  rows = {r['method']: r for r in rows_of(tmp_path)}
  assert list(rows) == ['dense', 'mine (retrieval_cluster)', 'scan']
  served = rows['mine (retrieval_cluster)']
  assert served['decode'].startswith('ClusterDecode(top=77')
  assert 'sink=64' in served['decode'] and served['cache'].startswith('Dense(')
  assert rows['scan']['decode'].startswith('RetrievalDecode(')


def test_rows_are_whole(tmp_path):
  evaluate.run(config(), tmp_path)
  rows = rows_of(tmp_path)
  assert len(rows) == 3 * 2 * 3 * (1 + 2)
  wanted = (
    'key model model_sha256 method prefill cache decode protocol task length '
    'sample seed score prediction prompt_tokens keys_attended density '
    'prefill_ms decode_ms_per_token kv_bytes host_bytes peak_bytes device '
    'versions git date'
  ).split()
  assert all(set(wanted) <= row.keys() for row in rows)
  assert len({row['key'] for row in rows}) == len(rows)
  assert not any(isinstance(v, dict | list) for r in rows for v in r.values())
  scores = {r['score'] for r in rows if r['method'] == 'dense'}
  assert scores == {1.0}
  assert {r['degenerate'] for r in rows if r['method'] == 'dense'} == {False}
  assert {r['degenerate'] for r in rows if r['method'] == 'quest'} == {True}
  environment = json.loads((tmp_path / 'env.json').read_text())
  assert {'git', 'dirty', 'versions', 'device'} <= environment.keys()
  saved = json.loads((tmp_path / 'config.json').read_text())
  assert saved['resolved']['quest']['decode'].startswith('QuestDecode(')


def test_a_second_run_computes_nothing(tmp_path, capsys):
  evaluate.run(config(), tmp_path)
  before = fake.Engine.calls
  first = capsys.readouterr().out
  evaluate.run(config(), tmp_path)
  assert fake.Engine.calls == before
  assert capsys.readouterr().out == first


def test_only_what_is_missing_is_computed(tmp_path):
  evaluate.run(config(samples=2), tmp_path)
  before = fake.Engine.calls
  evaluate.run(config(), tmp_path)
  assert fake.Engine.calls - before == 3 * 2 * 2  # methods, tasks, lengths
  fresh = tmp_path / 'fresh'
  evaluate.run(config(), fresh)
  assert essence(fresh) == essence(tmp_path)
  assert quality(fresh) == quality(tmp_path)


def test_two_models_and_two_protocols(tmp_path, capsys):
  several = config(
    model='preset:tiny, preset:smollm2_135m',
    methods={'dense': {}},
    protocols=('whole', 'context_first'),
  )
  evaluate.run(several, tmp_path)
  rows = rows_of(tmp_path)
  assert len({(r['model'], r['protocol']) for r in rows}) == 4
  assert len({r['model_sha256'] for r in rows}) == 2
  assert 'smollm2_135m (random), protocol: context first' in (
    capsys.readouterr().out
  )


def test_batches_of_a_restart_are_those_of_the_run(tmp_path):
  evaluate.run(config(batch=2), tmp_path)
  lines = (tmp_path / 'results.jsonl').read_bytes().splitlines(keepends=True)
  kept = [line for line in lines if json.loads(line)['sample'] != 1]
  (tmp_path / 'results.jsonl').write_bytes(b''.join(kept))
  evaluate.run(config(batch=2), tmp_path)
  assert sorted(r['key'] for r in rows_of(tmp_path)) == sorted(
    json.loads(line)['key'] for line in lines
  )


@pytest.mark.parametrize('backend', ['gpu', 'cpu'])
def test_prompts_are_written_once_and_a_batch_ahead(backend, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  written = []

  class Recorded:
    def sample(self, *args, **kwargs):
      written.append(args[3])
      return task.sample(*args, **kwargs)

  task = evaluate.task('niah_single_2', {}, 16)
  setting = answers.Setting(4, 0, 2, 0, None, 'allow')
  order = [('t', 600, range(i, i + 2)) for i in (0, 2, 0)]
  tokenizer = models._bytes_tokenizer()
  batches = answers._drawn(order, {'t': Recorded()}, tokenizer, setting)
  first = next(batches)
  end = time.monotonic() + 10
  while backend == 'gpu' and len(written) < 4 and time.monotonic() < end:
    time.sleep(0.01)
  # The second batch, too, but where its time would be that of the first.
  assert sorted(written) == [0, 1, 2, 3][: 2 if backend == 'cpu' else 4]
  second, again = batches
  assert len(written) == 4 and again == first != second
  (sample, prompt), _ = second
  assert sample.index == 2
  assert tokenizer.decode(prompt.whole(0)) == sample.prompt(0)


def test_a_run_without_dense_is_a_piece_of_a_table(tmp_path, capsys):
  quest = {'quest': {'decode': {'budget': 256}}}
  evaluate.run(config(methods=quest, lengths=(600,)), tmp_path)
  assert {row['method'] for row in rows_of(tmp_path)} == {'quest'}
  assert 'quest' in capsys.readouterr().out


def test_the_code_of_one_method_is_its_own(monkeypatch):
  files = environment._bytes

  def edited(name):
    return lambda path: files(path) + b'\n#' * (path.name == name)

  def versions():
    return {m: CODE_VERSION([m]) for m in ('dense', 'quest', 'streaming')}

  before = versions()
  assert before == versions()
  monkeypatch.setattr(environment, '_bytes', edited('quest.py'))
  after = versions()
  assert [m for m in before if before[m] != after[m]] == ['quest']
  # Everybody else's parts are built on dense, and all on the engine.
  for name in ('dense.py', 'engine.py', 'prompts.py'):
    monkeypatch.setattr(environment, '_bytes', edited(name))
    assert all(before[m] != v for m, v in versions().items())


def test_nan_is_a_failure_that_keeps_the_rest(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('FAKE_NAN', 'quest')
  with pytest.raises(errors.Failure, match=r'NaN.*method quest, task niah'):
    evaluate.run(config(), tmp_path)
  assert 'failed' in capsys.readouterr().out
  rows = rows_of(tmp_path)
  assert {r['method'] for r in rows if r['score'] is None} == {'quest'}
  monkeypatch.delenv('FAKE_NAN')
  before = fake.Engine.calls
  evaluate.run(config(), tmp_path)
  assert fake.Engine.calls - before == before // 3


def test_every_fault_has_its_words(monkeypatch):
  monkeypatch.setattr(host_calls, 'last_error', 'OSError: x')
  for code in host_calls.Fault:
    status = host_calls.host_fault(code)
    assert errors.fault(status, 'float32') != status
  assert errors.fault('host_failed', 'float32').endswith(': OSError: x')
  assert 'cache.gigabytes' in errors.fault('host_full', 'float32')
  # Where the weights are float32, another dtype is no advice.
  assert '--config.dtype=float32' in errors.fault('nan', 'bfloat16')
  assert '--config.dtype' not in errors.fault('nan', 'float32')


@pytest.mark.parametrize(
  ('change', 'says'),
  [
    ({'methods': {'qest': {}}}, "config.methods.qest: unknown method 'qest'"),
    ({'methods': {'quest': {'budgett': 1}}}, 'no part has'),
    (
      {'methods': {'x': {'method': 'dense+dense+quest'}}},
      'needs.*nearest legal choice',
    ),
    ({'tasks': {'niah': {}}}, "config.tasks.niah: no task 'niah'"),
    ({'tasks': {'niah_single_1': {'kees': 1}}}, 'has no parameter kees'),
    ({'methods': {'quest': {'decode.budget': 9}}}, 'length 600: .*budget'),
    (
      {'methods': {'retrieval': {'cache': {'gigabytes': 1e-6}}}},
      'config.methods.retrieval .*length 600: .*GiB of host memory',
    ),
    ({'capacity': 512}, '900 tokens do not fit into config.capacity=512'),
    ({'lengths': ()}, 'config.lengths is empty'),
    ({'samples': 0}, 'config.samples=0: at least 1'),
    ({'model': 'nowhere/x.gguf'}, 'nowhere/x.gguf.*does not exist'),
    ({'model': 'preset:tinny'}, "did you mean 'tiny'"),
    ({'lengths': (20,)}, 'too short'),
    ({'tasks': {'x': {'file': 'nowhere.jsonl'}}}, 'nowhere.jsonl'),
  ],
)
def test_bad_configs_are_refused(tmp_path, change, says):
  with pytest.raises((ValueError, OSError), match=says):
    evaluate.run(config(**change), tmp_path / 'run')
  assert fake.Engine.calls == 0


@pytest.mark.parametrize('kind', ['evaluate', 'long_output'])
def test_a_head_profile_of_other_weights_is_refused(kind, tmp_path):
  """Of a model of the same shape, which the engine cannot tell apart."""
  source = models.find('preset:tiny', 0)
  numbers = models.numbers(source, 'float32')
  gates = ((0.5,) * numbers.n_kv_heads,) * numbers.n_layers
  path = tmp_path / 'profile.json'

  def run_with(sha256):
    shape = head_profile.fingerprint(numbers)
    path.write_text(head_profile.HeadProfile(gates, shape, sha256).to_json())
    head_profile.load.cache_clear()
    methods = {'lserve': {'profile': str(path), 'budget': 384}}
    if kind == 'evaluate':
      evaluate.run(config(methods=methods), tmp_path / 'run')
      return
    evaluate.check_weights(evaluate.variant(*methods.popitem()).method, source)

  with pytest.raises(ValueError, match='is of other weights: ab'):
    run_with('ab' * 32)
  run_with(source.sha256)


def test_a_file_of_prompts_is_a_task(tmp_path):
  path = tmp_path / 'niah_single_1.jsonl'
  row = {
    'input': 'x' * 900 + '\nThe number of cat is 123.\nWhat is the number of '
    'cat, as stated?',
    'outputs': ['123'],
    'answer_prefix': '',
  }
  path.write_text(f'{json.dumps(row)}\n' * 2)
  evaluate.run(config(tasks={'x': {'file': str(path)}}), tmp_path / 'run')
  rows = rows_of(tmp_path / 'run')
  assert len(rows) == 3 * 2 * 2
  assert {r['score'] for r in rows if r['method'] == 'dense'} == {1.0}
  assert all(r['prompt_tokens'] + 16 <= r['length'] for r in rows)


# The command line, in this process.


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
  def call(*args):
    argv = ['run', f'--workdir={tmp_path / "run"}', *args]
    # config_flags finds its overrides in sys.argv.
    monkeypatch.setattr(sys, 'argv', argv)
    with flagsaver.flagsaver():
      code = run.main(argv)
    run.flags.FLAGS.unparse_flags()
    return code, capsys.readouterr()

  return call


@pytest.mark.parametrize(
  ('args', 'says'),
  [
    (
      [*ARGS, '--config.modell=x'],
      "config.modell does not exist; did you mean 'model'",
    ),
    ([*ARGS, '--config.methods.quest.decode.budget=0.5'], 'budget=0.5'),
    ([*ARGS, '--config.samples=many'], 'samples=many'),
    ([*ARGS, '--config.samples=0'], 'config.samples=0'),
    ([*ARGS, '--config.kind=evaluat'], "config.kind='evaluat' must be one of"),
    ([*ARGS, '--config.model=nowhere'], "'nowhere' does not exist"),
    ([f'--config={CONFIG}:smoek'], "'smoek' is not one of method, smoke"),
    ([f'--config={CONFIG}:method=qest'], "unknown method 'qest'"),
    (['--config=configs/nowhere.py'], 'nowhere.py'),
    (
      [f'--config={APB}:smoke', '--config.mesh=(1, 8, 1)'],
      'length 512: hosts=2 must be a multiple of the mesh axis seq=8',
    ),
    (
      [f'--config={APB}:smoke', "--config.protocols=('context_first',)"],
      "compressor='query' scores keys by the question, but the prompt is read",
    ),
    (
      [f'--config={APB}:smoke', '--config.mesh=(2, 1, 1)'],
      'mesh axis data=2 must divide config.batch=1',
    ),
    ([f'--config={APB}:hosts=4,part=hosts'], 'part=hosts has its own'),
    ([], 'give --config=configs/NAME.py'),
    ([*ARGS, '--nosuchflag'], 'nosuchflag'),
    ([*ARGS, 'extra'], "'extra' is no flag"),
  ],
)
def test_bad_command_lines_give_one_line_and_code_2(command, args, says):
  code, said = command(*args)
  assert code == 2
  assert said.err.startswith('error: ') and said.err.count('\n') == 1
  assert says in said.err
  assert fake.Engine.calls == 0


def test_methods_of_the_readmes_commands_fit_their_meshes():
  text = (ROOT / 'README.md').read_text()
  found = re.findall(
    r'--config=configs/(\w+)\.py:?(\S*)[\s\\]+["\']--config.mesh=\((.*?)\)',
    text,
  )
  assert len(found) == 4
  for name, arg, mesh in found:
    module = importlib.import_module(f'configs.{name}')
    for label, fields in run._plain(module.get_config(arg))['methods'].items():
      method = evaluate.variant(label, fields).method
      method.prefill.pieces(int(mesh.split(',')[1]))


def test_workdir_that_cannot_be_written(tmp_path, command):
  (tmp_path / 'run').write_text('a file')
  code, said = command(*ARGS)
  assert (code, said.err.count('\n')) == (2, 1)
  assert str(tmp_path / 'run') in said.err
  assert 'give a --workdir that can be written' in said.err


def test_full_disk_is_one_line(tmp_path, command, monkeypatch):
  append, calls = results.Results.append, []

  def full(self, rows):
    calls.append(1)
    if len(calls) > 2:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
    append(self, rows)

  with monkeypatch.context() as patch:
    patch.setattr(results.Results, 'append', full)
    code, said = command(*ARGS)
  assert code == 1
  assert 'No space left on device' in said.err.splitlines()[-1]
  assert 'Traceback' not in said.err
  assert len(rows_of(tmp_path / 'run')) == 2
  assert command(*ARGS)[0] == 0


def test_debug_shows_the_traceback(command):
  code, said = command(*ARGS, '--config.samples=0', '--debug')
  assert code == 2
  assert 'Traceback' in said.err


def test_something_unforeseen_is_a_failure(command, monkeypatch):
  def broken(*_):
    raise KeyError('x')

  monkeypatch.setattr(evaluate, 'run', broken)
  code, said = command(*ARGS)
  assert (code, said.err.count('\n')) == (1, 1)
  assert 'KeyError' in said.err and '--debug' in said.err


def test_help_lists_configs_and_methods(command):
  code, said = command('--help')
  assert code == 0
  assert 'quickstart ' in said.out and 'SmolLM2-135M' in said.out
  assert all(f'\n  {m} ' in said.out for m in ('dense', 'quest', 'streaming'))


def test_method_argument_keeps_dense_beside_it(tmp_path, command):
  code, _ = command(f'--config={CONFIG}:smoke,method=quest', *ARGS[1:])
  assert code == 0
  methods = {r['method'] for r in rows_of(tmp_path / 'run')}
  assert methods == {'dense', 'quest'}


# Kills, in processes of their own.


def start(workdir, **environment):
  return subprocess.Popen(
    [sys.executable, FAKE, *ARGS, f'--workdir={workdir}'],
    env=os.environ | {'PYTHONPATH': str(ROOT)} | environment,
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  )


@pytest.mark.timeout(120)
def test_killed_five_times_gives_the_report_of_an_unbroken_run(tmp_path):
  """Three kills in the middle of a write, two at random moments."""
  whole = start(tmp_path / 'whole')
  rng = random.Random(0)
  broken = tmp_path / 'broken'
  for size in (0, 30, rng.randrange(400)):
    kill = start(broken, FAKE_KILL=f'{rng.randrange(1, 3)},{size}')
    assert kill.wait(60) == -9
  for _ in range(2):
    kill = start(broken, FAKE_MS='300')
    log = broken / 'results.jsonl'
    before = log.stat().st_size
    until = time.monotonic() + 60
    while log.stat().st_size == before and time.monotonic() < until:
      time.sleep(0.02)
    time.sleep(rng.random() * 0.3)
    kill.kill()
    assert kill.wait(60) == -9
  assert not (broken / 'report.md').exists()
  last = start(broken)
  assert last.stderr is not None
  assert last.wait(60) == 0, last.stderr.read()
  assert whole.wait(60) == 0
  assert essence(broken) == essence(tmp_path / 'whole')
  mine, other = (
    quality(p).replace(str(p), '') for p in (broken, tmp_path / 'whole')
  )
  assert mine == other
