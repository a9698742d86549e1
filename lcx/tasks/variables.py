"""RULER's variable tracking: which names hold a value, through assignments.

Source: RULER (arXiv:2404.06654), section 3.2; one chain of 4 hops, noise
haystack, one solved example before the task. Sentences are our own.
"""

import dataclasses
import random
import string
from typing import ClassVar

from lcx.tasks import haystacks, words
from lcx.tasks.base import Draft, Draw, Question, Task, locate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variables(Task):
  """`chains` chains of `hops` assignments; a question asks for one chain.

  Attributes:
    chains: how many values are assigned; raised to `questions`.
    hops: assignments from one name to the next; a chain has hops + 1 names.
    shots: solved examples (three-letter names) before the task.
  """

  metric: ClassVar[str] = 'all_parts'

  max_new_tokens: int = 30
  chains: int = 1
  hops: int = 4
  shots: int = 1

  def __post_init__(self):
    for field, least in (('chains', 1), ('hops', 0), ('shots', 0)):
      if getattr(self, field) < least:
        raise ValueError(
          f'{self.name}: {field}={getattr(self, field)} must be at least '
          f'{least}'
        )

  def draft(self, size: int, draw: Draw, length: int, haystack: str) -> Draft:
    """`size` sentences of noise."""
    # The benchmark's example fills 500 tokens: some 75 sentences of noise.
    example_size = min(75, length // 64)
    shots = [
      self._solved(example_size, draw(f'shot {i}')) for i in range(self.shots)
    ]
    chains = max(self.chains, self.questions)
    context, questions = self._text(size, chains, 5, draw('task'))
    told = (
      'Follow the assignments hidden in the text below. A question about '
      'them follows the text.\n\n'
    )
    # Told again after an example: else its text seems to go on.
    system = told + ''.join(shot + told for shot in shots)
    return Draft(system, context, questions[: self.questions])

  def _solved(self, size: int, rng: random.Random) -> str:
    context, (question, *_) = self._text(size, self.chains, 3, rng)
    return (
      f'{context}{question.text}\n{question.answer_prefix} '
      f'{", ".join(question.answers)}.\n\n'
    )

  def _text(
    self, size: int, chains: int, letters: int, rng: random.Random
  ) -> tuple[str, tuple[Question, ...]]:
    per_chain = self.hops + 1
    names = words.distinct(
      lambda r: words.letters(r, letters, string.ascii_uppercase),
      chains * per_chain,
      rng,
    )
    values = words.distinct(lambda r: words.number(r, 5), chains, rng)
    statements: list[list[str]] = []
    for i, value in enumerate(values):
      chain = names[i * per_chain : (i + 1) * per_chain]
      sources = [value, *chain[:-1]]
      statements.append(
        [f'Let {name} = {source}.' for name, source in zip(chain, sources)]
      )
    # Chains interleave; each keeps its own order.
    turns = [i for i in range(chains) for _ in range(per_chain)]
    rng.shuffle(turns)
    queues = [iter(chain) for chain in statements]
    merged = [next(queues[i]) for i in turns]
    lines = haystacks.insert_lines(haystacks.noise_lines(size), merged, rng)
    context = '\n'.join(lines)
    questions = tuple(
      Question(
        f'\n\nWhich variables hold the value {value}, directly or through '
        'other variables?',
        f'{per_chain} variables hold the value {value}:',
        tuple(names[i * per_chain : (i + 1) * per_chain]),
        locate(context, *statements[i]),
      )
      for i, value in enumerate(values)
    )
    return context, questions


TASKS = (Variables(name='vt'),)
