"""Samples from the benchmarks' own JSONL files.

RULER's rows hold the whole prompt, so published prompts run verbatim.
InfiniteBench's and LongBench's rows hold a context and an input; the sentences
around them are our own unless `templates` names a JSON file {task: template}
with {context} and {input} in each (LongBench's config/dataset2prompt.json is
one).
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from lcx.tasks import documents, frequencies, needles, variables
from lcx.tasks.base import Count, Draft, Question, Sample, fit, prompt_tokens

_RULER = {
  task.name: task
  for module in (needles, variables, frequencies, documents)
  for task in module.TASKS
}


@dataclasses.dataclass(frozen=True)
class Form:
  """How a task of a file is asked and scored."""

  max_new_tokens: int
  metric: str
  template: str
  answer_prefix: str = ''
  chat: bool = True


_BOOK = 'Read this book; a question about it follows.\n\n{context}\n\n'
_OPTIONS = '\nA. {OPTION_A}\nB. {OPTION_B}\nC. {OPTION_C}\nD. {OPTION_D}\n'
# Budgets and metrics: InfiniteBench's src/eval_utils.py and compute_scores.py.
INFINITE_BENCH = {
  'passkey': Form(6, 'first_integer', '{context}\n\n{input}'),
  'number_string': Form(12, 'first_integer', '{context}\n\n{input}'),
  'kv_retrieval': Form(50, 'word', '{context}\n\n{input}'),
  'math_find': Form(3, 'first_number', '{context}\n\n{input}'),
  'code_run': Form(5, 'last_integer', '{context}\n\n{input}'),
  'math_calc': Form(
    30000,
    'partial_sums',
    'List the running totals of this expression, from the left.\n\n{context}',
    'Totals: [',
  ),
  'code_debug': Form(
    5,
    'letter_or_name',
    'One function of this code has an error that makes it fail.\n\n{context}'
    '\n\nWhich one?' + _OPTIONS + 'Answer with the letter.',
    'The answer is:',
  ),
  'longbook_choice_eng': Form(
    40,
    'choice',
    _BOOK + 'Question: {input}' + _OPTIONS + 'Answer with the letter.',
    'The answer is:',
  ),
  'longbook_qa_eng': Form(
    40, 'f1', _BOOK + 'Answer in a few words.\nQuestion: {input}', 'Answer:'
  ),
  'longbook_qa_chn': Form(
    40,
    'f1_characters',
    '请阅读本书。\n\n{context}\n\n请简短回答：{input}',
    '答：',
  ),
  'longbook_sum_eng': Form(
    1200, 'rouge_l_sum', '{context}\n\nSummarise this book.', 'Summary:'
  ),
  'longdialogue_qa_eng': Form(
    40,
    'name',
    'In this dialogue, one name is replaced by $$MASK$$.\n\n{context}\n\n'
    'Which name is it?',
    'The name is',
  ),
}

_TEXT = 'Read this text; a question about it follows.\n\n{context}\n\n'
_QA = _TEXT + 'Answer in a few words.\nQuestion: {input}'
_SUMMARY = '{context}\n\nSummarise the text above. {input}'
_SHOTS = '{context}\n{input}'


def _longbench_forms() -> dict[str, Form]:
  """Budgets and metrics: LongBench's config/dataset2maxlen.json, metrics.py."""
  forms = {
    name: Form(tokens, 'f1', _QA, 'Answer:')
    for name, tokens in (
      ('narrativeqa', 128),
      ('qasper', 128),
      ('multifieldqa_en', 64),
      ('hotpotqa', 32),
      ('2wikimqa', 32),
      ('musique', 32),
    )
  }
  for name in ('gov_report', 'qmsum', 'multi_news'):
    forms[name] = Form(512, 'rouge_l', _SUMMARY, 'Summary:')
  for name, tokens, metric in (
    ('trec', 64, 'first_line_classes'),
    ('lsht', 64, 'first_line_classes'),
    ('triviaqa', 32, 'first_line_f1'),
    ('samsum', 128, 'first_line_rouge_l'),
  ):
    forms[name] = Form(tokens, metric, _SHOTS, chat=False)
  for name in ('lcc', 'repobench-p'):
    forms[name] = Form(64, 'code_line', '{context}{input}', chat=False)
  where = _TEXT + 'Which paragraph is this from? {input}'
  forms['passage_retrieval_en'] = Form(32, 'numbers', where, 'Paragraph')
  forms['passage_retrieval_zh'] = Form(32, 'numbers', where, '段落')
  forms['passage_count'] = Form(
    32,
    'numbers',
    _TEXT + 'How many different paragraphs are there, copies not counted?',
    'Number:',
  )
  return forms


LONGBENCH = _longbench_forms()
_NEED_SEGMENTER = ('multifieldqa_zh', 'dureader', 'vcsum')


def load(benchmark: str, path: str, **options: Any) -> list[Sample]:
  """Samples of a benchmark's JSONL file.

  Args:
    benchmark: 'ruler', 'infinitebench' or 'longbench'.
    path: one task's file.
    **options: of `load_ruler`, `load_infinitebench` or `load_longbench`.

  Raises:
    ValueError: unknown benchmark or task, or a row of another form; the
      message names file and line.
    OSError: the file cannot be read.
  """
  loaders: dict[str, Callable[..., list[Sample]]] = {
    'ruler': load_ruler,
    'infinitebench': load_infinitebench,
    'longbench': load_longbench,
  }
  if benchmark not in loaders:
    raise ValueError(f'no loader {benchmark!r}; loaders: {", ".join(loaders)}')
  return loaders[benchmark](path, **options)


def load_ruler(
  path: str,
  *,
  task: str | None = None,
  max_new_tokens: int | None = None,
  chat: bool = True,
  strip_prefix: bool = False,
) -> list[Sample]:
  """RULER's rows {input, outputs, answer_prefix}, prompts verbatim.

  The last line of a prompt is taken for its question, all before it for the
  context; together they are the prompt.

  Args:
    path: TASK/validation.jsonl or TASK.jsonl.
    task: one of RULER's names; default: read off the path.
    max_new_tokens: default: the benchmark's, by task.
    chat: False for prompts that were written with a model's template.
    strip_prefix: drop whitespace at the answer prefix's end: tokenizers that
      join a space with the next word never saw it alone (vt's prefix ends so).
  """
  name = task or _task_of(path, _RULER)
  if name not in _RULER:
    raise ValueError(
      f'{path}: no RULER task {name!r}; name it with task=, one of '
      f'{", ".join(_RULER)}'
    )
  known = _RULER[name]
  samples = []
  for number, row in _rows(path, ('input', 'outputs')):
    context, question = _split_last_line(str(row['input']))
    prefix = str(row.get('answer_prefix', ''))
    asked = Question(
      question,
      prefix.rstrip() if strip_prefix else prefix,
      _strings(row['outputs'], path, number, 'outputs'),
    )
    samples.append(
      Sample(
        task=name,
        metric=known.metric,
        system='',
        context=context,
        questions=(asked,),
        max_new_tokens=max_new_tokens or known.max_new_tokens,
        index=len(samples),
        chat=chat,
      )
    )
  return samples


def load_infinitebench(
  path: str, *, task: str | None = None, templates: str | None = None
) -> list[Sample]:
  """InfiniteBench's rows {context, input, answer, options}."""
  name = task or _task_of(path, INFINITE_BENCH)
  form = _form(name, INFINITE_BENCH, path, templates)
  samples = []
  for number, row in _rows(path, ('context', 'input', 'answer')):
    answers = _strings(row['answer'], path, number, 'answer')
    options = _strings(row.get('options') or (), path, number, 'options', 0)
    if name in ('code_debug', 'longbook_choice_eng'):
      if len(options) != 4 or answers[0] not in options:
        raise ValueError(
          f'{path}:{number}: {name} needs 4 options, the answer among them'
        )
      answers = ('ABCD'[options.index(answers[0])], answers[0])
    samples.append(_fill(name, form, row, answers, options, len(samples)))
  return samples


def load_longbench(
  path: str, *, task: str | None = None, templates: str | None = None
) -> list[Sample]:
  """LongBench's rows {context, input, answers, all_classes...} (v1, and -E)."""
  name = task or _task_of(path, LONGBENCH)
  name = name.removesuffix('_e')
  if name in _NEED_SEGMENTER:
    raise ValueError(
      f'{path}: {name} is scored over Chinese words, for which lcx has no '
      'segmenter'
    )
  form = _form(name, LONGBENCH, path, templates)
  samples = []
  for number, row in _rows(path, ('context', 'input', 'answers')):
    answers = _strings(row['answers'], path, number, 'answers')
    choices = _strings(
      row.get('all_classes') or (), path, number, 'all_classes', 0
    )
    samples.append(_fill(name, form, row, answers, choices, len(samples)))
  return samples


def truncate_middle(
  sample: Sample, count: Count, length: int, *, overhead: int = 0
) -> Sample:
  """Drops the middle of a context, as InfiniteBench and LongBench do.

  Args:
    sample: from a file.
    count: tokens of a text.
    length: tokens of the prompt, of `overhead` and of the answer together.
    overhead: tokens that the chat template and special tokens add.

  Raises:
    ValueError: the prompt is too long even without a context.
  """

  def tokens(texts: Draft | Sample) -> int:
    return overhead + sample.max_new_tokens + prompt_tokens(count, texts)

  def draft(size: int) -> Draft:
    context = sample.context
    if size < len(context):
      context = context[: (size + 1) // 2] + context[len(context) - size // 2 :]
    return Draft(sample.system, context, sample.questions)

  context, used = sample.context, tokens(sample)
  if used > length:
    kept, used = fit(draft, tokens, 0, length, sample.task)
    context = kept.context
  return dataclasses.replace(
    sample, context=context, length=length, tokens=used
  )


def _fill(
  name: str,
  form: Form,
  row: dict[str, Any],
  answers: tuple[str, ...],
  choices: tuple[str, ...],
  index: int,
) -> Sample:
  """A row's texts in the form's template, cut at the context."""
  values = {'input': str(row['input']), 'question': str(row['input'])}
  values |= {f'OPTION_{x}': o for x, o in zip('ABCD', choices)}
  before, _, after = form.template.partition('{context}')

  def fill(part: str) -> str:
    return re.sub(r'\{(\w+)\}', lambda m: values.get(m[1], m[0]), part)

  question = Question(fill(after), form.answer_prefix, answers, choices=choices)
  return Sample(
    task=name,
    metric=form.metric,
    system=fill(before),
    context=str(row['context']),
    questions=(question,),
    max_new_tokens=form.max_new_tokens,
    index=index,
    chat=form.chat,
  )


def _form(
  name: str, forms: dict[str, Form], path: str, templates: str | None
) -> Form:
  if name not in forms:
    raise ValueError(
      f'{path}: no task {name!r}; name it with task=, one of {", ".join(forms)}'
    )
  if templates is None:
    return forms[name]
  with open(templates, encoding='utf-8') as file:
    try:
      template = json.load(file)[name]
    except (ValueError, KeyError, TypeError):
      raise ValueError(
        f'{templates} is not a JSON object with a template for {name}'
      ) from None
  if not isinstance(template, str) or '{context}' not in template:
    raise ValueError(f'{templates}: the template of {name} lacks {{context}}')
  return dataclasses.replace(forms[name], template=template, answer_prefix='')


def _rows(
  path: str, fields: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, Any]]]:
  """(line number, row) of a JSONL file; empty lines are skipped."""
  empty = True
  with open(path, encoding='utf-8') as file:
    try:
      for number, line in enumerate(file, 1):
        if not line.strip():
          continue
        try:
          row = json.loads(line)
        except ValueError as error:
          raise ValueError(
            f'{path}:{number}: not JSON ({error}); is the file cut?'
          ) from None
        missing = [
          f for f in fields if not isinstance(row, dict) or f not in row
        ]
        if missing:
          raise ValueError(
            f'{path}:{number}: no field {", ".join(missing)}; a row has '
            f'{", ".join(fields)}'
          )
        empty = False
        yield number, row
    except UnicodeDecodeError as error:
      raise ValueError(f'{path} is not UTF-8 text: {error}') from None
  if empty:
    raise ValueError(f'{path} holds no rows')


def _strings(
  value: Any, path: str, number: int, field: str, least: int = 1
) -> tuple[str, ...]:
  """A field that is one value or a list of values, as strings."""
  values = value if isinstance(value, list | tuple) else [value]
  if len(values) < least or any(isinstance(v, dict | list) for v in values):
    raise ValueError(
      f'{path}:{number}: {field} must be a value or a list of values'
    )
  return tuple(str(v) for v in values)


def _split_last_line(text: str) -> tuple[str, str]:
  """(all before the last line that is not blank, that line and the rest)."""
  cut = text.rstrip().rfind('\n')
  return (text[:cut], text[cut:]) if cut >= 0 else ('', text)


def _task_of(path: str, known: dict[str, Any]) -> str:
  """The task that a path names: its file's name, or its folder's."""
  file = pathlib.Path(path)
  names = (file.stem, file.stem.removesuffix('_e'), file.parent.name)
  return next((name for name in names if name in known), file.stem)
