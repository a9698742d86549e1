"""InfiniteBench's Code.Run: the value of a call in a file of small functions.

Source: Zhang et al., InfiniteBench (arXiv:2402.13718), section 3: one-line
functions that add a constant and call one another through 2 to 10 levels.
Sentences are our own.
"""

import dataclasses
import random
from typing import ClassVar

from lcx.tasks.base import Draft, Draw, Question, Task, locate


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeRun(Task):
  """Functions in random order; a question asks for the value of one call.

  Attributes:
    levels: how many functions a call passes through; they take turns with the
      index. Distractors form chains of the same kind.
    addends: smallest and largest constant that a function adds.
    arguments: smallest and largest argument of the asked call.
  """

  metric: ClassVar[str] = 'last_integer'

  max_new_tokens: int = 5
  levels: tuple[int, ...] = (2, 4, 6, 8, 10)
  addends: tuple[int, int] = (-12, 17)
  arguments: tuple[int, int] = (-10, 10)

  def __post_init__(self):
    if not self.levels or min(self.levels) < 1:
      raise ValueError(
        f'{self.name}: levels={self.levels} must be numbers of at least 1'
      )

  @property
  def smallest(self) -> int:
    """The asked chains alone."""
    return max(self.levels) * self.questions

  def draft(self, size: int, draw: Draw, length: int, haystack: str) -> Draft:
    """`size` functions."""
    rng = draw('chains')
    depths = [
      self.levels[(draw.index + i) % len(self.levels)]
      for i in range(self.questions)
    ]
    # Distractor chains, cut at the size. Numbers do not tell their order.
    while sum(depths) < size:
      depths.append(min(rng.choice(self.levels), size - sum(depths)))
    numbers = list(range(size))
    draw('numbers').shuffle(numbers)
    code, questions, start = [], [], 0
    for i, depth in enumerate(depths):
      names = [f'func_{n}' for n in numbers[start : start + depth]]
      start += depth
      lines, total = self._chain(names, rng)
      code += lines
      if i < self.questions:
        questions.append(self._ask(names[0], lines, total, rng))
    draw('order').shuffle(code)
    context = '\n\n'.join(code)
    system = 'These are Python functions that call one another.\n\n'
    return Draft(
      system,
      context,
      tuple(
        dataclasses.replace(q, depths=locate(context, *q.choices), choices=())
        for q in questions
      ),
    )

  def _chain(
    self, names: list[str], rng: random.Random
  ) -> tuple[list[str], int]:
    """The code of functions that call one another, and the sum they add."""
    lines, total = [], 0
    for i, name in enumerate(names):
      addend = rng.randint(*self.addends)
      total += addend
      inner = f'{names[i + 1]}(x)' if i + 1 < len(names) else 'x'
      sign = '-' if addend < 0 else '+'
      lines.append(f'def {name}(x):\n  return {inner} {sign} {abs(addend)}')
    return lines, total

  def _ask(
    self, name: str, lines: list[str], total: int, rng: random.Random
  ) -> Question:
    argument = rng.randint(*self.arguments)
    call = f'{name}({argument})'
    return Question(
      f'\n\nWhat does {call} return? End with the number.',
      f'{call} returns',
      (str(argument + total),),
      choices=tuple(lines),
    )


TASKS = (CodeRun(name='code_run'),)
