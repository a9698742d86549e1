"""Documents to learn from: items hidden in a background, then questions.

Every function here takes a `random.Random` and returns a `Document`; the same
generator state gives the same document. Every document asks several questions,
each answered in full, so that one sequence teaches many retrievals.
"""

import dataclasses
import random
import string

from lcx.tasks.words import ADJECTIVES, NOUNS
from lcx.train import phrases
from lcx.train.text import held_out


@dataclasses.dataclass
class Document:
  """A text in parts, before it is laid out.

  Attributes:
    opening: stands first.
    items: hidden in the background, in this order.
    asks: (question with the beginning of its answer, the rest of the answer).
    background: 'text', 'noise' (one line over and over) or 'items' (nothing
      but items).
    join: what stands between an item and what comes before it.
  """

  opening: str
  items: list[str]
  asks: list[tuple[str, str]]
  background: str = 'text'
  join: str = ' '


@dataclasses.dataclass(frozen=True)
class Source:
  """What documents are made of.

  Attributes:
    words: words of keys and lists.
    evaluation: draws keys and phrases that training never sees.
  """

  words: tuple[str, ...]
  evaluation: bool = False

  def key(self, rng: random.Random) -> str:
    """A name: two words mostly; its SHA-256 decides who may use it."""
    while True:
      style = rng.random()
      one, two = rng.choice(self.words), rng.choice(self.words)
      if style < 0.45:
        key = f'{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}'
      elif style < 0.7:
        key = f'{one}-{two}'
      elif style < 0.8:
        key = f'{one} {two}'
      elif style < 0.85:
        key = f'{one.capitalize()}{two.capitalize()}'
      elif style < 0.93:
        key = f'{one}{rng.randrange(1000)}'
      elif style < 0.97:
        key = str(rng.randrange(10**6, 10**7))
      else:
        key = hexadecimal(rng)
      if held_out(key, 2) == self.evaluation:
        return key

  def keys(self, rng: random.Random, count: int) -> list[str]:
    """Distinct keys; half of the time some share a word."""
    found = dict.fromkeys(self.key(rng) for _ in range(count))
    while len(found) < count:
      found.setdefault(self.key(rng))
    return list(found)

  def retrieval(self, rng: random.Random) -> phrases.Retrieval:
    return rng.choice(
      phrases.HELD_OUT if self.evaluation else phrases.RETRIEVAL
    )


def hexadecimal(rng: random.Random) -> str:
  """Eight to twelve hexadecimal digits in two groups."""
  return f'{rng.getrandbits(32):08x}-{rng.getrandbits(16):04x}'


def uuid(rng: random.Random) -> str:
  """A UUID of version 4's shape."""
  h = f'{rng.getrandbits(128):032x}'
  return f'{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}'


def _value(rng: random.Random, source: Source, kind: str) -> str:
  if kind == 'number':
    digits = rng.choice((7, 7, 7, 7, 5, 6, 4, 8))
    return str(rng.randrange(10 ** (digits - 1), 10**digits))
  if kind == 'word':
    return f'{rng.choice(source.words)}-{rng.choice(source.words)}'
  return uuid(rng)


def _listed(names: list[str]) -> str:
  if len(names) == 1:
    return names[0]
  comma = ',' if len(names[0]) % 2 else ''
  return f'{", ".join(names[:-1])}{comma} and {names[-1]}'


def key_value(
  rng: random.Random,
  source: Source,
  *,
  room: int = 1024,
  keys: int = 0,
  values: int = 0,
  queried: int = 0,
  asks: int = 24,
  backward: float = 0.0,
  kind: str = '',
  background: str = '',
) -> Document:
  """Keys with values, asked for one by one or several at once.

  Args:
    rng: random numbers.
    source: words.
    room: tokens there are; what is drawn fits into it, nearly always.
    keys: how many; 0: 1 to 40.
    values: of each key; 0: mostly 1, up to 4.
    queried: keys of one question; 0: mostly 1, up to 4.
    asks: questions at most.
    backward: how likely it is that keys are asked for by their values.
    kind: 'number', 'word' or 'uuid'; '': drawn.
    background: of the document; '': drawn.
  """
  kind = kind or rng.choices(('number', 'word', 'uuid'), (70, 24, 6))[0]
  back = 0.0 if source.evaluation else backward
  reverse = rng.choice(phrases.REVERSE) if rng.random() < back else ''
  cost = 60 if kind == 'uuid' else 24  # tokens of a needle, about
  values = values or rng.choices((1, 2, 3, 4), (75, 10, 5, 10))[0]
  most = max(1, min(int(room * 0.55 / (cost * values)), 40))
  # Mostly few; often as many as fit, for many questions in one row.
  keys = keys or (most if rng.random() < 0.4 else rng.randint(1, most))
  queried = queried or rng.choices((1, 2, 3, 4), (70, 12, 6, 12))[0]
  queried = 1 if values > 1 else min(queried, keys)
  phrase = source.retrieval(rng)
  slots = phrases.slots(rng, kind)
  names = source.keys(rng, keys)
  table = {k: [_value(rng, source, kind) for _ in range(values)] for k in names}
  pairs = [(k, v) for k in names for v in table[k]]
  rng.shuffle(pairs)
  in_order: dict[str, list[str]] = {k: [] for k in names}
  for k, v in pairs:
    in_order[k].append(v)
  made = []
  reverse = '' if values > 1 else reverse
  turn = rng.sample(names, keys)  # nobody is asked for twice
  for first in range(0, min(asks, keys - queried + 1), queried):
    asked = turn[first : first + queried]
    if reverse and queried == 1:
      value = table[asked[0]][0]
      question = phrases.fill(reverse, {**slots, 'v': value})
      made.append((question, asked[0]))
      continue
    several = values > 1 or queried > 1
    template = phrase.many if several else phrase.one
    question = phrases.fill(template, {**slots, 'k': _listed(asked)})
    answer = ', '.join(v for k in asked for v in in_order[k])
    made.append((question, answer))
  return Document(
    phrases.fill(phrase.opening, slots) if rng.random() < 0.7 else '',
    [phrases.fill(phrase.needle, {**slots, 'k': k, 'v': v}) for k, v in pairs],
    made,
    background or rng.choices(('text', 'noise'), (85, 15))[0],
    rng.choices((' ', '\n'), (75, 25))[0],
  )


def lines(rng: random.Random, source: Source, *, room: int) -> Document:
  """Nothing but needles, as many as fit into `room` tokens."""
  keys = max(2, min(room // 26, 2000))
  document = key_value(
    rng, source, keys=keys, values=1, queried=1, asks=min(24, keys),
    kind='number', background='items',
  )  # fmt: skip
  document.join = '\n'
  return document


def _names(rng: random.Random, count: int) -> list[str]:
  length = rng.choice((3, 3, 4, 5, 5))
  found: dict[str, None] = {}
  while len(found) < count:
    found.setdefault(''.join(rng.choices(string.ascii_uppercase, k=length)))
  return list(found)


def variables(
  rng: random.Random,
  source: Source,
  *,
  room: int = 512,
  chains: int = 0,
  hops: int | None = None,
  background: str = '',
) -> Document:
  """Chains of assignments; asks which variables have a value.

  Args:
    rng: random numbers.
    source: unused but for symmetry.
    room: tokens there are; what is drawn fits into it, nearly always.
    chains: how many; 0: 1 to 8.
    hops: assignments from variable to variable in each chain; None:
      0 to 4.
    background: of the document; '': drawn.
  """
  del source
  hops = rng.choice((0, 1, 1, 2, 2, 2, 3, 4)) if hops is None else hops
  if not background and rng.random() < 0.5:
    background = 'items'  # dense: many chains, every one asked for
    most = max(1, min(12, int(room * 0.9) // (16 * (hops + 1) + 30)))
    chains = chains or max(1, most - rng.randint(0, 1))
  most = max(1, min(8, room // (30 * (hops + 1))))
  chains = chains or rng.randint(1, most)
  phrase = rng.choice(phrases.CHAINS)
  names = _names(rng, chains * (hops + 1))
  queues, asks = [], []
  for c in range(chains):
    mine = names[c * (hops + 1) : (c + 1) * (hops + 1)]
    value = str(rng.randrange(10**4, 10**5))
    said = [phrases.fill(phrase.first, {'x': mine[0], 'v': value})]
    for x, y in zip(mine[1:], mine[:-1]):
      said.append(phrases.fill(phrase.more, {'x': x, 'y': y}))
    queues.append(said)
    question = phrases.fill(phrase.ask, {'v': value, 'n': str(hops + 1)})
    asks.append((question, ', '.join(mine)))
  items = []
  while queues:  # chains interleave; each keeps its order
    queue = rng.choice(queues)
    items.append(queue.pop(0))
    queues = [q for q in queues if q]
  rng.shuffle(asks)
  return Document(
    phrase.opening if rng.random() < 0.7 else '',
    items,
    asks,
    background or rng.choices(('text', 'noise', 'items'), (60, 30, 10))[0],
    rng.choices((' ', '\n'), (60, 40))[0],
  )


def passkey(rng: random.Random, source: Source) -> Document:
  """One number without a key."""
  needle, question = rng.choice(phrases.PASSKEY)
  slots = phrases.slots(rng, 'number')
  slots['v'] = str(rng.randrange(10**4, 10 ** rng.choice((5, 6, 10))))
  del source
  return Document(
    rng.choice(('', phrases.fill(phrases.RETRIEVAL[0].opening, slots))),
    [phrases.fill(needle, slots)],
    [(phrases.fill(question, slots), slots['v'])],
    rng.choice(('text', 'noise')),
    rng.choice((' ', '\n')),
  )


def common_words(rng: random.Random, source: Source, *, room: int) -> Document:
  """A numbered list in which some words stand much more often."""
  question, opening = rng.choice(phrases.COMMON)
  often = rng.randint(2, 10)
  total = max(often * 4, min(room // 6, 3000))
  repeats = max(2, min(30, total // (2 * often)))
  rest = max(1, total - often * repeats)
  rare = min(3, max(1, repeats // 3))
  words = rng.sample(source.words, min(len(source.words), often + rest // rare))
  listed = words[:often] * repeats + words[often:] * rare
  rng.shuffle(listed)
  return Document(
    opening,
    [' '.join(f'{i + 1}. {w}' for i, w in enumerate(listed))],
    [
      (
        phrases.fill(question, {'n': str(often)}),
        ', '.join(sorted(words[:often], key=listed.index)),
      )
    ],
    'items',
    '',
  )


def frequent_words(
  rng: random.Random, source: Source, *, room: int
) -> Document:
  """Coded words whose frequencies fall off as in a zeta distribution."""
  del source
  question, opening = rng.choice(phrases.FREQUENT)
  total = max(20, min(room // 4, 3000))
  size = rng.randint(6, 40)
  width = rng.choice((2, 4, 6))
  words = []
  while len(words) < size:
    word = ''.join(rng.choices(string.ascii_lowercase, k=width))
    if word not in words:
      words.append(word)
  weights = [(i + 1) ** -2.0 for i in range(size)]
  if rng.random() < 0.5:  # the most frequent one is written as dots
    words[0] = '...'
  listed = [w for w, p in zip(words, weights)
            for _ in range(max(1, int(total * p / sum(weights))))]  # fmt: skip
  rng.shuffle(listed)
  first = words[0] == '...'
  return Document(
    opening,
    [' '.join(listed)],
    [(phrases.fill(question, {'n': '3'}), ', '.join(words[first : first + 3]))],
    'items',
    '',
  )
