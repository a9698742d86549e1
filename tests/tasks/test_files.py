"""Samples from files: the benchmarks' schemas, and bad files."""

import json

import pytest

from lcx import tasks
from lcx.tasks import files


def write(path, rows):
  path.parent.mkdir(exist_ok=True, parents=True)
  path.write_text(
    '\n'.join(r if isinstance(r, str) else json.dumps(r) for r in rows)
  )
  return str(path)


RULER_ROW = {
  'index': 0,
  'input': 'Some text.\nA needle: 5.\nWhat is it? ',
  'outputs': ['5', '6'],
  'length': 99,
  'answer_prefix': ' It is ',
}


def test_ruler_prompts_run_verbatim(tmp_path):
  path = write(tmp_path / 'vt' / 'validation.jsonl', [RULER_ROW, '', RULER_ROW])
  samples = tasks.load('ruler', path)
  assert [s.index for s in samples] == [0, 1]
  sample = samples[0]
  assert sample.task == 'vt' and sample.max_new_tokens == 30
  assert sample.prompt(0) == RULER_ROW['input'] + RULER_ROW['answer_prefix']
  assert sample.context == 'Some text.\nA needle: 5.'
  assert sample.questions[0].text == '\nWhat is it? '
  assert tasks.score(sample, 0, 'It is 6') == 0.5
  stripped = tasks.load('ruler', path, strip_prefix=True)[0]
  assert stripped.questions[0].answer_prefix == ' It is'


def test_ruler_qa_needs_any_answer(tmp_path):
  path = write(tmp_path / 'qa_1.jsonl', [RULER_ROW])
  assert tasks.score(tasks.load('ruler', path)[0], 0, 'It is 6') == 1


@pytest.mark.parametrize('name', files.INFINITE_BENCH)
def test_infinitebench_rows(tmp_path, name):
  row = {
    'id': 0,
    'context': 'CONTEXT',
    'input': 'INPUT?',
    'answer': ['12'],
    'options': ['x', '12', 'y', 'z'],
  }
  sample = tasks.load('infinitebench', write(tmp_path / f'{name}.jsonl', [row]))
  sample = sample[0]
  prompt = sample.prompt(0)
  assert sample.context == 'CONTEXT' and prompt.count('CONTEXT') == 1
  assert '{' not in prompt.replace('{"', '')
  perfect = 'B.' if name in ('code_debug', 'longbook_choice_eng') else '12'
  assert tasks.score(sample, 0, perfect) == 1
  assert tasks.score(sample, 0, '') == 0


def test_infinitebench_choices_need_options(tmp_path):
  row = {'context': 'c', 'input': 'i', 'answer': ['w'], 'options': ['x']}
  path = write(tmp_path / 'code_debug.jsonl', [row])
  with pytest.raises(ValueError, match=r'code_debug.jsonl:1: .* 4 options'):
    tasks.load('infinitebench', path)


@pytest.mark.parametrize('name', files.LONGBENCH)
def test_longbench_rows(tmp_path, name):
  row = {
    'input': 'INPUT',
    'context': 'CONTEXT',
    'answers': ['Paragraph 7'],
    'length': 1,
    'dataset': name,
    'language': 'en',
    'all_classes': ['Paragraph 7', 'other'],
    '_id': 'x',
  }
  path = write(tmp_path / f'{name}_e.jsonl', [row])
  sample = tasks.load('longbench', path)[0]
  assert sample.task == name and sample.context == 'CONTEXT'
  assert tasks.score(sample, 0, 'Paragraph 7') == 1
  few_shot = ('trec', 'lsht', 'triviaqa', 'samsum', 'lcc', 'repobench-p')
  assert sample.chat == (name not in few_shot)


def test_templates_of_the_user(tmp_path):
  row = {'context': 'C{input}', 'input': 'I', 'answers': ['a']}
  path = write(tmp_path / 'qasper.jsonl', [row])
  templates = tmp_path / 'prompts.json'
  templates.write_text('{"qasper": "Say {context} then {input} {other}"}')
  (sample,) = tasks.load('longbench', path, templates=str(templates))
  assert sample.prompt(0) == 'Say C{input} then I {other}'
  templates.write_text('{"qasper": "nothing"}')
  with pytest.raises(ValueError, match=r'lacks \{context\}'):
    tasks.load('longbench', path, templates=str(templates))
  templates.write_text('[]')
  with pytest.raises(ValueError, match='template for qasper'):
    tasks.load('longbench', path, templates=str(templates))


def test_bad_files_are_named_with_their_line(tmp_path):
  good = json.dumps(RULER_ROW)
  cases = [
    ([good, good[:20]], r'vt\.jsonl:2: not JSON .* cut'),
    ([{'input': 'x'}], r'vt\.jsonl:1: no field outputs; a row has input'),
    (['[1]'], r'vt\.jsonl:1: no field input'),
    ([], 'holds no rows'),
    ([RULER_ROW | {'outputs': []}], ':1: outputs must be a value'),
    ([RULER_ROW | {'outputs': [{}]}], ':1: outputs must be a value'),
  ]
  for rows, message in cases:
    with pytest.raises(ValueError, match=message):
      tasks.load('ruler', write(tmp_path / 'vt.jsonl', rows))
  (tmp_path / 'vt.jsonl').write_bytes(b'\xff\xfe\x00')
  with pytest.raises(ValueError, match='not UTF-8'):
    tasks.load('ruler', str(tmp_path / 'vt.jsonl'))
  with pytest.raises(FileNotFoundError):
    tasks.load('ruler', str(tmp_path / 'cwe.jsonl'))
  with pytest.raises(ValueError, match="no RULER task 'other'"):
    tasks.load('ruler', write(tmp_path / 'a' / 'other.jsonl', [RULER_ROW]))
  with pytest.raises(ValueError, match="no loader 'helmet'"):
    tasks.load('helmet', 'x')
  with pytest.raises(ValueError, match='no segmenter'):
    tasks.load('longbench', str(tmp_path / 'vcsum.jsonl'))


def test_truncate_middle(count):
  context = ' '.join(f'w{i}' for i in range(3000))
  sample = tasks.Sample(
    task='qasper',
    metric='f1',
    system='System. ',
    context=context,
    questions=(tasks.Question(' Question?', 'Answer:', ('w',)),),
    max_new_tokens=32,
  )
  cut = tasks.truncate_middle(sample, count, 1000, overhead=20)
  assert 0 <= cut.tokens - (count(cut.prompt(0)) + 52) <= 2
  assert 950 <= cut.tokens <= 1000
  head, tail = cut.context[:500], cut.context[-500:]
  assert context.startswith(head) and context.endswith(tail)
  whole = tasks.truncate_middle(sample, count, 10**6)
  assert whole.context == context and whole.tokens > 0
  with pytest.raises(ValueError, match='too short for qasper'):
    tasks.truncate_middle(sample, count, 30)


SQUAD = {
  'version': 'v2.0',
  'data': [
    {
      'title': f'Article {a}',
      'paragraphs': [
        {
          'context': f'Fact {a}.{p}: the city is Town{a}{p}. ' + 'More. ' * 9,
          'qas': [
            {
              'question': f'Which city is fact {a}.{p}, form {q}?',
              'answers': [{'text': f'Town{a}{p}'}, {'text': f'Town{a}{p}'}],
              'is_impossible': False,
            }
            for q in range(2)
          ]
          + [{'question': 'None?', 'answers': [], 'is_impossible': True}],
        }
        for p in range(4)
      ],
    }
    for a in range(20)
  ],
}
HOTPOT = [
  {
    'question': f'Who is {i}?',
    'answer': f'Person{i}',
    'supporting_facts': [[f'A{i}', 0], [f'B{i}', 0]],
    'context': [
      [f'{title}{i}', [f'Text {title}{i}.', f' Person{i}.' * (title == 'B')]]
      for title in 'ABCDE'
    ],
  }
  for i in range(9)
]


@pytest.mark.parametrize('name, data', [('qa_1', SQUAD), ('qa_2', HOTPOT)])
def test_questions_over_documents(tmp_path, count, name, data):
  path = tmp_path / 'data.json'
  path.write_text(json.dumps(data))
  task = tasks.get_task(name, path=str(path), questions=2)
  seen = set()
  for index in range(4):
    sample = task.sample(count, 600, 0, index)
    assert sample == task.sample(count, 600, 0, index)
    assert sample.tokens <= 600
    for i, question in enumerate(sample.questions):
      (answer,) = question.answers
      assert answer in sample.context
      assert tasks.score(sample, i, f'It is {answer.upper()}.') == 1
      assert tasks.score(sample, i, '') == 0
    seen.add(sample.questions[0].text)
  assert len(seen) == 4
  # Both forms of a SQuAD question are asked of one context.
  first = task.sample(count, 600, 0, 0)
  assert len(first.questions) == (2 if name == 'qa_1' else 1)
  # All documents in: the sample is as long as the data allows.
  whole = task.sample(count, 10**5, 0, 0)
  assert whole.context.count('Document ') == (80 if name == 'qa_1' else 45)


def test_bad_question_files(tmp_path, count):
  path = tmp_path / 'data.json'
  with pytest.raises(ValueError, match='qa_1 needs its data: path=FILE'):
    tasks.get_task('qa_1').sample(count, 600, 0, 0)
  for text, message in (
    ('{"data": [', 'is not JSON'),
    ('{"rows": []}', 'neither SQuAD 2.0 nor HotpotQA'),
    ('[{"question": 1}]', 'neither SQuAD 2.0 nor HotpotQA'),
    ('[]', 'no answerable question'),
  ):
    path.write_text(text)
    tasks_documents_cache_clear()
    with pytest.raises(ValueError, match=message):
      tasks.get_task('qa_2', path=str(path)).sample(count, 600, 0, 0)


def tasks_documents_cache_clear():
  from lcx.tasks import documents

  documents.read_questions.cache_clear()
