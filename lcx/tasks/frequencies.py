"""RULER's two aggregation tasks: which words stand most often in a list.

Source: RULER (arXiv:2404.06654), section 3.3. The evidence is spread over the
whole context, so attention to a few keys must miss some of it. Sentences and
words are our own.
"""

import dataclasses
import random
from typing import ClassVar

from lcx.tasks import words
from lcx.tasks.base import Draft, Draw, Question, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonWords(Task):
  """A numbered list in which a few words stand often, all others seldom.

  Attributes:
    common: how many words are asked for.
    often: how often each of them stands in the list.
    seldom: how often each other word does.
    shots: solved examples before the task.

  Below 4096 tokens, often and seldom are at most 6 and 1, as in the benchmark.
  """

  metric: ClassVar[str] = 'all_parts'

  max_new_tokens: int = 120
  common: int = 10
  often: int = 30
  seldom: int = 3
  shots: int = 1

  def __post_init__(self):
    if not 1 <= self.common <= 100:
      raise ValueError(f'{self.name}: common={self.common} must be 1 to 100')
    if self.questions != 1:
      raise ValueError(f'{self.name} has one question per context')
    if not self.often > self.seldom > 0:
      raise ValueError(
        f'{self.name}: often={self.often} must be more than '
        f'seldom={self.seldom}, which must be at least 1'
      )

  @property
  def smallest(self) -> int:
    """One word that is not asked for."""
    return 1

  def draft(self, size: int, draw: Draw, length: int, haystack: str) -> Draft:
    """`size` distinct words that are not asked for."""
    short = length < 4096
    # The benchmark's example: 40 words, 10 and 3 times; 20 words, 3 and 1.
    others, many, few = (10, 3, 1) if short else (30, 10, 3)
    told = 'Below is a numbered list of words. Some of them come up often.\n\n'
    system = told
    for i in range(self.shots):
      text, question = self._list(others, many, few, draw(f'shot {i}'))
      # Told again: else the example's list seems to go on.
      system += (
        f'{text}{question.text}\n{question.answer_prefix} '
        f'{", ".join(question.answers)}.\n\n{told}'
      )
    often = min(self.often, 6) if short else self.often
    seldom = min(self.seldom, 1) if short else self.seldom
    context, question = self._list(size, often, seldom, draw('task'))
    return Draft(system, context, (question,))

  def _list(
    self, others: int, often: int, seldom: int, rng: random.Random
  ) -> tuple[str, Question]:
    answers = rng.sample(words.vocabulary()[0], self.common)
    taken = set(answers)
    rest = words.word_list(others + self.common, rng)
    rest = [word for word in rest if not taken & set(word.split('-'))][:others]
    items = answers * often + rest * seldom
    rng.shuffle(items)
    text = ' '.join(f'{i}. {word}' for i, word in enumerate(items, 1))
    most = f'{self.common} most frequent words'
    return text, Question(
      f'\n\nWhich are the {most} of the list?',
      f'The {most} of the list are:',
      tuple(answers),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodedWords(Task):
  """Random strings whose counts follow Zipf's law: n * rank^-alpha / zeta.

  The first rank is written as dots; the next `top` are asked for. The number
  of different strings grows with the length, (length - 50) / 50.

  Attributes:
    alpha: the law's exponent, above 1.
    top: how many strings are asked for.
    letters: letters of a string.
  """

  metric: ClassVar[str] = 'all_parts'

  max_new_tokens: int = 50
  alpha: float = 2.0
  top: int = 3
  letters: int = 6

  def __post_init__(self):
    if self.alpha <= 1:
      raise ValueError(f'{self.name}: alpha={self.alpha} must be above 1')
    if self.questions != 1:
      raise ValueError(f'{self.name} has one question per context')
    if self.top < 1:
      raise ValueError(f'{self.name}: top={self.top} must be at least 1')

  @property
  def smallest(self) -> int:
    """Enough words that the last rank asked for comes up three times."""
    return int(3 * zeta(self.alpha) * (self.top + 1) ** self.alpha) + 1

  def draft(self, size: int, draw: Draw, length: int, haystack: str) -> Draft:
    """About `size` words in all (counts are rounded down)."""
    ranks = max((length - 50) // 50, self.top + 2)
    coded = words.distinct(
      lambda rng: words.letters(rng, self.letters), ranks, draw('words')
    )
    share = size / zeta(self.alpha)
    counts = [int(share * (k + 1) ** -self.alpha) for k in range(ranks)]
    items = ['...'] * counts[0]
    for word, count in zip(coded[1:], counts[1:]):
      items += [word] * count
    draw('order').shuffle(items)
    system = (
      'Below is a text of coded words. Some of them come up often; '
      'the dots mean nothing.\n\n'
    )
    most = f'{self.top} most frequent coded words'
    question = Question(
      f'\n\nWhich are the {most} of the text, dots not counted? '
      'Name them without an explanation.',
      f'The {most} of the text are:',
      tuple(coded[1 : self.top + 1]),
    )
    return Draft(system, ' '.join(items), (question,))


def zeta(s: float) -> float:
  """Riemann's zeta function for s > 1 (Euler-Maclaurin after 50 terms)."""
  n = 50
  head = sum(k**-s for k in range(1, n))
  return head + n ** (1 - s) / (s - 1) + n**-s / 2 + s * n ** (-s - 1) / 12


TASKS = (CommonWords(name='cwe'), CodedWords(name='fwe'))
