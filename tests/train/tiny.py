"""A run small enough for a test; also a program that is killed in a save.

python tests/train/tiny.py FOLDER: trains 1 step, saves, trains another, and
dies by SIGKILL at the moment at which the second save would become whole.
"""

import os
import pathlib
import signal
import sys

from lcx import sharding
from lcx.models.config import ModelConfig
from lcx.tasks.words import ADJECTIVES, NOUNS
from lcx.train import checkpoint, corpus, mixture, optimizer, trainer
from lcx.train import vocabulary as vocabularies

TEXT = [
  f'The {a} {n} stands by the river and has not moved. Nobody owns the {n} now.'
  for a, n in zip(ADJECTIVES, NOUNS, strict=False)
]
MODEL = ModelConfig(
  vocab_size=2600,
  d_model=32,
  n_layers=2,
  n_heads=4,
  n_kv_heads=2,
  head_dim=16,
  d_ff=64,
  tie_embeddings=True,
  dtype='float32',
)
MIX = (2.0, 1.0, 1.0, 4.0, 0.0, 2.0, 1.0, 0.0, 0.0, 1.0)


def make(
  stages=None, mesh=(1, 1, 1), rule=None, config=MODEL, seed=0, remat=False
) -> trainer.Trainer:
  stages = stages or [
    mixture.Stage(64, 4, 5, 16, MIX),
    mixture.Stage(128, 2, 3, 16, MIX),
  ]
  tokenizer = vocabularies.build(TEXT, size=config.vocab_size)
  data = corpus.build(TEXT, tokenizer)
  mixed = mixture.Mixture(data, tokenizer, ADJECTIVES, stages, seed)
  rule = rule or optimizer.OptimizerConfig(rate=2e-2, other_rate=2e-2, warmup=1)
  return trainer.Trainer(
    config, rule, mixed, sharding.make_mesh(*mesh), trainer.Options(remat=remat)
  )


def rows(run: trainer.Trainer, stop: int) -> list[dict[str, float]]:
  return [row for part in run.run(stop) for row in part]


def saves(folder: pathlib.Path, run: trainer.Trainer):
  return checkpoint.Checkpoints(folder, run.fingerprint)


def _die_in_second_save(folder: pathlib.Path) -> None:
  run = make()
  store = saves(folder, run)
  rows(run, 1)
  run.save(store)
  rows(run, 2)
  whole = {name: getattr(os, name) for name in ('rename', 'replace')}

  def last(name):
    def move(source, target, *args, **kwargs):
      if pathlib.Path(os.fspath(target)).name == '2':
        os.kill(os.getpid(), signal.SIGKILL)
      return whole[name](source, target, *args, **kwargs)

    return move

  for name in whole:
    setattr(os, name, last(name))
  run.save(store)


if __name__ == '__main__':
  _die_in_second_save(pathlib.Path(sys.argv[1]))
