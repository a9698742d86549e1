"""InfiniteBench's synthetic retrieval and arithmetic tasks.

Source: Zhang et al., InfiniteBench (arXiv:2402.13718), section 3 and the
repository's data/construct_synthetic_dataset.py for structure and numbers.
Sentences are our own. The fifth synthetic kind is in `functions.py`.
"""

import dataclasses
import json
import statistics
from typing import ClassVar

from lcx.tasks import haystacks, words
from lcx.tasks.base import Draft, Draw, Question, Task, locate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(Task):
  """One string of digits, said twice in a line of its own among noise lines.

  Attributes:
    called: what the text calls the string.
    digits: random digits.
    copies: how often each digit stands in a row (number_string: twice).
  """

  metric: ClassVar[str] = 'first_integer'

  called: str = 'pass key'
  digits: int = 5
  copies: int = 1

  def __post_init__(self):
    if self.questions != 1:
      raise ValueError(f'{self.name} has one question per context')
    if self.digits < 1 or self.copies < 1:
      raise ValueError(
        f'{self.name}: digits={self.digits} and copies={self.copies} must be '
        'at least 1'
      )

  def draft(self, size: int, draw: Draw, length: int, haystack: str) -> Draft:
    """`size` sentences of noise."""
    drawn = draw('digits').choices('0123456789', k=self.digits)
    secret = ''.join(digit * self.copies for digit in drawn)
    line = (
      f'Here is the {self.called}: {secret}. Keep {secret} in mind, it is '
      f'the {self.called}.'
    )
    lines = haystacks.noise_lines(size)
    lines.insert(round(draw.depth * len(lines)), line)
    context = '\n'.join(lines)
    system = (
      f'A {self.called} is hidden in the text below, among much that does not '
      'matter. Find it and remember it.\n\n'
    )
    question = Question(
      f'\n\nWhat is the {self.called}?',
      f'The {self.called} is',
      (secret,),
      locate(context, line),
    )
    return Draft(system, context, (question,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValue(Task):
  """A JSON object of UUID keys and values; a question asks for one value."""

  metric: ClassVar[str] = 'word'

  max_new_tokens: int = 50

  @property
  def smallest(self) -> int:
    """One pair a question."""
    return self.questions

  def draft(self, size: int, draw: Draw, length: int, haystack: str) -> Draft:
    """`size` pairs; the asked ones sweep the depths as the index counts."""
    rng = draw('asked')
    asked = [
      (words.identifier(rng), words.identifier(rng))
      for _ in range(self.questions)
    ]
    rng = draw('pairs')
    pairs = [
      (words.identifier(rng), words.identifier(rng))
      for _ in range(size - self.questions)
    ]
    # The first sweeps; further questions are spread evenly behind it.
    for i, pair in enumerate(asked):
      depth = (draw.depth + i / self.questions) % 1.0
      pairs.insert(int(depth * (len(pairs) + 1)), pair)
    context = json.dumps(dict(pairs))
    questions = tuple(
      Question(
        f'\n\nWhich value belongs to the key "{key}"?',
        f'The value of "{key}" is',
        (value,),
        locate(context, key),
      )
      for key, value in asked
    )
    system = 'Look up values in this JSON object.\n\n'
    return Draft(system, context, questions)


STATISTICS = (
  'largest number',
  'second largest number',
  'third largest number',
  'smallest number',
  'second smallest number',
  'third smallest number',
  'median',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MathFind(Task):
  """A list of integers from 0 to 99; a question asks for one statistic.

  The statistics take turns with the index. Ranks count distinct numbers. Each
  sample has its own range within 0 to 99, so that the answer is no constant.
  """

  metric: ClassVar[str] = 'first_number'

  max_new_tokens: int = 3

  def __post_init__(self):
    if not 1 <= self.questions <= len(STATISTICS):
      raise ValueError(
        f'{self.name}: questions={self.questions} must be 1 to '
        f'{len(STATISTICS)}, one a statistic'
      )

  @property
  def smallest(self) -> int:
    """Seven numbers: all ranks exist."""
    return 3

  def draft(self, size: int, draw: Draw, length: int, haystack: str) -> Draft:
    """2 * size + 1 numbers: their median is one of them."""
    rng = draw('numbers')
    low, high = rng.randrange(0, 30), rng.randrange(70, 100)
    # The three extremes on each side always occur.
    numbers = [low, low + 1, low + 2, high - 2, high - 1, high]
    numbers += [
      rng.randint(low, high) for _ in range(2 * size + 1 - len(numbers))
    ]
    draw('order').shuffle(numbers)
    ranked = sorted(set(numbers))
    found = (*ranked[:-4:-1], *ranked[:3], statistics.median(numbers))
    context = json.dumps(numbers)
    asked = [(draw.index + i) % len(STATISTICS) for i in range(self.questions)]
    questions = tuple(
      Question(
        f'\n\nWhat is the {STATISTICS[i]} of the list?'
        + (' Numbers that come up again count once.' if i < 6 else ''),
        f'The {STATISTICS[i]} of the list is',
        (str(found[i]),),
      )
      for i in asked
    )
    system = 'Below is a list of numbers. Answer with one number only.\n\n'
    return Draft(system, context, questions)


TASKS = (
  Digits(name='passkey', max_new_tokens=6),
  Digits(
    name='number_string',
    max_new_tokens=12,
    called='string of digits',
    copies=2,
  ),
  KeyValue(name='kv_retrieval'),
  MathFind(name='math_find'),
)
