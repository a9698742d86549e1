"""Words, numbers and identifiers that tasks hide and ask for."""

import functools
import random
import re
import string
import uuid
from collections.abc import Callable

from lcx.tasks import haystacks

ADJECTIVES = tuple(
  """
able agile alert ample amber ancient arid aware balmy basic bitter bland blank
bleak blue bold brave brief bright brisk broad bronze brown calm careful cheap
chilly clean clear clever close cloudy clumsy coarse cold common compact cool
coral cosy crimson crisp crooked curious curly daily damp dark dear deep dense
dim distant double dry dull dusty eager early earnest easy elegant empty equal
even exact faint fair famous fancy fast fertile fierce fine firm flat flexible
fluent foggy fond formal fragile frank free fresh frosty frugal full fuzzy
gentle giant glad golden gradual grand grateful gray green handy happy hardy
harsh hazy heavy hidden high hollow honest hot huge humble humid idle inner
ivory jolly joint keen kind large late lazy lean level light likely little
lively local lone long loud loyal lucky lunar major mellow merry mighty mild
minor misty modern modest moist narrow native neat new nimble noble normal
northern noisy novel odd olive open orange outer pale patient peaceful plain
playful polite prime private proper proud public pure purple quaint quick quiet
rapid rare ready recent red regular rigid ripe robust rocky rough round royal
rural rusty sandy scarlet secret secure serene shady sharp shiny short shy
silent silver simple sleepy slender slim slow small smart smooth snowy sober
soft solar solid southern spare sparse spicy steady steep sticky still stormy
strict strong sturdy subtle sudden sunny sweet swift tall tame tender thick
thin tidy tiny tough tranquil true upper urban usual vague vast velvet violet
vivid warm wary western whole wide wild windy wise witty wooden woolly yellow
young zesty
""".split()
)

NOUNS = tuple(
  """
acorn actor airport album alley anchor angle ankle antler apple apron arch arrow
artist atlas attic autumn avenue bakery balcony ballad bamboo banjo banner
barley barn barrel basin basket beach beacon beaver bell bench berry bicycle
blanket blossom boat bottle boulder branch bread breeze brick bridge broom brush
bucket buffalo button cabin cabinet cable cactus camel camera candle canoe
canvas canyon caravan carpet carrot castle cattle cedar cellar chapel cherry
chimney chisel cinema circle circus clarinet cliff clock cloud clover coat
coffee collar column comet compass copper corner cotton cottage coyote cradle
crane crater cricket crystal cupboard curtain cushion daisy dancer desert desk
diamond dinner doctor dolphin donkey door dragon drawer drum eagle easel echo
elbow elephant elk ember engine envelope falcon farmer feather fence fern ferry
fiddle field finch flame flask flute forest fork fossil fountain fox freezer
galaxy gallery garage garden garlic gate geyser ginger giraffe glacier glove
goat gravel guitar hamlet hammer hammock harbor harp harvest hawk hazel helmet
heron hill hinge honey horizon horse hotel island ivy jacket jaguar jar jasmine
jewel journal jungle kettle kitchen kite ladder lagoon lake lamp lantern ledge
lemon library lily linen lion lizard lobby locket lumber magnet mango mantle
maple marble market meadow melon mirror mitten monk moose morning mosaic
mountain museum mushroom napkin needle nest notebook novelist nutmeg oak oasis
oboe ocean office onion orchard orchid otter oven owl oyster paddle palace panda
paper parade parcel parrot pasture path pavilion peach peacock pearl pebble
pelican pencil pepper piano picnic pigeon pillow pilot pine pirate planet
plateau plaza plum pocket poem pond pony poplar portrait potato prairie prism
puppet puzzle quail quarry quartz rabbit raccoon radio raft railway rainbow
ranch raven reef ribbon ridge river robin rocket roof rope rudder saddle sailor
salmon sandal satchel saucer scarf school shadow shelf shell shield shovel shrub
signal singer sleigh slipper sofa soldier spade sparrow spider spoon spruce
squirrel stable stadium staircase station statue stone stove street summit
sunset swan table tailor tavern teacher teapot temple thicket thistle throne
thunder ticket tiger timber toast tomato tower tractor trail train treasure
trumpet tulip tunnel turnip turtle umbrella valley vase vessel village vineyard
violin volcano wagon wallet walnut walrus waterfall weaver whale wheat wheel
whistle willow window winter wolf workshop yard zebra
""".split()
)


def word_pair(rng: random.Random) -> str:
  """An adjective and a noun with a hyphen between them."""
  return f'{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}'


def number(rng: random.Random, digits: int = 7) -> str:
  """A number of so many digits, the first of them not 0."""
  return str(rng.randrange(10 ** (digits - 1), 10**digits))


def identifier(rng: random.Random) -> str:
  """A UUID of version 4."""
  return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def letters(
  rng: random.Random, size: int, alphabet: str = string.ascii_lowercase
) -> str:
  """A random string of letters."""
  return ''.join(rng.choices(alphabet, k=size))


def distinct(
  draw: Callable[[random.Random], str], count: int, rng: random.Random
) -> list[str]:
  """`count` draws that all differ, in the order in which they came."""
  seen: dict[str, None] = {}
  for _ in range(100 * count + 1000):
    if len(seen) == count:
      return list(seen)
    seen[draw(rng)] = None
  raise ValueError(f'cannot draw {count} distinct values: too few exist')


@functools.cache
def vocabulary() -> tuple[tuple[str, ...], tuple[str, ...]]:
  """English words for word lists: (answers, all).

  Our own words and those of Python's documentation. Answers lie in no other
  word, so that naming another word never scores by accident (RULER's list has
  such pairs: 2 of 80 samples).
  """
  found = re.findall(r'\b[a-z]{4,11}\b', haystacks.default_text())
  every = tuple(sorted({*ADJECTIVES, *NOUNS, *found}))
  joined = '\n'.join(every)
  answers = sorted({*ADJECTIVES, *NOUNS})
  return tuple(
    word for word in answers if len(word) > 4 and joined.count(word) == 1
  ), every


def word_list(size: int, rng: random.Random) -> list[str]:
  """`size` distinct list words, hyphenated pairs once single words run out."""
  every = list(vocabulary()[1])
  rng.shuffle(every)
  if size > len(every):
    every += distinct(word_pair, size - len(every), rng)
  return every[:size]
