"""lcx under lm-evaluation-harness, on tasks made here: nothing downloaded."""

import json
import textwrap

import numpy as np
import pytest

pytest.importorskip(
  'lm_eval', reason='needs lm-eval: make .venv/.has-eval installs it'
)

from experiments import lm_eval_model
from lcx.engine import Engine
from lcx.methods.base import Prompt

MODEL = 'lcx/models/needle'


def task_files(folder):
  """A retrieval to write, and the same as a choice of two."""
  rows = []
  for word, number, other in (
    ('amber-anchor', '5417', '2093'),
    ('azure-badge', '8306', '7715'),
  ):
    text = (
      'Some numbers are hidden in the text below.\n\nThe words go on, and say '
      f'little. The pass number of {word} is {number}. Little more is said, '
      f'and that at length.\n\nWhat is the pass number of {word}, as stated in '
      f'the text?\nThe pass number of {word} is'
    )
    choices = [f' {other}', f' {number}']
    rows.append({'text': text, 'answer': number, 'choices': choices})
  data = folder / 'rows.jsonl'
  data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  common = f"""
    dataset_path: json
    dataset_kwargs: {{data_files: {{test: {data}}}}}
    test_split: test
    doc_to_text: '{{{{text}}}}'
  """
  (folder / 'write.yaml').write_text(
    textwrap.dedent(f"""
    task: lcx_write
    {common.strip()}
    doc_to_target: '{{{{answer}}}}'
    output_type: generate_until
    generation_kwargs: {{until: ["\\n"], max_gen_toks: 12}}
    filter_list:
      - name: number
        filter: [{{function: regex, regex_pattern: '([0-9]+)'}}]
    metric_list: [{{metric: exact_match}}]
    """)
  )
  (folder / 'choose.yaml').write_text(
    textwrap.dedent(f"""
    task: lcx_choose
    {common.strip()}
    output_type: multiple_choice
    doc_to_choice: '{{{{choices}}}}'
    doc_to_target: 1
    target_delimiter: ''
    metric_list: [{{metric: acc}}]
    """)
  )


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
  'method', ['quest', pytest.param('dense', marks=pytest.mark.long)]
)
def test_tasks_of_the_harness_run(tmp_path, monkeypatch, method):
  from lm_eval.evaluator import simple_evaluate
  from lm_eval.tasks import TaskManager

  monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', tmp_path / 'cache')
  task_files(tmp_path)
  manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
  found = simple_evaluate(
    model='lcx',
    model_args=f'model={MODEL},method={method},length=256,question=32',
    tasks=['lcx_write', 'lcx_choose'],
    task_manager=manager,
    bootstrap_iters=0,
  )['results']
  assert found['lcx_write']['exact_match,number'] == 1.0
  assert found['lcx_choose']['acc,none'] == 1.0


@pytest.fixture(scope='module')
def model():
  return lm_eval_model.LcxModel(
    MODEL, 'snapkv', 256, protocol='context_first', question=8
  )


def test_likelihood_is_the_models_own(model):
  """The sum of the log-probabilities of the continuation's tokens."""
  context, wanted = 'The pass number of the ship ', '42 is the'
  total, greedy = model._likelihood(context, wanted)
  tokenizer, engine = model._tokenizer, model._engine
  whole = tokenizer.encode(context + wanted, add_special=True)
  known = len(tokenizer.encode(context.rstrip(), add_special=True))
  session = engine.prefill(
    [Prompt(np.zeros(0, np.int32), np.asarray(whole[:known], np.int32))]
  )
  rows = engine.score(session, [np.asarray(whole[known:], np.int32)])[0]
  rows = rows - np.log(np.exp(rows - rows.max()).sum(1))[:, None] - rows.max()
  said = sum(row[token] for row, token in zip(rows, whole[known:]))
  assert isinstance(engine, Engine) and not greedy
  np.testing.assert_allclose(total, said, atol=0.02)


def test_stop_text_ends_an_answer(model):
  free = model._generate('The words of', {'max_gen_toks': 8})
  stop = free[len(free) // 2]
  cut = model._generate('The words of', {'until': [stop], 'max_gen_toks': 8})
  assert cut == free.partition(stop)[0] != free


def test_what_does_not_fit_is_refused(model):
  with pytest.raises(ValueError, match='exceeds length=256: raise it'):
    model._generate('word ' * 300, {'max_gen_toks': 8})
  with pytest.raises(ValueError, match='protocol='):
    lm_eval_model.LcxModel(MODEL, protocol='both')
  with pytest.raises(ValueError, match='unknown method'):
    lm_eval_model.LcxModel(MODEL, 'qest')
