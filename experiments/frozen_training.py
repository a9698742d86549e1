"""What trainings beside a frozen model share: documents, pieces, a log."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tqdm

from experiments import environment
from experiments.prompts import Template
from experiments.results import cut_log, write_json
from lcx.tasks.haystacks import default_text
from lcx.train.checkpoint import Checkpoints
from lcx.train.passkeys import Passkeys, Writer


def make_writer(
  text: str, documents: Passkeys, seed: int, model: Any
) -> Writer:
  """A writer of documents in a model's tokens.

  Args:
    text: a file to hide passkeys in; '': Python's own documentation.
    documents: what they are like.
    seed: of documents.
    model: an `lcx.models.load.Model`.
  """
  found = pathlib.Path(text).read_text('utf-8') if text else default_text()
  opening = tuple(Template(model.tokenizer)._opening)
  encode = model.tokenizer.encode
  haystack = np.asarray(encode(found), np.int32)
  return Writer(haystack, encode, documents, seed, opening)


def describe(config: Any, workdir: pathlib.Path) -> None:
  """Writes what is run, and where; not before it is known to be this run."""
  write_json(workdir / 'config.json', dataclasses.asdict(config))
  write_json(workdir / 'env.json', environment.describe())


def train_piece(
  config: Any,
  trainer: Any,
  workdir: pathlib.Path,
  says: Callable[[dict[str, float]], str],
) -> dict[str, Any]:
  """Trains what the config's steps and minutes allow, from where it stood.

  Args:
    config: with recipe.steps, steps, minutes and save_minutes.
    trainer: with run, restore, save, step and fingerprint.
    workdir: gets config.json, env.json, metrics.jsonl and checkpoints/.
    says: the progress bar's text, from a step's metrics.

  Raises:
    ValueError: the workdir belongs to another config.
    FloatingPointError: the loss is not finite.
  """
  begin = saved = time.monotonic()
  until = begin + 60 * config.minutes if config.minutes else float('inf')
  checkpoints = Checkpoints(workdir / 'checkpoints', trainer.fingerprint)
  if trainer.restore(checkpoints):
    print(f'goes on from step {trainer.step} of {config.recipe.steps}')
  describe(config, workdir)
  log = workdir / 'metrics.jsonl'
  cut_log(log, trainer.step)
  stop = config.recipe.steps
  if config.steps:
    stop = min(stop, trainer.step + config.steps)
  row: dict[str, float] = {}
  with (
    open(log, 'a') as file,
    tqdm.tqdm(
      total=config.recipe.steps, initial=trainer.step, mininterval=5
    ) as bar,
  ):
    for row in trainer.run(stop):
      file.write(json.dumps(row) + '\n')
      file.flush()
      if not np.isfinite(row['loss']):
        raise FloatingPointError(
          f'the loss is {row["loss"]} at step {row["step"]}: try '
          '--config.dtype=float32'
        )
      bar.update(1)
      bar.set_postfix_str(says(row))
      now = time.monotonic()
      if now - saved > 60 * config.save_minutes:
        trainer.save(checkpoints)
        saved = now
      if now > until:
        break
  if checkpoints.latest != trainer.step:
    trainer.save(checkpoints)
  checkpoints.close()
  return {'steps_done': trainer.step, 'run': trainer.fingerprint, 'last': row}
