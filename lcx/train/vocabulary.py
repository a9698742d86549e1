"""The bundled model's tokenizer: small, and kind to what needles are made of.

Byte-level BPE over the training text, in which numbers split into groups of
at most three digits (all of them are tokens, so a 7-digit number is 3 tokens)
and runs of capitals into pairs (all of them are tokens, so a variable's name
is 2 or 3). What a small model must spend on spelling it cannot spend on
finding.
"""

import itertools
import json
import string
from collections.abc import Iterable

from tokenizers import (
  Regex,
  Tokenizer,
  decoders,
  models,
  pre_tokenizers,
  processors,
  trainers,
)

SPECIAL = ('<pad>', '<s>', '</s>')
PAD, BOS, EOS = range(3)

# Digits in groups; a blank before capitals stands alone, so that a name is
# spelled alike at the start of a line and within one; words with their blank.
_PATTERN = (
  r'\p{N}{1,3}| (?=\p{Lu}{2})|\p{Lu}{2}(?!\p{Ll})| ?\p{Lu}?\p{Ll}+| ?\p{Lu}'
  r'| ?[^\s\p{L}\p{N}]+|\s'
)


def build(
  text: Iterable[str], words: Iterable[str] = (), size: int = 5120
) -> Tokenizer:
  """Trains the tokenizer.

  Args:
    text: paragraphs.
    words: pieces (a blank in front counts) that become one token each.
    size: tokens of the vocabulary.

  Raises:
    ValueError: the vocabulary is too small for what it must hold.
  """
  numbers = [
    ''.join(digits)
    for width in (2, 3)
    for digits in itertools.product(string.digits, repeat=width)
  ]
  pairs = [
    ''.join(p) for p in itertools.product(string.ascii_uppercase, repeat=2)
  ]
  wanted = [w.replace(' ', 'Ġ') for w in dict.fromkeys(words)]
  given = numbers + pairs + wanted
  room = size - len(given)
  if room < 512:
    raise ValueError(
      f'vocabulary of {size=} has {room} tokens left for text; at least 512'
    )
  paragraphs = list(text)
  while True:  # words that the text has, too, leave room for more of it
    vocab, state = _train(paragraphs, room)
    for piece in given:
      vocab.setdefault(piece, len(vocab))
    if len(vocab) == size or room >= size:
      break
    room += size - len(vocab)
  # Whole pieces of the vocabulary are taken before merges are tried.
  state['model']['ignore_merges'] = True
  return Tokenizer.from_str(json.dumps(state))


def _train(paragraphs, room):
  tokenizer = _empty()
  trainer = trainers.BpeTrainer(
    vocab_size=room,
    special_tokens=list(SPECIAL),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(paragraphs, trainer)
  state = json.loads(tokenizer.to_str())
  return state['model']['vocab'], state


def _empty() -> Tokenizer:
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_PATTERN), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f'{SPECIAL[BOS]} $A', special_tokens=[(SPECIAL[BOS], BOS)]
  )
  return tokenizer
