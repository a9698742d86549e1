"""Documents with several passkeys hidden in any text, as tokens.

DuoAttention, arXiv:2410.10819, section 3.1: ten passkeys of 32 words each; all
of them are asked for at the end. A step's document depends on its number and
the seed alone, so training that goes on needs no other state.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

# The NATO spelling alphabet, as in DuoAttention's released code.
WORDS = (
  'alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima '
  'mike november oscar papa quebec romeo sierra tango uniform victor whiskey '
  'xray yankee zulu'
).split()
ORDINALS = (
  'first second third fourth fifth sixth seventh eighth ninth tenth eleventh '
  'twelfth'
).split()


@dataclasses.dataclass(frozen=True)
class Passkeys:
  """What documents are like.

  Attributes:
    lengths: tokens of a document; step i has lengths[i % n], each whole.
    passkeys: hidden in a document.
    words: of a passkey.
    depth: share of the haystack at both ends that holds none.
  """

  lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 24576, 32768)
  passkeys: int = 10
  words: int = 32
  depth: float = 0.05

  def __post_init__(self):
    if not self.lengths or min(self.lengths) < 1:
      raise ValueError(f'lengths={self.lengths} must be positive numbers')
    if not 1 <= self.passkeys <= len(ORDINALS) or self.words < 1:
      raise ValueError(
        f'passkeys={self.passkeys} must be within 1 and {len(ORDINALS)}, '
        f'words={self.words} at least 1'
      )
    if not 0 <= self.depth < 0.5:
      raise ValueError(f'depth={self.depth} must lie in [0, 0.5)')


class Writer:
  """Writes documents in the tokens of one model.

  Args:
    haystack: int [n] tokens of any text; it repeats where it is short.
    encode: text to tokens.
    style: what documents are like.
    seed: of everything drawn.
    opening: tokens that stand first (a BOS).
  """

  def __init__(
    self,
    haystack: np.ndarray,
    encode: Callable[[str], list[int]],
    style: Passkeys,
    seed: int = 0,
    opening: tuple[int, ...] = (),
  ):
    self.haystack = np.asarray(haystack, np.int32)
    if not len(self.haystack):
      raise ValueError('the haystack is empty: give a text')
    self.encode, self.style, self.seed = encode, style, seed
    self.opening = np.asarray(opening, np.int32)

  def document(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [T], answer bool [T]: the tokens of the answers).

    Raises:
      ValueError: passkeys and questions alone are longer than the document.
    """
    style = self.style
    length = style.lengths[step % len(style.lengths)]
    draw = np.random.default_rng((self.seed, step))
    needles, asked = [], []
    for name in ORDINALS[: style.passkeys]:
      key = ' '.join(draw.choice(WORDS, style.words))
      needles.append(
        self._tokens(f' Remember this: the {name} passkey is: {key}.')
      )
      question = self._tokens(f'\n\nQuestion: What is the {name} passkey?')
      question = np.r_[question, self._tokens('\nAnswer: The passkey is:')]
      asked.append((question, self._tokens(f' {key}.')))
    fixed = sum(map(len, needles)) + sum(len(q) + len(a) for q, a in asked)
    room = length - fixed - len(self.opening)
    if room < 0:
      raise ValueError(
        f'a document of {length} tokens cannot hold {style.passkeys} passkeys '
        f'of {style.words} words, which take {fixed}: fewer or shorter ones, '
        'or longer documents'
      )
    first = draw.integers(len(self.haystack))
    hay = np.take(self.haystack, first + np.arange(room), mode='wrap')
    depths = draw.uniform(style.depth, 1 - style.depth, len(needles))
    places = np.sort((depths * room).astype(int))
    tokens = [self.opening]
    for begin, end, needle in zip(
      np.r_[0, places], np.r_[places, room], [*needles, needles[0][:0]]
    ):
      tokens += [hay[begin:end], needle]
    answers = [np.zeros(sum(map(len, tokens)), bool)]
    for question, answer in asked:
      tokens += [question, answer]
      answers += [np.zeros(len(question), bool), np.ones(len(answer), bool)]
    return np.concatenate(tokens).astype(np.int32), np.concatenate(answers)

  def _tokens(self, text: str) -> np.ndarray:
    return np.asarray(self.encode(text), np.int32)
