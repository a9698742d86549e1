"""The generated mixture: exact lengths, answers in place, nothing held out."""

import dataclasses
import hashlib
import itertools
import random
import re

import numpy as np
import pytest

from lcx.tasks import get_task, haystacks
from lcx.tasks.words import ADJECTIVES, NOUNS
from lcx.train import (
  corpus,
  exact,
  feed,
  layout,
  mixture,
  phrases,
  samples,
  text,
  vocabulary,
)

PARAGRAPH = (
  'The old mill stands by the river and its wheel has not turned for years. '
  'Grass grows on the path that carts once took. Nobody knows who owned it. '
  'Some say that a miller lived there with nine cats and a blue door. '
)
MIX = (2.0, 1.0, 2.0, 5.0, 2.0, 3.0, 1.0, 1.0, 1.0, 1.0)


def paragraphs():
  words = (*ADJECTIVES, *NOUNS)
  found = []
  for i in range(200):
    rng = random.Random(i)
    more = ' '.join(
      f'The {rng.choice(words)} {rng.choice(words)} is {rng.choice(words)}.'
      for _ in range(6)
    )
    found.append(PARAGRAPH + more)
  return found


@pytest.fixture(scope='module')
def tokenizer():
  return vocabulary.build(
    paragraphs(), [' ' + w for w in ADJECTIVES] + list(NOUNS), 3200
  )


@pytest.fixture(scope='module')
def data(tokenizer):
  return corpus.build(paragraphs(), tokenizer)


@pytest.fixture(scope='module')
def made(tokenizer, data):
  stages = [
    mixture.Stage(256, 8, 3, 32, MIX),
    mixture.Stage(1024, 2, 3, 32, MIX),
  ]
  return mixture.Mixture(data, tokenizer, (*ADJECTIVES, *NOUNS), stages, 7)


def test_tokenizer_keeps_text_and_spells_needles_briefly(tokenizer):
  for line in (
    'VAR XQJKA = 12345\nLet ABC = XQJKA.',
    'One of the numbers for brave-otter is: 1234567.',
    'é 漢字 \t "quoted" 3f2a9c1e-77ab',
  ):
    ids = tokenizer.encode(line, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == line

  def encode(t):
    return tokenizer.encode(t, add_special_tokens=False).ids

  assert len(encode(' 1234567')) == 4
  assert len(encode(' XQJKA')) == 4
  assert len(encode(f' {ADJECTIVES[0]}-{NOUNS[0]}')) == 3
  assert tokenizer.encode('a').ids[0] == vocabulary.BOS


def test_vocabulary_too_small_is_refused():
  with pytest.raises(ValueError, match='tokens left for text'):
    vocabulary.build(paragraphs(), size=2000)


@pytest.mark.parametrize('kind', mixture.KINDS)
def test_every_kind_fills_its_row(made, kind):
  mix = tuple(float(k == kind) for k in mixture.KINDS)
  for length in (256, 1024):
    stage = mixture.Stage(length, 1, 1, 8, mix)
    for i in range(4):
      row, mark = made._row(random.Random(i), stage)
      assert row.shape == mark.shape == (length,)
      assert row.max() < made.size
      if kind != 'text' and length == 1024:
        assert mark.any()


def test_marked_tokens_are_the_answers(tokenizer, data):
  writer = layout.Writer(data, tokenizer)
  source = samples.Source((*ADJECTIVES, *NOUNS))
  for seed in range(10):
    rng = random.Random(seed)
    document = samples.key_value(
      rng, source, keys=4, values=1, queried=1, kind='number', background='text'
    )
    row, mark = writer.write(rng, document, 700)
    said = tokenizer.decode(row[mark]).split()
    assert said == [answer for _, answer in document.asks][: len(said)]
    assert said
    whole = tokenizer.decode(row)
    assert all(item in whole for item in document.items)


def test_batches_follow_from_seed_and_step(made):
  first, again = made.batch(4), made.batch(4)
  assert np.array_equal(first.tokens, again.tokens)
  assert np.array_equal(first.index, again.index)
  assert not np.array_equal(first.tokens, made.batch(5).tokens)
  assert made.batch(2).tokens.shape == (8, 256)
  assert first.tokens.shape == (2, 1024)
  assert first.index.shape == (2, 64)
  assert first.weight[0, :, 32:].sum() == 0 == first.weight[1, :, :32].sum()


def test_workers_make_the_same_batches(made):
  plain = list(feed.batches(made, 1, 5))
  ahead = list(feed.batches(made, 1, 5, workers=1))
  for a, b in zip(plain, ahead, strict=True):
    assert np.array_equal(a.tokens, b.tokens)
    assert np.array_equal(a.weight, b.weight)


def test_training_and_evaluation_share_no_key():
  words = (*ADJECTIVES[:9], *NOUNS[:9])
  train, held = samples.Source(words), samples.Source(words, evaluation=True)
  a = {train.key(random.Random(i)) for i in range(600)}
  b = {held.key(random.Random(i)) for i in range(600)}
  assert not a & b
  assert {text.held_out(k, 2) for k in a} == {False}


@pytest.mark.parametrize(
  ('name', 'filtered'),
  [
    ('niah_single_2', True),
    ('niah_multikey_1', True),
    ('niah_multiquery', True),
    ('niah_multikey_2', False),  # as its record says
  ],
)
def test_evaluation_asks_for_held_out_keys(name, filtered):
  task = get_task(name)
  found = exact.examples(task, lambda t: list(t.encode()), 2500, 3)
  for example in found:
    said = bytes(example.tokens[1:-1].astype(np.uint8)).decode()
    keys = re.findall(r'The pass \w+ of (\S+) is \d', said)
    assert len(keys) >= task.keys
    held = [text.held_out(key, 2) for key in keys]
    assert all(held) == filtered == exact.filters_keys(task)


def test_evaluation_s_haystack_is_not_trained_on(tmp_path):
  """Whatever is read: its paragraphs are known by hash."""
  haystack = haystacks.default_text()
  of = set(map(text.digest, text.paragraphs(haystack)))
  file = tmp_path / 'all.txt'
  file.write_text('\n\n'.join([haystack, *paragraphs()]))
  train, held = text.split((str(file),))
  assert train and not of & set(map(text.digest, train))
  assert of <= set(map(text.digest, held))
  file.write_text(haystack)
  with pytest.raises(ValueError, match='nothing of the text'):
    text.split((str(file),))
  # It is what evaluation hides its needles in.
  sample = get_task('niah_single_2').sample(lambda t: len(t.split()), 900, 0, 0)
  parts = sample.context.replace('\n', ' ').split(' The pass ')
  first, last = parts[0], parts[-1].partition('. ')[2]
  words = ' '.join(haystack.split())
  for part in (first, last):
    assert ' '.join(part.split()[:20]) in words


def _digest(line):
  line = re.sub(r'\{\w\}|\d+|[A-Z]{3,}|[a-z]+-[a-z]+', '#', line)
  return hashlib.sha256(line.encode()).hexdigest()


def test_phrases_of_evaluation_are_not_trained_on():
  """By hash of needle sentences and questions, slots and all."""
  trained = set()
  for phrase in phrases.RETRIEVAL:
    for kind, things in phrases.THINGS.items():
      for thing in things:
        for adjective in phrases.ADJECTIVES:
          slots = {'a': adjective, 't': thing}
          for part in (phrase.needle, phrase.one, phrase.many):
            trained.add(_digest(phrases.fill(part, slots)))
            assert kind
  for part in itertools.chain.from_iterable(phrases.PASSKEY):
    for thing, adjective in itertools.product(
      phrases.THINGS['number'], phrases.ADJECTIVES
    ):
      trained.add(_digest(phrases.fill(part, {'a': adjective, 't': thing})))
  for chain in phrases.CHAINS:
    trained |= {_digest(s) for s in (chain.first, chain.more, chain.ask)}

  def count(t):
    return len(t.split())

  for name in ('niah_single_2', 'niah_multikey_1', 'vt', 'passkey'):
    task = get_task(name)
    sample = task.sample(count, 1200, 0, 0)
    said = re.findall(r'(?:The pass|Let|Here is) [^.]*\.', sample.context)
    sentences = said + [
      sample.questions[0].text + sample.questions[0].answer_prefix
    ]
    assert len(sentences) > 1
    assert not {_digest(s) for s in sentences} & trained
  held = {_digest(p.needle) for p in phrases.HELD_OUT}
  assert not held & {_digest(p.needle) for p in phrases.RETRIEVAL}


def test_a_text_is_split_by_hash_without_overlap(tmp_path):
  file = tmp_path / 'book.txt'
  file.write_text('\n\n'.join(paragraphs()))
  train, held = text.split((str(file),))
  assert train and held and not set(train) & set(held)
  assert all(text.held_out(line) for line in held)


@pytest.mark.parametrize(
  ('content', 'says'),
  [
    (b'', 'is empty'),
    (b'  \n', 'is empty'),
    (b'abc\0def', 'binary'),
    (b'\xff\xfe\xfa' * 90, 'not UTF-8'),
    (b'too short', 'no paragraph'),
  ],
)
def test_bad_text_files_are_refused(tmp_path, content, says):
  file = tmp_path / 'bad.txt'
  file.write_bytes(content)
  with pytest.raises(ValueError, match=says):
    text.split((str(file),))


def test_missing_sources_are_refused(tmp_path):
  with pytest.raises(OSError, match='nothing'):
    text.split((str(tmp_path / 'nothing.txt'),))
  with pytest.raises(ValueError, match='not an installed package'):
    text.split(('no_such_package',))


def test_haystack_shorter_than_the_context_is_refused(tokenizer, data):
  short = dataclasses.replace(data, tokens=data.tokens[:500])
  with pytest.raises(ValueError, match='500 tokens; contexts of 1024'):
    mixture.Mixture(
      short, tokenizer, ADJECTIVES, [mixture.Stage(1024, 1, 1, 8, MIX)]
    )
