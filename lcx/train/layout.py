"""Documents as rows of tokens: exactly as long as asked, answers marked."""

import random

import numpy as np
from tokenizers import Tokenizer

from lcx.train import phrases
from lcx.train.corpus import Corpus
from lcx.train.samples import Document
from lcx.train.vocabulary import BOS, EOS

Row = tuple[np.ndarray, np.ndarray]  # tokens [n] uint16, answer [n] bool


class Writer:
  """Lays documents out.

  Args:
    corpus: the background.
    tokenizer: the model's.
  """

  def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
    self.corpus = corpus
    self.tokenizer = tokenizer

  def encode(self, texts: list[str]) -> list[list[int]]:
    return [
      e.ids
      for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]

  def text(self, rng: random.Random, room: int) -> Row:
    """A passage; nothing is asked."""
    taken, _ = self.corpus.passage(rng, room)
    return taken, np.zeros(room, bool)

  def write(self, rng: random.Random, document: Document, room: int) -> Row:
    """A document of exactly `room` tokens.

    Questions that do not fit are left out, the last first; a document whose
    items alone do not fit becomes a plain passage.
    """
    count = len(document.items)
    lead = rng.choice(('\n', '\n\n', '\n', ' '))
    texts = [document.opening]
    texts += [document.join + item for item in document.items]
    for question, answer in document.asks:
      if rng.random() < 0.5:
        question = question.replace('? ', '?\n', 1)
      texts += [lead + question, ' ' + answer]
    ids = self.encode(texts)
    opening, items, asks = ids[0], ids[1 : 1 + count], ids[1 + count :]
    if rng.random() < 0.75:
      opening = [BOS, *opening]
    used = len(opening) + sum(map(len, items))
    tail: list[int] = []
    answers: list[tuple[int, int]] = []
    for i in range(0, len(asks), 2):
      question, answer = asks[i], asks[i + 1]
      if used + len(tail) + len(question) + len(answer) + 1 > room:
        break
      begin = len(tail) + len(question)
      tail += [*question, *answer, EOS]
      answers.append((begin, len(tail)))
    if not answers:
      return self.text(rng, room)
    body = self._body(rng, document, items, room - len(opening) - len(tail))
    row = np.concatenate([
      np.asarray(opening, np.uint16), body, np.asarray(tail, np.uint16)
    ])  # fmt: skip
    mark = np.zeros(room, bool)
    for begin, end in answers:
      mark[room - len(tail) + begin : room - len(tail) + end] = True
    return row, mark

  def _body(self, rng, document, items, room):
    filling = room - sum(map(len, items))
    arrays = [np.asarray(i, np.uint16) for i in items]
    if document.background == 'items':
      before, _ = self.corpus.passage(rng, filling)
      return np.concatenate([before, *arrays])
    if document.background == 'noise':
      taken, starts = self._noise(rng, filling)
    else:
      taken, starts = self.corpus.passage(rng, filling)
    if not len(starts):
      starts = np.zeros(1, np.int64)
    places = sorted(rng.randrange(len(starts)) for _ in arrays)
    pieces, last = [], 0
    for place, item in zip(places, arrays):
      at = int(starts[place])
      pieces += [taken[last:at], item]
      last = at
    return np.concatenate([*pieces, taken[last:]])

  def _noise(self, rng, size):
    count = rng.randint(1, 5)
    chosen = rng.choices(self.corpus.sentences, k=count)
    lines = [' ' + s for s in chosen]
    if rng.random() < 0.7:
      lines[0] = '\n' + chosen[0]
    ids = self.encode(lines)
    lengths = [len(i) for i in ids]
    period = sum(lengths)
    repeats = size // period + 1
    taken = np.tile(np.concatenate(ids).astype(np.uint16), repeats)[:size]
    starts = np.cumsum([0, *lengths[:-1]])
    starts = (np.arange(repeats)[:, None] * period + starts).reshape(-1)
    return taken, starts[starts < size]

  def copying(self, rng: random.Random, room: int) -> Row:
    """A passage of which a few sentences are asked to be repeated."""
    size = max(32, room - rng.randint(100, 300))
    size = min(size, room - 32)
    taken, starts = self.corpus.passage(rng, size)
    pieces, marks = [taken], [np.zeros(size, bool)]
    left, question = room - size, phrases.COPY
    while left > 0:
      lead = self.encode(['\n' + rng.choice(question).replace('{k}', '')])[0]
      at = int(rng.choice(starts)) if len(starts) else 0
      known = rng.randint(5, 9)
      said = taken[at : at + known + rng.randint(12, 48)]
      piece = np.concatenate([np.asarray(lead, np.uint16), said,
                              np.asarray([EOS], np.uint16)])  # fmt: skip
      mark = np.zeros(len(piece), bool)
      mark[len(lead) + known : -1] = True
      pieces.append(piece[:left])
      marks.append(mark[:left])
      left -= len(piece)
    return np.concatenate(pieces), np.concatenate(marks)


def records(rng: np.random.Generator, room: int, size: int) -> Row:
  """Random tokens: records of a key and a value, then the same keys again.

  The plainest form of retrieval, and the quickest to learn; sometimes keys are
  asked for by their values.

  Args:
    rng: random numbers.
    room: tokens of the row.
    size: of the vocabulary.
  """
  key, value = int(rng.integers(1, 4)), int(rng.integers(1, 4))
  width = key + value + 2
  share = float(rng.uniform(0.3, 0.7))
  kinds = max(2, int(room // width * share))
  table = rng.integers(3, size, (kinds, width), dtype=np.uint16)
  table[:, key] = table[0, key]  # between key and value
  table[:, -1] = table[0, -1]  # after the value
  asked = table[rng.integers(0, kinds, room // width + 1 - kinds)]
  if rng.random() < 0.35:  # the other way round: values are given
    between = np.full((len(asked), 1), rng.integers(3, size), np.uint16)
    asked = np.concatenate(
      [asked[:, key + 1 : -1], between, asked[:, :key], asked[:, -1:]], axis=1
    )
    key = value
  row = np.concatenate([table, asked]).reshape(-1)[:room]
  mark = np.zeros((kinds + len(asked), width), bool)
  mark[kinds:, key + 1 : -1] = True
  mark = mark.reshape(-1)[:room]
  if len(row) < room:
    row = np.concatenate([row, np.full(room - len(row), EOS, np.uint16)])
    mark = np.concatenate([mark, np.zeros(room - len(mark), bool)])
  return row, mark


def repeated(rng: np.random.Generator, room: int, size: int) -> Row:
  """A random segment, something else, and the segment again."""
  length = int(rng.integers(8, max(9, room // 2)))
  segment = rng.integers(3, size, length, dtype=np.uint16)
  row = rng.integers(3, size, room, dtype=np.uint16)
  mark = np.zeros(room, bool)
  at = 0
  while at + length <= room:
    row[at : at + length] = segment
    if at:
      mark[at + 1 : at + length] = True
    at += length + int(rng.integers(0, 8))
  return row, mark
