"""Tables of committed quality rows."""

import json
import shlex
import sys

import pytest
from matplotlib.axes import Axes

from experiments import (
  comparison,
  environment,
  quality_plots,
  quality_tables,
)


@pytest.fixture(scope='module')
def rows():
  return quality_tables.read(quality_tables.ROWS)


@pytest.fixture(scope='module')
def times():
  speeds, decodes = quality_tables.SPEEDS, quality_tables.DECODES
  return quality_tables.speeds(*map(quality_tables.read, (speeds, decodes)))


def test_the_committed_tables_are_what_the_committed_rows_say(rows, times):
  """Run `python -m experiments.quality_tables` when rows have changed."""
  said = quality_tables.TABLES.read_text('utf-8')
  assert said == quality_tables.markdown(rows, times)


def test_rows_of_a_shared_gpu_hold_no_times(rows):
  assert len(rows) > 10_000
  for row in rows:
    assert all(row[name] is None for name in quality_tables.TIMES)
    assert '--workdir' not in row['command']
    assert row['status'] == 'ok' and 0 <= row['score'] <= 1
  for members in quality_tables.runs(rows).values():
    keys = {row['key'] for row in members}
    assert len(keys) == len(members)
  for table in quality_tables.tables(rows):
    assert 'dense' in {row['method'] for row in table}


def test_selectors_are_timed_under_their_own_names(rows, times):
  traded = quality_tables.trades(rows)
  names = {quality_tables.selector(own[0]) for _, own in traded}
  timed = {name for name, *_ in times}
  assert timed <= names
  assert names - timed == {'a_shape'}
  for line, own in traded:
    assert len(own) == line.n == quality_tables.LEAST
    assert line.difference and line.difference.pairs == quality_tables.LEAST
    assert line.method != 'dense'
  # In kernels, beside cuDNN, as in the notes.
  assert round(times['xattention_16', 131072, '1/8'], 2) == 6.26
  assert round(times['vertical_slash', 16384, 'own'], 2) == 2.38
  assert round(times['sparge_20', 16384, 'own'], 2) == 3.40  # threshold 0.9
  assert round(times['snapkv', 32768, 'own'], 2) == 1.48


@pytest.mark.long
def test_a_plot_is_drawn(rows, times):
  drawn = quality_tables.draw(rows, times)
  assert drawn.startswith(b'\x89PNG')
  # Width and height are those of the committed one: as many panels.
  assert drawn[16:24] == quality_tables.PLOT.read_bytes()[16:24]


def make_run(folder, scores, command):
  folder.mkdir(exist_ok=True)
  found = [
    {
      'key': f'{method} {sample}',
      'method': method,
      'model': 'm',
      'protocol': 'whole',
      'task': 't',
      'length': 64,
      'sample': sample,
      'score': score,
      'prefill': 'AShapePrefill(sink=1)',
      'prefill_density': 0.25,
      'prefill_ms': 7.0,
      'compile_s': 3.0,
    }
    for method, line in scores.items()
    for sample, score in enumerate(line)
  ]
  (folder / 'results.jsonl').write_text('\n'.join(map(json.dumps, found)))
  (folder / 'env.json').write_text(json.dumps({'command': command}))
  return folder


WORDS = '--config=c.py:method=two words'


def test_a_command_can_be_pasted(monkeypatch):
  words = [WORDS, "--config.kinds=('a',)", '--config.x=$HOME "', '--config.y=1']
  monkeypatch.setattr(sys, 'argv', ['run.py', *words])
  command = environment.command()
  assert shlex.split(command) == ['python', '-m', 'experiments.run', *words]
  assert f'"{WORDS}"' in command and command.endswith(' --config.y=1')


def test_a_run_takes_the_place_of_what_its_command_gave(tmp_path):
  command = (
    'python -m experiments.run --workdir=/tmp/x --config=c.py:method=two words'
    ' --config.model=/tmp/m.gguf'
  )
  first = make_run(tmp_path / 'a', {'dense': [1, 1], 'b': [1, 0]}, command)
  other = make_run(tmp_path / 'b', {'dense': [0]}, 'python -m x --config=d.py')
  # As `environment.command` writes it since words are quoted.
  quoted = command.replace('--config=c.py:method=two words', f'"{WORDS}"')
  again = make_run(tmp_path / 'c', {'dense': [1, 1], 'b': [0]}, quoted)
  rows = []
  for folder in (first, other, again):
    rows = quality_tables.taken(rows, folder)
  path = tmp_path / 'rows.jsonl.xz'
  path.write_bytes(quality_tables.packed(rows))
  found = quality_tables.runs(quality_tables.read(path))
  assert {name: len(members) for name, members in found.items()} == {
    'python -m x --config=d.py': 1,
    'python -m experiments.run "--config=c.py:method=two words" '
    '--config.model=.cache/models/m.gguf': 3,
  }
  for row in quality_tables.read(path):
    assert row['prefill_ms'] is None and row['compile_s'] is None
  *_, members = found.values()
  # Pairs survive: sample 0 was lost, sample 1 has no partner.
  scores = comparison.scores(m for m in members if m['method'] == 'b')
  dense = comparison.scores(m for m in members if m['method'] == 'dense')
  difference = comparison.paired(scores, dense)
  assert difference and (difference.mean, difference.pairs) == (-1, 1)


def piece(command, methods, git='1', tasks=('a', 'b', 'c')):
  """Rows as a piece of a table gives them."""
  return [
    {
      'key': f'{command} {method} {task} {sample}',
      'command': command,
      'git': git,
      'model': 'm',
      'protocol': 'whole',
      'task': task,
      'length': 64,
      'method': method,
      'sample': sample,
      'question': 0,
      'score': score,
      'density': 0.25,
      'degenerate': False,
      'keys_attended': 1.0,
      'kv_bytes': 1,
      'host_bytes': 0,
      'new_tokens': 1,
      **dict.fromkeys(quality_tables.TIMES),
    }
    for method, score in methods.items()
    for task in tasks
    for sample in range(2)
  ]


def test_pieces_without_dense_are_joined_with_the_piece_that_has_it():
  run = 'python -m experiments.run --config=configs/ruler_real.py:length=64'
  first = piece(f'{run},method=x --config.batch=2', {'dense': 1, 'x': 1})
  second = piece(f'{run},method=y/z,alone --config.batch=4', {'y': 0, 'z': 1})
  other = piece(f'{run},few', {'dense': 1})
  older = piece(f'{run},method=y', {'dense': 1, 'y': 1}, git='0')
  again = piece(f'{run},method=v', {'dense': 0, 'v': 1})
  found = quality_tables.tables([*first, *second, *other, *older, *again])
  assert [len(table) for table in found] == [30, 6, 12]
  joined = found[0]
  assert {row['method'] for row in joined} == {'dense', *'vxyz'}
  # Dense counts once, as the first piece has it.
  assert all(r['score'] for r in joined if r['method'] == 'dense')
  said = quality_tables._run(joined)
  assert f'- `{run},method=y/z,alone --config.batch=4`' in said
  lines = {line.split('|')[2].strip(): line for line in said.splitlines()[7:]}
  assert '| 0.00* | 0.00* | 0.00* | 0.00 | -1.00 |' in lines['y']
  assert '| 1.00 | 1.00 | 1.00 | 1.00 | +0.00 |' in lines['z']


def test_pieces_of_the_same_methods_on_other_tasks_are_joined():
  run = 'run --config=configs/ruler_real.py:length=4096'
  first = piece(f'{run},method=x,task=a', {'dense': 1, 'x': 0}, tasks=('a',))
  second = piece(f'{run},method=x,task=b/c', {'dense': 1, 'x': 0}, tasks='bc')
  other = piece(f'{run},method=y,task=b', {'dense': 1, 'y': 0}, tasks='b')
  joined, alone = quality_tables.tables([*first, *second, *other])
  assert joined == first + second
  assert alone == other
  # Nor is it a piece of what all methods answered, in pieces.
  every = [
    row
    for task in 'ab'
    for row in piece(f'{run},task={task}', {'dense': 1, 'y': 1}, tasks=task)
  ]
  joined, alone = quality_tables.tables([*every, *other])
  assert joined == every
  assert alone == other


def test_pieces_that_give_a_label_other_numbers_are_refused():
  run = 'python -m experiments.run --config=configs/c.py:'
  row = {
    'git': 'a',
    'model': 'm',
    'method': 'x',
    'length': 1,
    'protocol': 'whole',
    'task': 't',
    'sample': 0,
    'question': 0,
    'cache': 'C',
    'decode': 'D',
  }
  pieces = [
    row | {'command': f'{run}method=x,alone,heads={x}', 'prefill': f'P({x})'}
    for x in 'ab'
  ]
  with pytest.raises(ValueError, match="give 'x' other numbers"):
    quality_tables.tables(pieces)


def test_differences_to_dense_are_drawn(tmp_path):
  source = quality_tables.RESULTS / 'apb_quality_cpu.jsonl'
  out = tmp_path / 'out.png'
  quality_plots.main([str(source), str(out)])
  drawn = (quality_tables.RESULTS / 'apb_quality_cpu.png').read_bytes()
  # Width and height are those of the committed one: as many methods.
  assert out.read_bytes()[:24] == drawn[:24]
  lines = comparison.compare(quality_tables.read(source))
  worst = quality_plots._worst(lines)
  where = 'SmolLM2-135M-Instruct.Q4_1', 'whole', 2048
  assert worst[*where, 'no anchor random'] == -1
  with pytest.raises(ValueError, match='no row has a partner in dense'):
    quality_plots.main([str(source), str(out), 'ruler_real'])


def test_a_plot_of_one_revision_says_who_has_fewer_samples(
  rows, tmp_path, monkeypatch
):
  names = []
  monkeypatch.setattr(
    Axes, 'set_yticks', lambda self, at, said: names.append(list(said))
  )
  out = tmp_path / 'out.png'
  config = ['ruler_real', 'f053b1f4816b']
  quality_plots.main([str(quality_tables.ROWS), str(out), *config])
  assert len(names) == 6 and 'retrieval_cluster (40)' in names[1]
  assert 'lserve' in names[0] and 'lserve' not in names[2]  # another revision's


def test_what_is_no_run_is_refused(tmp_path):
  with pytest.raises(ValueError, match='No such file'):
    quality_tables.taken([], tmp_path)
  (tmp_path / 'results.jsonl').write_text('{"op": "attention"}')
  with pytest.raises(ValueError, match='names no command'):
    quality_tables.taken([], tmp_path)
  (tmp_path / 'env.json').write_text('{"command": "python"}')
  with pytest.raises(ValueError, match='no rows of an evaluation'):
    quality_tables.taken([], tmp_path)
  path = tmp_path / 'torn.jsonl.xz'
  path.write_bytes(b'no archive')
  with pytest.raises(ValueError, match='no file of rows'):
    quality_tables.read(path)
