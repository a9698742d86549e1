"""The mixture of documents and the curriculum over lengths.

Everything about batch number i follows from (seed, i): a training run that
continues after a kill sees what it would have seen.
"""

import dataclasses
import itertools
import random
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from lcx.train import layout, samples
from lcx.train.corpus import Corpus

KINDS = (
  'records',
  'repeated',
  'copying',
  'key_value',
  'lines',
  'variables',
  'passkey',
  'common_words',
  'frequent_words',
  'text',
)
_SHORTEST = 224  # tokens of a document that shares its row with others


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stretch of the curriculum with one length.

  Attributes:
    length: tokens of a row.
    batch: rows of a step.
    steps: how many.
    targets: predicted positions of a row that the loss sees: this many of
      answers and this many of everything.
    mix: weights of `KINDS`.
    packed: share of rows that hold several shorter documents.
    backward: share of key-value documents that ask for keys by their values.
  """

  length: int
  batch: int
  steps: int
  targets: int
  mix: tuple[float, ...]
  packed: float = 0.3
  backward: float = 0.2

  def __post_init__(self):
    if min(self.length, self.batch, self.steps, self.targets) < 1:
      raise ValueError(
        f'a stage needs positive numbers, got length={self.length}, '
        f'batch={self.batch}, steps={self.steps}, targets={self.targets}'
      )
    if len(self.mix) != len(KINDS):
      raise ValueError(
        f'a stage needs {len(KINDS)} weights of its mix ({", ".join(KINDS)}), '
        f'got {len(self.mix)}'
      )


@dataclasses.dataclass
class Batch:
  """One step's tokens and what is predicted of them.

  Attributes:
    tokens: int32 [B T].
    index: int32 [B M] positions; the target is the token that follows.
    weight: float32 [2 B M] weights of the two means: answers, everything.
    kind: int32 [B M] one more than the answer's index in `KINDS`; 0: none.
  """

  tokens: np.ndarray
  index: np.ndarray
  weight: np.ndarray
  kind: np.ndarray


class Mixture:
  """Makes batches.

  Args:
    corpus: background text.
    tokenizer: the model's.
    words: words of keys and lists.
    stages: the curriculum.
    seed: of everything.

  Raises:
    ValueError: the corpus is shorter than the longest stage.
  """

  def __init__(
    self,
    corpus: Corpus,
    tokenizer: Tokenizer,
    words: Sequence[str],
    stages: Sequence[Stage],
    seed: int = 0,
  ):
    self.stages = tuple(stages)
    self.seed = seed
    self.writer = layout.Writer(corpus, tokenizer)
    self.source = samples.Source(tuple(words))
    self.size = tokenizer.get_vocab_size()
    corpus.check(max(stage.length for stage in self.stages))

  @property
  def steps(self) -> int:
    return sum(stage.steps for stage in self.stages)

  def stage(self, step: int) -> Stage:
    """The stage of a step; the last one beyond the end."""
    for stage in self.stages:
      if step < stage.steps:
        return stage
      step -= stage.steps
    return self.stages[-1]

  def batch(self, step: int) -> Batch:
    """The step's batch."""
    stage = self.stage(step)
    rng = random.Random(f'{self.seed}/{step}')
    rows = [self._row(rng, stage) for _ in range(stage.batch)]
    tokens = np.stack([row for row, _ in rows]).astype(np.int32)
    marks = np.stack([mark for _, mark in rows])
    picks = np.random.default_rng([self.seed, step])
    return pick_targets(tokens, marks, stage.targets, picks)

  def _row(self, rng, stage):
    lengths = [stage.length]
    if rng.random() < stage.packed:
      lengths = _cut(rng, stage.length)
    rows = [self._document(rng, stage, length) for length in lengths]
    if len(rows) == 1:
      return rows[0]
    return tuple(np.concatenate(parts) for parts in zip(*rows))

  def _document(self, rng, stage, room):
    kind = rng.choices(KINDS, stage.mix)[0]
    row, mark = self._of_kind(rng, stage, kind, room)
    return row, mark * np.uint8(KINDS.index(kind) + 1)

  def _of_kind(self, rng, stage, kind, room):
    if kind == 'text':
      return self.writer.text(rng, room)
    if kind == 'copying':
      return self.writer.copying(rng, room)
    if kind in ('records', 'repeated'):
      make = getattr(layout, kind)
      numbers = np.random.default_rng(rng.getrandbits(64))
      return make(numbers, room, self.size)
    make = getattr(samples, kind)
    if kind in ('lines', 'common_words', 'frequent_words'):
      document = make(rng, self.source, room=int(room * 0.8) - 100)
    elif kind == 'key_value':
      document = make(rng, self.source, room=room, backward=stage.backward)
    elif kind == 'variables':
      document = make(rng, self.source, room=room)
    else:
      document = make(rng, self.source)
    return self.writer.write(rng, document, room)


def _cut(rng: random.Random, length: int) -> list[int]:
  """Two to six lengths that add up to `length`."""
  most = max(1, min(6, length // _SHORTEST))
  count = rng.randint(min(2, most), most)
  spare = length - count * _SHORTEST
  cuts = sorted(rng.randint(0, spare) for _ in range(count - 1))
  edges = [0, *cuts, spare]
  return [b - a + _SHORTEST for a, b in itertools.pairwise(edges)]


def pick_targets(
  tokens: np.ndarray,
  marks: np.ndarray,
  targets: int,
  rng: np.random.Generator,
) -> Batch:
  """Chooses the positions whose next tokens are predicted.

  Args:
    tokens: int32 [B T].
    marks: uint8 [B T] the kind of the tokens of answers, 0 elsewhere.
    targets: answer positions a row, and as many of everything.
    rng: random numbers.

  Returns:
    The batch; index is [B 2 * targets], answers first.
  """
  batch, length = tokens.shape
  order = rng.random((batch, length - 1), np.float32)
  kinds = marks[:, 1:].astype(np.int32)
  answers = kinds > 0
  take = min(targets, length - 1)
  # Marked positions first, in random order; then any, in random order.
  first = np.argpartition(order - answers, take - 1, axis=1)[:, :take]
  again = rng.integers(0, length - 1, (batch, take))
  index = np.concatenate([first, again], axis=1).astype(np.int32)
  weight = np.zeros((2, *index.shape), np.float32)
  weight[0, :, :take] = np.take_along_axis(answers, first, axis=1)
  weight[1, :, take:] = 1.0
  kind = np.zeros(index.shape, np.int32)
  kind[:, :take] = np.take_along_axis(kinds, first, axis=1)
  return Batch(tokens, index, weight, kind)
