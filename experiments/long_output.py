"""Long outputs: where a method leaves dense attention, and what it still knows.

A context is read; then the model writes `new_tokens` tokens, which nothing
stops; then a question about the context is fed through the decode path and
answered. Of each method: the first token that is not dense attention's, the
share of tokens that stand where dense attention has them, and the answer's
score beside dense attention's. A row is a sample under one method; those in
results.jsonl that have a score are not made again.
"""

import dataclasses
import datetime
import pathlib
import statistics
from typing import Any

import numpy as np

from experiments import answers, environment, evaluate, models
from experiments.errors import Failure, fault
from experiments.prompts import Template
from experiments.results import Results, Row, key_of, write_json

_BASELINE = 'dense'


@dataclasses.dataclass(frozen=True)
class Config:
  """What to compare.

  Attributes:
    model: a Hugging Face folder, a GGUF file, or `preset:NAME`.
    methods: as in `evaluate`; dense is always first.
    task: its name; every sample's first question is asked.
    length: tokens of the context with question and answer.
    new_tokens: written before the question.
    samples: contexts.
    title: of the run.
    weights: as in `evaluate`.
    seed: of the samples.
    dtype: of weights and activations.
  """

  model: str
  methods: dict[str, dict[str, Any]]
  task: str
  length: int
  new_tokens: int = 2000
  samples: int = 8
  title: str = 'long output'
  weights: evaluate.LowBit = ''
  seed: int = 0
  dtype: evaluate.Dtype = 'auto'

  def __post_init__(self):
    for name in ('length', 'new_tokens', 'samples'):
      if getattr(self, name) < 1:
        raise ValueError(f'config.{name}={getattr(self, name)}: at least 1')


def run(config: Config, workdir: pathlib.Path) -> None:
  """Writes a row a method and sample, prints a table.

  Raises:
    ValueError: a model, a method or a task does not exist or does not fit.
    Failure: a row ended without an answer.
  """
  table = {_BASELINE: {}} | config.methods
  variants = [
    evaluate.variant(label, fields) for label, fields in table.items()
  ]
  task = evaluate.task(config.task, {}, 0)
  source = models.find(config.model, config.seed)
  for each in variants:
    evaluate.check_weights(each.method, source)
  dtype = evaluate.dtype_of(config.dtype)
  where = environment.describe()
  fields = dataclasses.asdict(config)
  shared = {k: fields[k] for k in ('task', 'length', 'new_tokens', 'weights')}
  shared |= {'model': source.name, 'model_sha256': source.sha256}
  shared |= {'dtype': dtype, 'seed': config.seed, 'device': where['device']}
  with Results(workdir / 'results.jsonl') as results:
    write_json(workdir / 'config.json', fields)
    write_json(workdir / 'env.json', where)
    keys = {
      (v, i): key_of(
        shared | v.parts | {'code': v.code, 'method': v.label, 'sample': i}
      )
      for i in range(config.samples)
      for v in variants
    }
    missing = [
      at
      for at, key in keys.items()
      if results.rows.get(key, {}).get('score') is None
    ]
    if missing:
      model = evaluate.load(source, dtype, config.weights)
      for (variant, i), found in _written(config, model, task, missing):
        # Dense attention's own row is there: it is the first of its sample.
        dense = found
        if variant is not variants[0]:
          dense = results.rows[keys[variants[0], i]]
        row = {'key': keys[variant, i], **shared, 'method': variant.label}
        row |= {'sample': i, **variant.parts, **found}
        row |= _beside(dense['tokens'], found['tokens'])
        row |= {'versions': where['versions'], 'git': where['git']}
        row |= {'command': environment.command()}
        now = datetime.datetime.now(datetime.UTC)
        row['date'] = now.isoformat(timespec='seconds')
        results.append([row])
    rows = [results.rows[key] for key in keys.values()]
  for variant in variants:
    print(_line([r for r in rows if r['method'] == variant.label]))
  print(f'{len(rows)} rows: {workdir / "results.jsonl"}')
  for row in rows:
    if row['score'] is None:
      raise Failure(f'{row["method"]}: {fault(row["status"], dtype)}')


def _written(config: Config, model: Any, task: Any, missing):
  """((variant, sample), what was written and answered), dense first."""
  template = Template(model.tokenizer)
  setting = answers.Setting(
    samples=config.samples,
    seed=config.seed,
    batch=1,
    capacity=0,
    haystack=None,
    transfer_guard='allow',
  )
  engines: dict[Any, Any] = {}
  for variant, i in missing:
    sample = task.sample(
      lambda text: len(model.tokenizer.encode(text)),
      config.length,
      config.seed,
      i,
      None,
      overhead=template.overhead,
    )
    if variant not in engines:
      engines[variant] = answers.make_engine(
        model, variant.method, config.length + config.new_tokens, setting
      )
    engine, prompt = engines[variant], template.prompt(sample)
    session = engine.prefill([prompt])
    tokens, status = engine.decode(session, config.new_tokens)
    engine.extend(session, [prompt.question(0)])
    said, last = engine.decode(session, sample.max_new_tokens)
    ids = said[0]
    for stop in model.tokenizer.eos_ids:
      ids = ids[: ids.index(stop)] if stop in ids else ids
    text = model.tokenizer.decode(ids)
    good = status[0] == last[0] == 'ok'
    yield (
      (variant, i),
      {
        'tokens': tokens[0],
        'status': status[0] if status[0] != 'ok' else last[0],
        'score': task.score(sample, 0, text) if good else None,
        'prediction': text,
        'answer': ' | '.join(sample.questions[0].answers),
        'digest': sample.digest,
      },
    )


def _beside(dense: list[int], mine: list[int]) -> Row:
  n = min(len(dense), len(mine))
  alike = np.asarray(dense[:n]) == np.asarray(mine[:n])
  first = int(np.argmin(alike)) if not alike.all() else n
  return {'diverges_at': first, 'alike': float(alike.mean()) if n else 1.0}


def _line(rows: list[Row]) -> str:
  scores = [r['score'] for r in rows if r['score'] is not None]
  score = f'{100 * statistics.mean(scores):5.1f}' if scores else '    -'
  leaves = statistics.median(r['diverges_at'] for r in rows)
  alike = statistics.mean(r['alike'] for r in rows)
  return (
    f'{rows[0]["method"]:<24} score {score}  leaves dense at token '
    f'{leaves:g} of {rows[0]["new_tokens"]} (median)  alike {alike:.1%}'
  )
