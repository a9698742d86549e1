"""What every method scores with the bundled model, and how far from dense.

The tests and `python -m tests.quality.record` run this same code, on fixed
seeds. Answers are teacher-forced token by token through the method's decode: if
every token of an answer is the most likely one, greedy decoding writes exactly
that answer. Two groups: methods that read the prompt densely answer four
questions of a context that was read before them (one dense prefill serves all
of them); the others read context and question together.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from experiments.prompts import Template
from lcx import methods
from lcx.engine import Engine
from lcx.engine.readings import Readings
from lcx.methods.base import Prompt
from lcx.methods.dense import DensePrefill
from lcx.models import needle
from lcx.tasks import get_task

SEED = 20
BATCH = 4
_ROOM = 128  # tokens of a question and its answer, at most


@dataclasses.dataclass(frozen=True)
class Cell:
  """A task at a length.

  Attributes:
    task: of `lcx.tasks`.
    length: tokens of a sample.
    questions: asked of one context.
    contexts: how many.
  """

  task: str
  length: int
  questions: int
  contexts: int

  @property
  def name(self) -> str:
    return f'{self.task} {self.length}'


# Four keys, single needles, and needles in noise, which is what a passkey is.
AFTER = (Cell('niah_multikey_1', 4096, 4, 4),)
WITH = (
  Cell('niah_multikey_1', 1024, 1, 8),
  Cell('niah_single_2', 1024, 1, 4),
  Cell('niah_single_1', 1024, 1, 4),
)
LONG_AFTER = (
  Cell('niah_multikey_1', 16384, 4, 4),
  Cell('niah_single_2', 16384, 1, 8),
)
LONG_WITH = (
  Cell('niah_multikey_1', 4096, 1, 16),
  Cell('niah_single_2', 4096, 1, 8),
)


@dataclasses.dataclass(frozen=True)
class Score:
  """A method on a cell, answer by answer.

  Attributes:
    hits: '1' for an answer that greedy decoding writes exactly, else '0'.
    dense: the same of dense attention.
    kl: mean over answer tokens of KL(dense || method), nats.
    top1: share of answer tokens whose most likely token is dense's.
    nll: mean over answer tokens of their negative log likelihood, nats.
  """

  hits: str
  dense: str
  kl: float
  top1: float
  nll: float

  @property
  def mean(self) -> float:
    return self.hits.count('1') / len(self.hits)


def lost_and_won(old: str, new: str) -> tuple[int, int]:
  """Answers that only `old` has, and that only `new` has."""
  pairs = list(zip(old, new, strict=True))
  return pairs.count(('1', '0')), pairs.count(('0', '1'))


def falls(lost: int, won: int) -> float:
  """One-sided sign test: chance of so many losses if both are as good."""
  n = lost + won
  return sum(math.comb(n, k) for k in range(lost, n + 1)) / 2**n


def names(after: bool) -> tuple[str, ...]:
  """Methods of a group: those that read densely, or the others; dense first."""
  found = [
    name
    for name in methods.names()
    if name == 'dense'
    or (type(methods.get_method(name).prefill) is DensePrefill) == after
  ]
  return tuple(sorted(found, key=lambda name: (name != 'dense', name)))


def is_exact(name: str) -> bool:
  """Whether a method other than dense sees all, as conformance shows."""
  method = methods.get_method(name)
  return name != 'dense' and method.at_full_budget(4096) == method


# Where a method's own tight budget is not what should be watched.
BUDGETS: dict[str, dict[str, Any]] = {
  # An index of as many sampled queries as the prompt has tokens takes long.
  'retrieval': {
    'decode.top': 64,
    'decode.sink': 4,
    'decode.recent': 32,
    'decode.mass': 0.0,
    'decode.queries': 512,
  },
  # Its segments would be of a page, and each query reads what it probes.
  'retrieval_cluster': {
    'top': 64,
    'probe': 512,
    'sink': 64,
    'recent': 128,
    'segment': 512,
  },
}


def method(name: str, length: int) -> Any:
  """The method with budgets that bite: by default its own tight budget."""
  found = methods.get_method(name, **BUDGETS.get(name, {}))
  if name == 'dense' or name in BUDGETS:
    return found
  return found.at_tight_budget(length)


@functools.cache
def bundled() -> Any:
  return needle.load('float32')


@functools.cache
def drawn(cell: Cell) -> tuple[tuple[Prompt, tuple[np.ndarray, ...]], ...]:
  """Prompts of a cell, and the tokens of each question's answer."""
  tokenizer = bundled().tokenizer
  template = Template(tokenizer)
  task = get_task(cell.task, questions=cell.questions, max_new_tokens=12)
  found = []
  for index in range(cell.contexts):
    sample = task.sample(
      lambda text: len(tokenizer.encode(text)),
      cell.length,
      SEED,
      index,
      overhead=template.overhead,
    )
    answers = tuple(
      np.asarray(tokenizer.encode(' ' + question.answers[0]), np.int32)
      for question in sample.questions
    )
    found.append((template.prompt(sample), answers))
  return tuple(found)


@dataclasses.dataclass(frozen=True)
class Said:
  """What a method says before each token of one answer."""

  logits: np.ndarray  # [n V]
  answer: np.ndarray  # [n]

  @property
  def log_p(self) -> np.ndarray:
    x = self.logits.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

  @property
  def hit(self) -> bool:
    return bool((self.logits.argmax(axis=1) == self.answer).all())


@contextlib.contextmanager
def compiled_hastily() -> Iterator[None]:
  """Compiles without most optimizations.

  For what is called some dozens of times on few tokens: compiling takes longer
  than the calls. A prefill of thousands of tokens is compiled as it should be.
  """
  before = jax.config.values['jax_disable_most_optimizations']
  jax.config.update('jax_disable_most_optimizations', True)
  try:
    yield
  finally:
    jax.config.update('jax_disable_most_optimizations', before)


class Group:
  """Measures methods on cells, dense beside them.

  Args:
    cells: of one length, so that programs are compiled once.
    after: whether questions come after the context is read.
  """

  def __init__(self, cells: Sequence[Cell], after: bool):
    self.cells, self.after = cells, after
    self.length = max(cell.length for cell in cells)
    self._readings = Readings(2e9)
    self._scorers: dict[Any, Engine] = {}
    self._dense: dict[Cell, list[Said]] = {}

  def engine(self, name: str) -> Engine:
    model = bundled()
    return Engine(
      model.config,
      model.weights,
      method(name, self.length),
      capacity=self.length + _ROOM,
      batch=BATCH,
      readings=self._readings,
      trace=False,
    )

  def said(self, name: str) -> dict[Cell, list[Said]]:
    """All answers of a method."""
    engine = self.engine(name)
    # Methods with the same decode share its program.
    parts = engine.method.cache, engine.method.decode
    scorer = self._scorers.setdefault(parts, engine)
    return {
      cell: list(self._answers(engine, scorer, cell)) for cell in self.cells
    }

  def _answers(
    self, engine: Engine, scorer: Engine, cell: Cell
  ) -> Iterable[Said]:
    samples = drawn(cell)
    for first in range(0, len(samples), BATCH):
      prompts, answers = zip(*samples[first : first + BATCH])
      session = mark = None
      for i in range(cell.questions):
        if not self.after:
          session = engine.prefill(list(prompts), i)
        elif session is None or mark is None:
          session = engine.prefill(list(prompts))
          mark = engine.mark(session)
        else:
          scorer.rewind(session, mark)
        with compiled_hastily():
          if self.after:
            scorer.score(session, [p.question(i) for p in prompts])
          said = scorer.score(session, [a[i] for a in answers], piece=1)
        for row, answer in enumerate(answers):
          yield Said(said[row], answer[i])

  def measure(self, name: str) -> dict[str, Score]:
    """Scores of a method, by the cell's name."""
    if not self._dense:
      self._dense = self.said('dense')
    found = self._dense if name == 'dense' else self.said(name)
    return {
      cell.name: score(found[cell], self._dense[cell]) for cell in self.cells
    }


def score(method: Sequence[Said], dense: Sequence[Said]) -> Score:
  """Compares answers in pairs."""
  kl, same, nll = [], [], []
  for mine, other in zip(method, dense, strict=True):
    p, q = other.log_p, mine.log_p
    kl.append((np.exp(p) * (p - q)).sum(axis=1))
    same.append(p.argmax(axis=1) == q.argmax(axis=1))
    nll.append(-np.take_along_axis(q, mine.answer[:, None], axis=1)[:, 0])
  return Score(
    ''.join('01'[m.hit] for m in method),
    ''.join('01'[d.hit] for d in dense),
    float(np.mean(np.concatenate(kl))),
    float(np.mean(np.concatenate(same))),
    float(np.mean(np.concatenate(nll))),
  )


GROUPS = {
  'with': (WITH, False, False),
  'after': (AFTER, True, False),
  'long_after': (LONG_AFTER, True, True),
  'long_with': (LONG_WITH, False, True),
}


@functools.cache
def group(name: str) -> Group:
  """A group of `GROUPS`: its cells, whether questions come after, long."""
  cells, after, _ = GROUPS[name]
  return Group(cells, after)
