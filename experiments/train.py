"""Training of the small long-context model, in pieces that resume exactly.

The workdir holds: data.npz and tokenizer.json (text as tokens, made once),
examples.npz (evaluation, made once), checkpoints/, metrics.jsonl (one row a
step), loss.png, and, after each piece, model/ (a Hugging Face folder with
training.json, the record). The same command goes on where the last one ended.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from typing import Any

import numpy as np
import safetensors.numpy
import tqdm

from experiments import environment, train_plot
from experiments.results import (
  cut_log,
  make_folder,
  read_arrays,
  write_arrays,
  write_file,
  write_json,
)
from lcx import sharding, tasks
from lcx.models import load as loader
from lcx.models.config import ModelConfig
from lcx.tasks.words import ADJECTIVES, NOUNS
from lcx.train import corpus, exact, export, model, text, vocabulary
from lcx.train.checkpoint import Checkpoints
from lcx.train.mixture import Mixture, Stage
from lcx.train.optimizer import OptimizerConfig
from lcx.train.trainer import Options, Trainer

# bfloat16 matrix products of an H100 SXM, FLOP/s (its datasheet).
_PEAK = {'NVIDIA H100': 989e12, 'NVIDIA H200': 989e12}


@dataclasses.dataclass(frozen=True)
class Cell:
  """An evaluation: a task, changes of its fields, a length."""

  task: str
  length: int
  fields: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Config:
  """What to train, on what, for how long.

  Attributes:
    model: the transformer.
    stages: the curriculum.
    title: of the run.
    optimizer: its numbers.
    text: installed packages whose docstrings are read, or text files.
    tokenizer: a tokenizer.json; '': built from the text.
    words: frequent words of the text among those that keys are made of.
    start: a model folder whose weights to begin with; '': random weights.
    seed: of weights and data.
    lm_weight: of the loss over all tokens, beside that over answers.
    remat: recomputes layers in the backward pass.
    workers: processes that make batches.
    mesh: devices along data, seq, model.
    steps: of this piece at most; 0: to the end.
    minutes: of this piece at most; 0: no limit.
    save_minutes: between two checkpoints.
    evaluate: cells of the evaluation after each piece.
    samples: of each cell.
    judge_tokens: tokens of an evaluation batch.
  """

  model: ModelConfig
  stages: tuple[Stage, ...]
  title: str = 'training'
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  text: tuple[str, ...] = text.PACKAGES
  tokenizer: str = ''
  words: int = 800
  start: str = ''
  seed: int = 0
  lm_weight: float = 0.25
  remat: bool = False
  workers: int = 0
  mesh: tuple[int, int, int] = (1, 1, 1)
  steps: int = 0
  minutes: float = 0.0
  save_minutes: float = 2.0
  evaluate: tuple[Cell, ...] = ()
  samples: int = 50
  judge_tokens: int = 131072


def run(config: Config, workdir: pathlib.Path) -> None:
  """Trains one piece, then evaluates and exports.

  Raises:
    ValueError: the config asks for what cannot be, or the workdir belongs to
      another one.
    OSError: a file cannot be read or written.
  """
  begin = time.monotonic()
  make_folder(workdir)
  data, words, tokenizer = prepare(config, workdir)
  mixture = Mixture(data, tokenizer, words, config.stages, config.seed)
  mesh = sharding.make_mesh(*config.mesh)
  weights, start = _begin(config, mesh)
  options = Options(
    seed=config.seed,
    lm_weight=config.lm_weight,
    remat=config.remat,
    workers=config.workers,
    start=start,
  )
  trainer = Trainer(
    config.model, config.optimizer, mixture, mesh, options, weights
  )
  checkpoints = Checkpoints(workdir / 'checkpoints', trainer.fingerprint)
  if trainer.restore(checkpoints):
    print(f'goes on from step {trainer.step} of {mixture.steps}')
  # Another config was refused: from here on, files are this run's.
  examples = _examples(config, tokenizer, workdir)
  write_json(workdir / 'config.json', dataclasses.asdict(config))
  write_json(workdir / 'env.json', environment.describe())
  log = workdir / 'metrics.jsonl'
  cut_log(log, trainer.step)
  stop = mixture.steps
  if config.steps:
    stop = min(stop, trainer.step + config.steps)
  until = begin + 60 * config.minutes if config.minutes else float('inf')
  _train(config, trainer, checkpoints, log, stop, until)
  if checkpoints.latest != trainer.step:
    trainer.save(checkpoints)
  checkpoints.close()
  rows = [json.loads(line) for line in log.read_text().splitlines()]
  write_file(workdir / 'loss.png', train_plot.draw(rows))
  scores = _judge(config, trainer, mesh, examples)
  _export(config, trainer, workdir, tokenizer, scores)


def _begin(config, mesh):
  """Weights to begin with and their SHA-256; (None, '') for random ones."""
  if not config.start:
    return None, ''
  found = loader.load(config.start, 'float32', mesh)
  if found.config.replace(dtype=config.model.dtype) != config.model:
    raise ValueError(f'config.start={config.start!r} is not of config.model')
  return found.weights, found.sha256


def prepare(
  config: Config, workdir: pathlib.Path
) -> tuple[corpus.Corpus, tuple[str, ...], Any]:
  """The text as tokens, the words of keys, the tokenizer; made once.

  Raises:
    ValueError: what stands in the workdir is damaged, or was made by other
      config.text, config.words or config.tokenizer.
    OSError: a file cannot be read or written.
  """
  store, named = workdir / 'data.npz', workdir / 'tokenizer.json'
  if not (store.exists() and named.exists()):
    _make_data(config, store, named)
  saved = read_arrays(store)
  _check_sources(config, store, saved)
  tokenizer = corpus.load_tokenizer(named.read_text())
  _check_size(config, tokenizer)
  data = corpus.Corpus(
    saved['tokens'], saved['starts'], tuple(saved['sentences'].tolist())
  )
  return data, tuple(saved['words'].tolist()), tokenizer


def _sources(config) -> dict[str, Any]:
  """What data.npz follows from; files by their content."""
  files = [source for source in config.text if text.is_path(source)]
  return {
    'text': list(config.text),
    'files': {path: _sha256(path) for path in files},
    'words': config.words,
    'tokenizer': _sha256(config.tokenizer) if config.tokenizer else '',
  }


def _sha256(path):
  return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def _check_sources(config, store, saved):
  if 'sources' not in saved:
    raise ValueError(
      f'{store} does not say what it was made from: give another --workdir, '
      'or delete it'
    )
  was, now = json.loads(str(saved['sources'])), _sources(config)
  asked = 'give the config it was made with, or another --workdir'
  for name in ('text', 'words', 'tokenizer'):
    if was[name] != now[name]:
      raise ValueError(f'{store} was made by another config.{name}: {asked}')
  for path, digest in now['files'].items():
    if was['files'][path] != digest:
      raise ValueError(f'{path} has changed since {store} was made: {asked}')


def _check_size(config, tokenizer):
  if tokenizer.get_vocab_size() != config.model.vocab_size:
    raise ValueError(
      f'the tokenizer has {tokenizer.get_vocab_size()} tokens, '
      f'config.model.vocab_size={config.model.vocab_size}'
    )


def _make_data(config, store, named):
  sources = _sources(config)
  paragraphs, _ = text.split(config.text)
  words = tuple(
    dict.fromkeys(
      [*ADJECTIVES, *NOUNS, *corpus.words(paragraphs, config.words)]
    )
  )
  if config.tokenizer:
    made = pathlib.Path(config.tokenizer).read_text()
  else:
    blank = [' ' + word for word in words]
    made = vocabulary.build(
      paragraphs, [*blank, *NOUNS], config.model.vocab_size
    ).to_str()
  tokenizer = corpus.load_tokenizer(made)
  _check_size(config, tokenizer)
  data = corpus.build(paragraphs, tokenizer)
  data.check(max(stage.length for stage in config.stages))
  write_file(named, made)
  write_arrays(
    store,
    {
      'tokens': data.tokens,
      'starts': data.starts,
      'sentences': np.asarray(data.sentences),
      'words': np.asarray(words),
      'sources': np.asarray(json.dumps(sources)),
    },
  )


def _examples(config, tokenizer, workdir):
  """Evaluation examples by (name, length); drawn once, kept on disk."""
  if not config.evaluate:
    return {}
  cells = [(c.task, c.fields, c.length) for c in config.evaluate]
  asked = json.dumps([cells, config.samples, config.seed])
  digest = hashlib.sha256((asked + tokenizer.to_str()).encode()).hexdigest()
  store = workdir / f'examples-{digest[:12]}.npz'
  if not store.exists():
    found = exact.suite(
      lambda t: tokenizer.encode(t, add_special_tokens=False).ids,
      tqdm.tqdm(cells, desc='examples', mininterval=5),
      config.samples,
      config.seed,
    )
    arrays = {}
    for (name, length), part in found.items():
      arrays[f'{length}|{name}'] = np.stack([
        np.pad(e.tokens, (0, length - len(e.tokens))).astype(np.uint16)
        for e in part
      ])  # fmt: skip
      arrays[f'{length}|{name}|spans'] = np.asarray([
        (e.prompt, len(e.tokens)) for e in part
      ])  # fmt: skip
    write_arrays(store, arrays, compress=True)
  found, saved = {}, read_arrays(store)
  for label, rows in saved.items():
    if label.endswith('|spans'):
      continue
    length, name = label.split('|')
    found[name, int(length)] = [
      exact.Example(tokens[:end].astype(np.int32), int(begin))
      for tokens, (begin, end) in zip(rows, saved[f'{label}|spans'])
    ]
  return found


def _train(config, trainer, checkpoints, log, stop, until):
  device = environment.device()
  peak = sum(rate for name, rate in _PEAK.items() if name in device)
  peak *= int(np.prod(config.mesh))
  saved = time.monotonic()
  with (
    open(log, 'a') as file,
    tqdm.tqdm(
      total=trainer.mixture.steps, initial=trainer.step, mininterval=5
    ) as bar,
  ):
    for rows in trainer.run(stop):
      for row in rows:
        row['tokens_per_second'] = row['tokens'] / row['seconds']
        if peak:
          row['mfu'] = row['flops'] / row['seconds'] / peak
        file.write(json.dumps(row) + '\n')
      file.flush()
      last = rows[-1]
      if not np.isfinite(last['loss']):
        raise FloatingPointError(
          f'the loss is {last["loss"]} at step {last["step"]}: lower '
          'config.optimizer.rate'
        )
      mean = {
        k: float(np.mean([row[k] for row in rows]))
        for k in ('answer', 'text', 'accuracy')
      }
      bar.update(len(rows))
      bar.set_postfix_str(
        f'{last["length"]} answer {mean["answer"]:.3f} '
        f'({mean["accuracy"]:.1%}) text {mean["text"]:.2f} '
        f'{last["tokens_per_second"] / 1e6:.2f}M tok/s '
        f'MFU {last.get("mfu", 0.0):.1%}'
      )
      now = time.monotonic()
      if now - saved > 60 * config.save_minutes:
        trainer.save(checkpoints)
        saved = now
      if now > until:
        break


def _judge(config, trainer, mesh, examples):
  scores = []
  filtered = {
    exact.label(c.task, c.fields): exact.filters_keys(
      tasks.get_task(c.task, **c.fields)
    )
    for c in config.evaluate
  }
  for (name, length), found in examples.items():
    batch = max(1, config.judge_tokens // length)
    judge = exact.Judge(config.model, mesh, min(batch, len(found)))
    score = judge.score(trainer.state['params'], found, length)
    print(f'{name} {length}: {score["exact"]:.1%} ({score["tokens"]:.1%})')
    about = {'task': name, 'length': length, 'n': len(found)}
    scores.append({**about, **score, 'keys_held_out': filtered[name]})
  return scores


def _export(config, trainer, workdir, tokenizer, scores):
  folder = workdir / 'model'
  folder.mkdir(exist_ok=True)
  numbers = config.model.replace(dtype='bfloat16')
  tensors = export.tensors(model.unstack(trainer.state['params']), numbers)
  raw = safetensors.numpy.save(tensors, {'format': 'np'})
  write_file(folder / 'model.safetensors', raw)
  write_file(folder / 'tokenizer.json', tokenizer.to_str())
  write_json(
    folder / 'tokenizer_config.json',
    {
      'bos_token': vocabulary.SPECIAL[vocabulary.BOS],
      'eos_token': vocabulary.SPECIAL[vocabulary.EOS],
    },
  )
  write_json(
    folder / 'config.json',
    export.config_json(numbers, vocabulary.EOS, vocabulary.BOS),
  )
  write_json(
    folder / 'training.json',
    {
      'sha256': hashlib.sha256(raw).hexdigest(),
      'steps': trainer.step,
      'of_steps': trainer.mixture.steps,
      'run': trainer.fingerprint,
      'text_sha256': trainer.mixture.writer.corpus.sha256,
      'config': dataclasses.asdict(config),
      'environment': environment.describe(),
      'scores': scores,
    },
  )
