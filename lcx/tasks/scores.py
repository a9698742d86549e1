"""How predictions are scored: exact rules, no judge, each in [0, 1].

A metric takes (prediction, answers, choices). The rules are those of the
benchmarks' own scorers; the docstrings name them. RULER's are recalls of
substrings, so the budget of the answer is a part of them.
"""

import re
from collections.abc import Callable

from lcx.tasks import text_scores

Strings = tuple[str, ...]
Metric = Callable[[str, Strings, Strings], float]

_CONTROL = re.compile('[\x00-\x1f]')
# Marks that become spaces before words are compared, by str.translate.
_WORD_MARKS = {ord(mark): ' ' for mark in '\n:"\'.,?!{}'}
_CODE_MARKS = {ord(mark): ' ' for mark in '\n.`\'":'}
_CHOICE_MARKS = {ord(mark): ' ' for mark in '\n"\'.,?!{}'}
_OPTION_MARKS = re.compile('[\n`\'"*-]|[Oo]ption')
_NUMBER = re.compile(r'\d+\.\d+|\d+')


def clean(prediction: str) -> str:
  """RULER's post-processing: control characters to newlines, then strip."""
  return _CONTROL.sub('\n', prediction.strip()).strip()


def all_parts(prediction: str, answers: Strings, choices: Strings) -> float:
  """Share of the answers that the prediction contains (RULER, most tasks)."""
  said = clean(prediction).lower()
  return sum(answer.lower() in said for answer in answers) / len(answers)


def any_part(prediction: str, answers: Strings, choices: Strings) -> float:
  """1 if the prediction contains any one of the answers (RULER's QA)."""
  said = clean(prediction).lower()
  return float(any(answer.lower() in said for answer in answers))


def first_integer(prediction: str, answers: Strings, choices: Strings) -> float:
  """1 if the first run of digits is the answer (PassKey, Number)."""
  found = re.search('[0-9]+', prediction)
  return float(found is not None and found[0] in answers)


def first_number(prediction: str, answers: Strings, choices: Strings) -> float:
  """1 if the first number equals the answer (Math.Find)."""
  found = _NUMBER.search(prediction)
  return float(
    found is not None and any(float(found[0]) == float(a) for a in answers)
  )


def last_integer(prediction: str, answers: Strings, choices: Strings) -> float:
  """1 if the last word is the answer as an integer (Code.Run)."""
  words = prediction.translate(_CODE_MARKS).split()
  try:
    return float(int(words[-1]) in {int(answer) for answer in answers})
  except (IndexError, ValueError):
    return 0.0


def word(prediction: str, answers: Strings, choices: Strings) -> float:
  """1 if an answer is a word of the prediction (Retrieve.KV)."""
  words = prediction.translate(_WORD_MARKS).split()
  return float(any(answer in words for answer in answers))


def name(prediction: str, answers: Strings, choices: Strings) -> float:
  """1 if an upper-case answer is a word of the prediction (En.Dia)."""
  return word(prediction.upper(), answers, choices)


def choice(prediction: str, answers: Strings, choices: Strings) -> float:
  """The letter A-D that a prediction names first (En.MC).

  The first character, if it is a letter of these; else what follows an
  announcement ("answer is"...); else the first such word.
  """
  if prediction[:1] and prediction[0] in 'ABCD':
    return float(prediction[0] in answers)
  said = re.sub(' +', ' ', prediction.translate(_CHOICE_MARKS))
  for announcement in ('answer is:', 'answer:', 'answer is', 'option is'):
    _, found, rest = said.partition(announcement)
    if found:
      return float(any(rest[1:].startswith(a) for a in answers))
  for said_word in said.split():
    if said_word in 'ABCD':
      return float(said_word in answers)
  return 0.0


def letter_or_name(
  prediction: str, answers: Strings, choices: Strings
) -> float:
  """The option's letter (answers[0]) or its function's name (Code.Debug)."""
  if prediction[:2] in (f'{answers[0]}.', f'{answers[0]}:'):
    return 1.0
  said = re.sub(' +', ' ', _OPTION_MARKS.sub(' ', prediction.strip()))
  for announcement in ('answer is:', 'is:', 'answer:'):
    _, found, rest = said.partition(announcement)
    if found:
      return float(any(rest[1:].startswith(a) for a in answers))
  return 0.0


def partial_sums(prediction: str, answers: Strings, choices: Strings) -> float:
  """Share of values that are right before the first error (Math.Calc)."""
  right = 0
  for said, answer in zip(re.findall('[0-9]+', prediction), answers):
    if int(said) != int(answer):
      break
    right += 1
  return right / len(answers)


def classes(prediction: str, answers: Strings, choices: Strings) -> float:
  """1 / (classes named) if the right one is among them (LongBench: trec, lsht).

  A class whose name lies within the right one's does not count as named.
  """
  best = 0.0
  for answer in answers:
    named = [
      c for c in choices if c in prediction and (c == answer or c not in answer)
    ]
    if answer in named:
      best = max(best, 1 / len(named))
  return best


def numbers(prediction: str, answers: Strings, choices: Strings) -> float:
  """Share of the numbers said that are the answer's (LongBench: passage_*)."""
  said = re.findall(r'\d+', prediction)
  wanted = {n for answer in answers for n in re.findall(r'\d+', answer)[:1]}
  return sum(n in wanted for n in said) / len(said) if said else 0.0


def _best(rule: Callable[[str, str], float]) -> Metric:
  """A metric of the best answer, from a rule for one."""

  def metric(prediction: str, answers: Strings, choices: Strings) -> float:
    return max((rule(prediction, answer) for answer in answers), default=0.0)

  return metric


def _first_line(metric: Metric) -> Metric:
  """LongBench keeps the first line alone of few-shot tasks' predictions."""

  def first(prediction: str, answers: Strings, choices: Strings) -> float:
    line = prediction.lstrip('\n').split('\n', 1)[0]
    return metric(line, answers, choices)

  return first


METRICS: dict[str, Metric] = {
  'all_parts': all_parts,
  'any_part': any_part,
  'first_integer': first_integer,
  'first_number': first_number,
  'last_integer': last_integer,
  'word': word,
  'name': name,
  'choice': choice,
  'letter_or_name': letter_or_name,
  'partial_sums': partial_sums,
  'numbers': numbers,
  'f1': _best(text_scores.f1),
  'f1_characters': _best(text_scores.f1_characters),
  'rouge_l': _best(text_scores.rouge_l),
  'rouge_l_sum': _best(text_scores.rouge_l_sum),
  'code_line': _best(text_scores.code_line),
  'first_line_classes': _first_line(classes),
  'first_line_f1': _first_line(_best(text_scores.f1)),
  'first_line_rouge_l': _first_line(_best(text_scores.rouge_l)),
}
