"""How things are said: templates that training draws from, and held-out ones.

A slot in braces is filled for every document anew, so that a model cannot
rely on any word of a phrase but must find the key. The phrases of `HELD_OUT`
serve evaluation alone; tests check by hash that training never draws one.
"""

import dataclasses
import random

ADJECTIVES = (
  'special', 'secret', 'hidden', 'important', 'private', 'unique', 'official',
  'rare', 'famous', 'special magic', 'highly secret', 'most valuable',
)  # fmt: skip
THINGS = {
  'number': ('number', 'code', 'pin', 'identifier', 'magic number', 'serial'),
  'word': ('word', 'name', 'label', 'password', 'keyword'),
  'uuid': ('uuid', 'token', 'access key', 'hash', 'identifier'),
}


@dataclasses.dataclass(frozen=True)
class Retrieval:
  """Says a key's value, and asks for it.

  Attributes:
    needle: slots {a} adjective, {t} thing, {k} key, {v} value.
    one: asks for the one value of one key and begins the answer.
    many: asks for all values of one key, or of several keys ({k} is a list).
    opening: what stands before the context; may be empty.
  """

  needle: str
  one: str
  many: str
  opening: str = ''


_OPENINGS = (
  'Some {a} {t}s are hidden within the following text. Make sure to memorize '
  'them. I will quiz you about the {t}s afterwards.\n',
  'Read the text below with care: it mentions {a} {t}s.\n',
  'There are some {t}s in this document. Remember them.\n',
  'Below is a long text. Questions about it come at the end.\n',
  'Memorize each {t} in the text.\n',
)

RETRIEVAL = (
  Retrieval(
    'One of the {a} {t}s for {k} is: {v}.',
    'What is the {a} {t} for {k} mentioned in the text? The {a} {t} for {k} '
    'mentioned in the text is',
    'What are all the {a} {t}s for {k} mentioned in the text? The {a} {t}s '
    'for {k} mentioned in the text are',
    _OPENINGS[0],
  ),
  Retrieval(
    'The {a} {t} for {k} is {v}.',
    'What is the {a} {t} for {k}? The {a} {t} for {k} is',
    'What are the {a} {t}s for {k}? The {a} {t}s for {k} are',
    _OPENINGS[1],
  ),
  Retrieval(
    'The {t} of {k} is: {v}.',
    'Question: which {t} belongs to {k}? Answer: {k} has the {t}',
    'Question: which {t}s belong to {k}? Answer: {k} has the {t}s',
    _OPENINGS[2],
  ),
  Retrieval(
    'Remember that {k} has the {a} {t} {v}.',
    'Which {a} {t} does {k} have? The {t} of {k} is',
    'Which {a} {t}s does {k} have? The {t}s of {k} are:',
    _OPENINGS[4],
  ),
  Retrieval(
    'Note: {k} -> {v};',
    'Look up {k}. {k} ->',
    'Look up all of {k}. {k} ->',
  ),
  Retrieval(
    '{k}: {v}.',
    'What does {k} stand for? {k}:',
    'What do {k} stand for? {k}:',
    _OPENINGS[3],
  ),
  Retrieval(
    'They say that the {a} {t} assigned to {k} equals {v}.',
    'Tell me the {a} {t} assigned to {k}. It is',
    'Tell me all {a} {t}s assigned to {k}. They are',
    _OPENINGS[1],
  ),
  Retrieval(
    'For {k} the {t} is {v}.',
    'Find the {t} that the text gives for {k}. Answer:',
    'Find all {t}s that the text gives for {k}. Answer:',
    _OPENINGS[0],
  ),
  Retrieval(
    'A {a} {t} of {k} is given here: {v}.',
    'Give the {t} of {k} named in the text above. The answer is:',
    'Give every {t} of {k} named in the text above. The answers are:',
  ),
  Retrieval(
    'In the register, {k} stands with the {t} {v}.',
    'Under which {t} does {k} stand in the register? Under',
    'Under which {t}s do we find {k} in the register? Under',
    _OPENINGS[3],
  ),
  Retrieval(
    '{v} is the {a} {t} for {k}.',
    'Question: what is the {a} {t} for {k}? Answer: the {t} for {k} is',
    'Question: what are the {a} {t}s for {k}? Answer: the {t}s for {k} are',
    _OPENINGS[2],
  ),
  Retrieval(
    'We have chosen {v} as the {t} of {k}.',
    'What have we chosen as the {t} of {k}? We have chosen',
    'What have we chosen as the {t}s of {k}? We have chosen',
    _OPENINGS[4],
  ),
)

# The other way round: which key has a value? Slots {t} and {v}.
REVERSE = (
  'Which one has the {t} {v}? The {t} {v} belongs to',
  'Question: to what does the {t} {v} belong? Answer: the {t} {v} is that of',
  'Whose {t} is {v}? It is the {t} of',
  'Find what {v} was said of. It was said of',
)

PASSKEY = (
  (
    'The pass key is {v}. Remember it. {v} is the pass key.',
    'What is the pass key? The pass key is',
  ),
  (
    'The {a} code is {v}. Do not forget: {v} is the {a} code.',
    'What is the {a} code? The {a} code is',
  ),
  ('Keep this number in mind: {v}.', 'Which number to keep in mind? It is'),
  (
    'The one {t} of this text is {v}.',
    'What is the one {t} of this text? It is',
  ),
)


@dataclasses.dataclass(frozen=True)
class Chain:
  """Assignments of variables, and the question for one value's variables.

  Attributes:
    first: slots {x} variable, {v} value.
    more: slots {x}, and {y} the variable that it takes its value from.
    ask: slots {v}, and {n} how many variables there are.
    opening: before the context.
  """

  first: str
  more: str
  ask: str
  opening: str = ''


CHAINS = (
  Chain(
    'VAR {x} = {v}',
    'VAR {x} = VAR {y}',
    'Question: Which variables have the value {v} in the text above? Answer: '
    'By the chain of assignments, {n} variables have the value {v}. They are:',
    'Track the chain of variable assignments hidden in the following text.\n',
  ),
  Chain(
    'VAR {x} = {v}.',
    'VAR {x} = VAR {y}.',
    'List all variables that are assigned the value {v}, directly or through '
    'other variables. Answer: the variables that are assigned {v} are',
    'Memorize and track the variables in the text.\n',
  ),
  Chain(
    'let {x} be {v}.',
    'let {x} be {y}.',
    'Name every variable that holds {v}. These {n} variables hold {v}:',
  ),
  Chain(
    '{x} := {v};',
    '{x} := {y};',
    'Find all names equal to {v} in the text above. They are',
    'The text below assigns values to names.\n',
  ),
  Chain(
    'set {x} = {v}',
    'set {x} = {y}',
    'Question: find the variables of value {v}. Answer: according to the '
    'assignments in the text above, the {n} variables of value {v} are:',
    'Follow the assignments.\n',
  ),
  Chain(
    'The variable {x} equals {v}.',
    'The variable {x} equals {y}.',
    'Which variables equal {v}? The variables that equal {v}:',
  ),
)

COPY = (
  'Repeat the sentence that begins with: {k}',
  'How does the text go on after these words? {k}',
  'Quote the text. {k}',
)

COMMON = (
  (
    'What are the {n} most common words in the list above? The {n} most '
    'common words are:',
    'Below is a numbered list of words. Memorize the ones that appear most '
    'often.\n',
  ),
  (
    'Which {n} words appear most often above? Answer:',
    'Count how often each word appears.\n',
  ),
)

FREQUENT = (
  (
    'What are the {n} most frequently appeared words in the coded text above? '
    'They are:',
    'Read the coded text and track the frequency of each coded word.\n',
  ),
  (
    'Which {n} coded words are the most frequent? Answer:',
    'Each coded word below has no meaning. Count them.\n',
  ),
)

HELD_OUT = (
  Retrieval(
    'It is well known that {v} is what {k} was given as its {t}.',
    'What {t} was {k} given? As its {t}, {k} was given',
    'What {t}s was {k} given? As its {t}s, {k} was given',
    'Here comes a text with a few facts in it.\n',
  ),
  Retrieval(
    'The archive lists {v} as the {a} {t} for {k}.',
    'Which {a} {t} does the archive list for {k}? The archive lists',
    'Which {a} {t}s does the archive list for {k}? The archive lists',
  ),
  Retrieval(
    'Whoever asks for {k} shall receive the {t} {v}.',
    'What shall one receive who asks for {k}? Whoever asks for {k} shall '
    'receive the {t}',
    'What shall one receive who asks for {k}? Whoever asks for {k} shall '
    'receive the {t}s',
  ),
)


def fill(template: str, slots: dict[str, str]) -> str:
  """Fills the slots that a template has."""
  for name, value in slots.items():
    template = template.replace('{' + name + '}', value)
  return template


def slots(rng: random.Random, kind: str) -> dict[str, str]:
  """An adjective and a thing for a document whose values are of `kind`."""
  return {'a': rng.choice(ADJECTIVES), 't': rng.choice(THINGS[kind])}
