"""RULER's two question-answering tasks: one question, many documents.

Source: RULER (arXiv:2404.06654), section 3.4: qa_1 over SQuAD 2.0 (answerable
questions; dev-v2.0.json), qa_2 over HotpotQA (hotpot_dev_distractor_v1.json).
The data is the user's own copy: `get_task('qa_1', path=...)`. Documents of the
question's own article come first among the distractors. Sentences are our own.
"""

import dataclasses
import functools
import json
from typing import Any, ClassVar

from lcx.tasks.base import Draft, Draw, Question, Task, locate


@dataclasses.dataclass(frozen=True)
class Example:
  """A question with the numbers of its documents in the data set.

  Attributes:
    question: as in the data set.
    answers: any one of them is right.
    gold: documents that hold the answer.
    near: documents of the same article or retrieval, distractors of choice.
  """

  question: str
  answers: tuple[str, ...]
  gold: tuple[int, ...]
  near: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents(Task):
  """Questions of a data set over its own documents, in random order.

  Sample `index` asks the data set's question number `index` (modulo their
  number). Further questions of one context are the next ones whose documents
  are the same, where the data set has such (SQuAD).

  Attributes:
    path: the data set's JSON file.
  """

  metric: ClassVar[str] = 'any_part'

  max_new_tokens: int = 32
  path: str = ''

  def draft(self, size: int, draw: Draw, length: int, haystack: str) -> Draft:
    """`size` distractors beside the question's own documents.

    Raises:
      ValueError: no path was given, or the file is not of a known form.
      OSError: the file cannot be read.
    """
    if not self.path:
      raise ValueError(
        f'{self.name} needs its data: path=FILE, SQuAD dev-v2.0.json or '
        'HotpotQA hotpot_dev_distractor_v1.json'
      )
    documents, examples = read_questions(self.path)
    first, *following = examples[draw.index % len(examples) :]
    asked = [first]
    for example in following:
      if len(asked) == self.questions or example.gold != first.gold:
        break
      asked.append(example)
    near = list(first.near)
    draw('near').shuffle(near)
    taken = {*first.gold, *near}
    chosen = near[:size]
    if size > len(near):
      others = [i for i in range(len(documents)) if i not in taken]
      chosen += draw('others').sample(
        others, min(size - len(near), len(others))
      )
    chosen += first.gold
    draw('order').shuffle(chosen)
    context = '\n\n'.join(
      f'Document {i}:\n{documents[j]}' for i, j in enumerate(chosen, 1)
    )
    depths = locate(context, *(documents[j] for j in first.gold))
    questions = tuple(
      Question(
        '\n\nAnswer from the documents above, in a few words and without an '
        f'explanation.\nQuestion: {example.question}',
        'Answer:',
        example.answers,
        depths,
      )
      for example in asked
    )
    system = 'Read the documents; a question about them follows.\n\n'
    return Draft(system, context, questions)


@functools.lru_cache(maxsize=4)
def read_questions(path: str) -> tuple[tuple[str, ...], tuple[Example, ...]]:
  """Documents and questions of a SQuAD 2.0 or HotpotQA file.

  Raises:
    ValueError: the file is not JSON of one of the two forms.
    OSError: the file cannot be read.
  """
  with open(path, encoding='utf-8') as file:
    try:
      data = json.load(file)
    except ValueError as error:
      raise ValueError(f'{path} is not JSON: {error}') from None
  try:
    read = _squad(data['data']) if isinstance(data, dict) else _hotpot(data)
  except (KeyError, TypeError, IndexError, ValueError) as error:
    raise ValueError(
      f'{path} is neither SQuAD 2.0 nor HotpotQA: '
      f'{type(error).__name__} {error}'
    ) from None
  if not read[1]:
    raise ValueError(f'{path} holds no answerable question')
  return read


def _squad(articles: Any) -> tuple[tuple[str, ...], tuple[Example, ...]]:
  documents: dict[str, int] = {}
  examples = []
  for article in articles:
    contexts = [paragraph['context'] for paragraph in article['paragraphs']]
    ids = [documents.setdefault(text, len(documents)) for text in contexts]
    for paragraph, gold in zip(article['paragraphs'], ids):
      near = tuple(i for i in dict.fromkeys(ids) if i != gold)
      for qa in paragraph['qas']:
        if qa.get('is_impossible'):
          continue
        answers = tuple(dict.fromkeys(a['text'] for a in qa['answers']))
        examples.append(Example(qa['question'], answers, (gold,), near))
  return tuple(documents), tuple(examples)


def _hotpot(rows: Any) -> tuple[tuple[str, ...], tuple[Example, ...]]:
  documents: dict[str, int] = {}
  examples = []
  for row in rows:
    supporting = {title for title, _ in row['supporting_facts']}
    gold, near = [], []
    for title, sentences in row['context']:
      text = f'{title}\n{"".join(sentences)}'
      i = documents.setdefault(text, len(documents))
      (gold if title in supporting else near).append(i)
    examples.append(
      Example(row['question'], (row['answer'],), tuple(gold), tuple(near))
    )
  return tuple(documents), tuple(examples)


TASKS = (Documents(name='qa_1'), Documents(name='qa_2'))
