"""Natural text as tokens, with the places where something may be inserted."""

import dataclasses
import hashlib
import random

import numpy as np
from tokenizers import Tokenizer

from lcx.train import vocabulary


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Paragraphs joined by newlines, and what a background needs of them.

  Attributes:
    tokens: uint16 [n].
    starts: int64 indices of the first tokens of sentences, ascending.
    sentences: some sentences as text, for lines of noise.
    sha256: of the tokens.
  """

  tokens: np.ndarray
  starts: np.ndarray
  sentences: tuple[str, ...]

  @property
  def sha256(self) -> str:
    return hashlib.sha256(self.tokens.tobytes()).hexdigest()

  def check(self, length: int) -> None:
    """Refuses a corpus shorter than the contexts it must fill.

    Raises:
      ValueError: it has fewer than `length` tokens.
    """
    if len(self.tokens) < length:
      raise ValueError(
        f'the text has {len(self.tokens)} tokens; contexts of {length} need '
        'at least as many: give more or longer text files'
      )

  def passage(
    self, rng: random.Random, size: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """`size` tokens from a random sentence on, and their sentence starts.

    Text continues from its beginning where it ends.
    """
    first = rng.randrange(len(self.starts))
    begin = int(self.starts[first])
    taken = self.tokens[begin : begin + size]
    last = int(np.searchsorted(self.starts, begin + size))
    starts = self.starts[first:last] - begin
    while len(taken) < size:  # wraps around
      rest = size - len(taken)
      more = int(np.searchsorted(self.starts, rest))
      starts = np.concatenate([starts, self.starts[:more] + len(taken)])
      taken = np.concatenate([taken, self.tokens[:rest]])
    return taken, starts


def build(paragraphs: list[str], tokenizer: Tokenizer) -> Corpus:
  """Tokenizes paragraphs and finds where their sentences start."""
  text = [line + '\n' for line in paragraphs]
  ids = [
    e.ids for e in tokenizer.encode_batch_fast(text, add_special_tokens=False)
  ]
  tokens = np.concatenate([np.asarray(i, np.uint16) for i in ids])
  size = tokenizer.get_vocab_size()
  names = [tokenizer.id_to_token(i) or '' for i in range(size)]
  ends = np.array([n in ('.', '!', '?', '."', '.)') for n in names])
  blank = np.array([n.startswith('Ġ') and n != 'Ġ' for n in names])
  newline = np.array([n == 'Ċ' for n in names])
  after = np.zeros(len(tokens), bool)
  after[1:] = (ends[tokens[:-1]] & blank[tokens[1:]]) | newline[tokens[:-1]]
  after[0] = True
  sentences = []
  for line in paragraphs:
    first = line.split('. ')[0] + '.'
    if 24 <= len(first) <= 60 and first[0].isupper():
      sentences.append(first)
  if not sentences:  # all are long
    sentences = [' '.join(line.split()[:8]) + '.' for line in paragraphs]
  return Corpus(tokens, np.flatnonzero(after), tuple(sentences))


def words(paragraphs: list[str], count: int) -> list[str]:
  """The most frequent plain words of 4 to 9 letters, most frequent first."""
  import collections
  import re

  found = collections.Counter()
  for line in paragraphs:
    found.update(re.findall(r'(?<![\w`\'.])[a-z]{4,9}(?![\w`\'])', line))
  ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
  return [word for word, _ in ranked[:count]]


def load_tokenizer(text: str) -> Tokenizer:
  """A tokenizer from its JSON; checks the special tokens.

  Raises:
    ValueError: its special tokens are not where training expects them.
  """
  tokenizer = Tokenizer.from_str(text)
  for i, name in enumerate(vocabulary.SPECIAL):
    if tokenizer.token_to_id(name) != i:
      raise ValueError(f'the tokenizer must have {name!r} as token {i}')
  return tokenizer
