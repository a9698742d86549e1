"""Text to hide things in: natural passages, and lines of noise.

The default text is the language reference that every Python carries
(`pydoc_data.topics`, about 490,000 characters, PSF licence). A passage starts
at a sentence that the sample's generator picks, so that neither a prefix cache
nor memorised openings change a result; past its end the text repeats.
"""

import bisect
import functools
import pathlib
import random
import re
from collections.abc import Sequence

# A line of five sentences takes 25-30 tokens, like RULER's line of noise.
NOISE: tuple[str, ...] = (
  'Rain falls on the hills.',
  'The river keeps its bed.',
  'Boats cross the wide bay.',
  'Nobody counts them.',
  'Evening comes early.',
)

_WORD = re.compile(r'\S+')
_SENTENCE_END = re.compile(r'[.!?][\'")\]]*\s+')


@functools.cache
def default_text() -> str:
  """The topics of Python's own documentation, one after the other."""
  from pydoc_data import topics

  return '\n\n'.join(topics.topics[name] for name in sorted(topics.topics))


def read(path: str | pathlib.Path) -> str:
  """A text file.

  Raises:
    ValueError: the file is empty, binary, or not UTF-8.
    OSError: it cannot be read.
  """
  raw = pathlib.Path(path).read_bytes()
  if not raw.strip():
    raise ValueError(f'text file {path} is empty')
  if b'\0' in raw:
    raise ValueError(f'text file {path} is binary: it holds NUL bytes')
  try:
    return raw.decode('utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'text file {path} is not UTF-8: {error}') from error


@functools.lru_cache(maxsize=4)
def _index(text: str) -> tuple[list[int], list[int], list[int]]:
  """Starts and ends of the words; numbers of words that open a sentence."""
  starts, ends, openers = [], [], [0]
  for match in _WORD.finditer(text):
    starts.append(match.start())
    ends.append(match.end())
    if match[0][-1] in '.!?':
      openers.append(len(ends))
  if not ends:
    raise ValueError('the haystack is empty: it must hold at least one word')
  return starts, ends, [first for first in openers if first < len(ends)]


def passage(text: str, size: int, rng: random.Random) -> str:
  """`size` consecutive words of the text, from a random sentence on."""
  starts, ends, openers = _index(text)
  first, pieces = rng.choice(openers), []
  while size > 0:
    take = min(size, len(ends) - first)
    pieces.append(text[starts[first] : ends[first + take - 1]])
    first, size = 0, size - take
  return '\n\n'.join(pieces)


def noise_lines(size: int) -> list[str]:
  """`size` sentences of noise, five a line; the last line may be shorter."""
  whole, rest = divmod(size, len(NOISE))
  lines = [' '.join(NOISE)] * whole
  return [*lines, ' '.join(NOISE[:rest])] if rest else lines


def insert_sentences(
  text: str, sentences: Sequence[str], depths: Sequence[float]
) -> str:
  """Inserts each sentence before the sentence in which its depth falls.

  Args:
    text: a passage.
    sentences: what is inserted, one for each depth.
    depths: 0 (start) to 1 (end).
  """
  bounds = [0, *(m.end() for m in _SENTENCE_END.finditer(text)), len(text)]
  places = [
    bounds[bisect.bisect_right(bounds, depth * len(text)) - 1]
    for depth in depths
  ]
  order = sorted(range(len(sentences)), key=lambda i: places[i])
  pieces, last = [], 0
  for i in order:
    pieces.append(text[last : places[i]])
    at_end = places[i] == len(text)
    pieces.append(f' {sentences[i]}' if at_end else f'{sentences[i]} ')
    last = places[i]
  pieces.append(text[last:])
  return ''.join(pieces).strip()


def insert_lines(
  lines: Sequence[str], inserted: Sequence[str], rng: random.Random
) -> list[str]:
  """Inserts lines at random places, keeping the order of the inserted ones."""
  places = sorted(rng.random() for _ in inserted)
  result, taken = [], 0
  for line, place in zip(inserted, places):
    until = int(place * (len(lines) + 1))
    result += lines[taken:until]
    result.append(line)
    taken = until
  return [*result, *lines[taken:]]
