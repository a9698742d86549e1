"""Training from a config: killed, resumed, refused; its files are whole."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest

from experiments import frozen_training, results, train
from lcx.train import exact, mixture, optimizer, trainer
from lcx.train.trainer import Trainer
from tests.train import tiny

MODEL = tiny.MODEL.replace(
  vocab_size=3400, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1
)


@pytest.fixture(autouse=True)
def hasty():
  """Programs run for a moment; conftest.py resets this for the next test."""
  jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture
def config(tmp_path):
  """Five steps on a text file."""
  file = tmp_path / 'text.txt'
  lines = [' '.join(tiny.TEXT[i : i + 4]) for i in range(len(tiny.TEXT) - 3)]
  file.write_text('\n\n'.join(lines))
  return train.Config(
    model=MODEL,
    stages=(mixture.Stage(64, 2, 5, 8, tiny.MIX),),
    optimizer=optimizer.OptimizerConfig(name='adam', warmup=1),
    text=(str(file),),
    words=20,
  )


def files(folder):
  """What every file holds."""
  return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def logged(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [(row['step'], row['loss']) for row in map(json.loads, lines)]


def test_a_killed_run_goes_on_and_another_config_is_refused(
  tmp_path, config, monkeypatch
):
  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  train.run(config, whole)
  want = logged(whole)
  assert [step for step, _ in want] == [0, 1, 2, 3, 4]

  saved = []

  def save(self, checkpoints, whole=Trainer.save):
    if saved:
      raise KeyboardInterrupt
    saved.append(self.step)
    whole(self, checkpoints)

  with monkeypatch.context() as patch:
    patch.setattr(trainer, '_FETCH', 2)
    patch.setattr(Trainer, 'save', save)
    with pytest.raises(KeyboardInterrupt):
      train.run(dataclasses.replace(config, save_minutes=0.0), cut)
  assert saved == [2] and len(logged(cut)) == 4
  with open(cut / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 4, "lo')
  train.run(config, cut)
  assert logged(cut) == want

  left = files(cut)
  for changed in (
    {'start': str(whole / 'model')},
    {'words': 21},
  ):
    with pytest.raises(ValueError, match=r'another config'):
      train.run(dataclasses.replace(config, **changed), cut)
    assert files(cut) == left


def test_data_is_of_its_config_or_refused(tmp_path, config):
  run = tmp_path / 'run'
  run.mkdir()
  data, words, tokenizer = train.prepare(config, run)
  left = files(run)
  again = train.prepare(config, run)
  assert again[0].sha256 == data.sha256
  assert again[1:] == (words, again[2])
  assert again[2].to_str() == tokenizer.to_str()
  other = tmp_path / 'other.txt'
  other.write_text('A text of its own. ' * 20)
  for changed in (
    {'text': (str(other),)},
    {'words': 30},
    {'tokenizer': str(run / 'tokenizer.json')},
    {'model': config.model.replace(vocab_size=3500)},
  ):
    with pytest.raises(ValueError, match='another config|vocab_size=3500'):
      train.prepare(dataclasses.replace(config, **changed), run)
  with open(config.text[0], 'a') as file:
    file.write('\n\nOne more.')
  with pytest.raises(ValueError, match='has changed since'):
    train.prepare(config, run)
  assert files(run) == left


def test_files_are_whole_or_not_there(tmp_path, config, monkeypatch):
  """A kill while a file is written; a file that was cut all the same."""
  config = dataclasses.replace(
    config, evaluate=(train.Cell('niah_single_2', 512),), samples=1
  )
  _, _, tokenizer = train.prepare(config, tmp_path)
  cell = 'niah_single_2', 512
  found = {cell: [exact.Example(np.arange(9), 4)]}
  monkeypatch.setattr(exact, 'suite', lambda *_: found)

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
      train._examples(config, tokenizer, tmp_path)
    (tmp_path / 'data.npz').unlink()
    with pytest.raises(KeyboardInterrupt):
      train.prepare(config, tmp_path)
  assert not list(tmp_path.glob('[!.]*.npz'))
  train.prepare(config, tmp_path)
  for _ in range(2):  # drawn, then read
    (example,) = train._examples(config, tokenizer, tmp_path)[cell]
    assert example.tokens.tolist() == list(range(9)) and example.prompt == 4
  for path in tmp_path.glob('*.npz'):
    os.truncate(path, path.stat().st_size // 2)
  for make in (
    lambda: train.prepare(config, tmp_path),
    lambda: train._examples(config, tokenizer, tmp_path),
  ):
    with pytest.raises(ValueError, match=r'npz is damaged .*delete it') as said:
      make()
    assert '\n' not in str(said.value)


@dataclasses.dataclass
class Recipe:
  steps: int


@dataclasses.dataclass
class FrozenConfig:
  recipe: Recipe
  steps: int = 0
  minutes: float = 0.0
  save_minutes: float = 2.0


class Counting:
  """A training whose state is a sum of its steps."""

  def __init__(self, fingerprint):
    self.fingerprint, self.step, self.sum = fingerprint, 0, np.zeros(1)

  def restore(self, checkpoints):
    if checkpoints.latest is None:
      return False
    self.sum = checkpoints.restore({'sum': self.sum})['sum']
    self.step = checkpoints.latest
    return True

  def save(self, checkpoints):
    checkpoints.save(self.step, {'sum': self.sum})

  def run(self, stop):
    while self.step < stop:
      self.sum = self.sum + self.step
      self.step += 1
      yield {'step': self.step - 1, 'loss': float(self.sum[0])}


def test_frozen_training_goes_on_where_it_was_killed(tmp_path):
  def piece(steps=0, run='mine', trainer=Counting):
    config = FrozenConfig(Recipe(6), steps)
    return frozen_training.train_piece(config, trainer(run), tmp_path, str)

  class Killed(Counting):
    def save(self, checkpoints):
      raise KeyError

  piece(2)
  with pytest.raises(KeyError):
    piece(3, trainer=Killed)
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 5')
  assert piece()['steps_done'] == 6
  assert logged(tmp_path) == list(enumerate([0.0, 1.0, 3.0, 6.0, 10.0, 15.0]))
  left = files(tmp_path)
  with pytest.raises(ValueError, match='another config'):
    piece(run='other')
  assert files(tmp_path) == left


def test_a_log_is_cut_to_whole_lines_of_steps_done(tmp_path):
  log = tmp_path / 'metrics.jsonl'
  results.cut_log(log, 3)
  assert log.read_text() == ''
  log.write_text('{"step": 1}\n7\n{"loss": 2}\n{"step": 3}\n{"step": 2}\n{"st')
  results.cut_log(log, 3)
  assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
