"""RULER's eight needle tasks: find what was said about a key.

Source: Hsieh et al., RULER (arXiv:2404.06654), section 3.1 and appendix B;
parameters of NVIDIA/RULER's scripts/synthetic.yaml. Sentences are our own.
"""

import dataclasses
import random
from typing import ClassVar, Literal

from lcx.tasks import haystacks, words
from lcx.tasks.base import Draft, Draw, Question, Task, locate

Kind = Literal['words', 'numbers', 'uuids']

_DRAW = {
  'words': words.word_pair,
  'numbers': words.number,
  'uuids': words.identifier,
}
_CALLED = {'words': 'pass word', 'numbers': 'pass number', 'uuids': 'pass code'}
# In an essay, needles stand at depths out of these, in percent.
_DEPTHS = tuple(round(100 * i / 39) for i in range(40))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles(Task):
  """`keys` keys with `values` values each; a question asks for `queries` keys.

  Attributes:
    haystack: 'noise' (five sentences over and over), 'essay' (a passage of the
      haystack's text) or 'needle' (lines of the needle's own form: every line
      distracts).
    key_kind: what a key is.
    value_kind: what a value is.
    keys: how many keys the needles have; raised to queries * questions.
    values: how many values a key has, each in a needle of its own.
    queries: how many keys one question asks for.
  """

  metric: ClassVar[str] = 'all_parts'

  max_new_tokens: int = 128
  haystack: Literal['noise', 'essay', 'needle'] = 'essay'
  key_kind: Kind = 'words'
  value_kind: Kind = 'numbers'
  keys: int = 1
  values: int = 1
  queries: int = 1

  def __post_init__(self):
    if self.haystack not in ('noise', 'essay', 'needle'):
      raise ValueError(
        f'{self.name}: haystack={self.haystack!r} is none of noise, essay, '
        'needle'
      )
    for field in ('key_kind', 'value_kind'):
      if getattr(self, field) not in _DRAW:
        raise ValueError(
          f'{self.name}: {field}={getattr(self, field)!r} is none of '
          f'{", ".join(_DRAW)}'
        )
    for field in ('keys', 'values', 'queries', 'questions'):
      if getattr(self, field) < 1:
        raise ValueError(
          f'{self.name}: {field}={getattr(self, field)} must be at least 1'
        )

  @property
  def called(self) -> str:
    """What a value is called in the text."""
    return _CALLED[self.value_kind]

  def draft(self, size: int, draw: Draw, length: int, haystack: str) -> Draft:
    """`size` sentences of noise, words of the essay or distractor lines."""
    count = max(self.keys, self.queries * self.questions)
    keys = words.distinct(_DRAW[self.key_kind], count, draw('keys'))
    drawn = words.distinct(
      _DRAW[self.value_kind], count * self.values, draw('values')
    )
    values = {
      key: drawn[i * self.values : (i + 1) * self.values]
      for i, key in enumerate(keys)
    }
    needles = [self._needle(key, v) for key in keys for v in values[key]]
    draw('order').shuffle(needles)
    context = self._hide(needles, keys, size, draw, haystack)
    questions = tuple(
      self._question(
        keys[i * self.queries : (i + 1) * self.queries], values, context
      )
      for i in range(self.questions)
    )
    many = len(needles) > 1 or self.haystack == 'needle'
    what = f'{self.called}s are' if many else f'{self.called} is'
    system = (
      f'{"Some" if many else "One"} {what} hidden in the text below. '
      'Remember what it says: a question about it follows the text.\n\n'
    )
    return Draft(system, context, questions)

  def _needle(self, key: str, value: str) -> str:
    # "The" four times, with four values, would contradict itself, and models
    # answer with one of them.
    one = (
      f'One of the {self.called}s' if self.values > 1 else f'The {self.called}'
    )
    return f'{one} of {key} is {value}.'

  def _hide(
    self,
    needles: list[str],
    keys: list[str],
    size: int,
    draw: Draw,
    haystack: str,
  ) -> str:
    if self.haystack == 'essay':
      text = haystacks.passage(haystack, size, draw('offset'))
      depths = _sample_depths(len(needles), draw('places'))
      return haystacks.insert_sentences(text, needles, depths)
    if self.haystack == 'noise':
      lines = haystacks.noise_lines(size)
    else:
      lines = self._distractors(size, set(keys), draw('distractors'))
    return '\n'.join(haystacks.insert_lines(lines, needles, draw('places')))

  def _distractors(
    self, size: int, taken: set[str], rng: random.Random
  ) -> list[str]:
    key, value = _DRAW[self.key_kind], _DRAW[self.value_kind]
    lines: list[str] = []
    while len(lines) < size:
      name = key(rng)
      if name not in taken:
        lines.append(self._needle(name, value(rng)))
    return lines

  def _question(
    self, asked: list[str], values: dict[str, list[str]], context: str
  ) -> Question:
    names = ', '.join(asked[:-1]) + ' and ' * (len(asked) > 1) + asked[-1]
    answers = [value for key in asked for value in values[key]]
    what = f'{self.called}s' if len(answers) > 1 else self.called
    verb = 'are' if len(answers) > 1 else 'is'
    every = 'all the' if len(answers) > 1 else 'the'
    return Question(
      f'\n\nWhat {verb} {every} {what} of {names}, as stated in the text?',
      f'The {what} of {names} {verb}',
      tuple(answers),
      locate(
        context, *(self._needle(key, v) for key in asked for v in values[key])
      ),
    )


def _sample_depths(count: int, rng: random.Random) -> list[float]:
  depths: list[float] = []
  while len(depths) < count:
    depths += rng.sample(_DEPTHS, min(count - len(depths), len(_DEPTHS)))
  return [depth / 100 for depth in depths]


TASKS = (
  Needles(name='niah_single_1', haystack='noise'),
  Needles(name='niah_single_2'),
  Needles(name='niah_single_3', value_kind='uuids'),
  Needles(name='niah_multikey_1', keys=4),
  Needles(name='niah_multikey_2', haystack='needle'),
  Needles(
    name='niah_multikey_3',
    haystack='needle',
    key_kind='uuids',
    value_kind='uuids',
  ),
  Needles(name='niah_multivalue', values=4),
  Needles(name='niah_multiquery', queries=4),
)
