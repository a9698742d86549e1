"""The bundled model: it is what its record says, loads at once, and finds."""

import hashlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.models import needle, transformer
from lcx.tasks import get_task
from lcx.train import exact


@pytest.fixture(scope='module')
def bundled():
  return needle.load('float32')


def test_weights_are_those_of_the_record_and_small():
  raw = (needle.FOLDER / 'model.safetensors').read_bytes()
  assert hashlib.sha256(raw).hexdigest() == needle.record()['sha256']
  assert len(raw) <= 12_000_000


def test_it_loads_in_under_a_second(bundled):
  begin = time.perf_counter()
  needle.load()
  assert time.perf_counter() - begin < 1
  assert bundled.config.head_dim == 64
  assert bundled.config.n_heads > bundled.config.n_kv_heads
  assert bundled.tokenizer.vocab_size == bundled.config.vocab_size
  assert bundled.tokenizer.eos_ids == (2,)


def test_other_weights_are_refused(monkeypatch):
  record = needle.record() | {'sha256': '0' * 64}
  monkeypatch.setattr(needle, 'record', lambda: record)
  with pytest.raises(ValueError, match='SHA-256'):
    needle.load()


@pytest.mark.parametrize('name', ['niah_single_2', 'niah_multikey_1'])
def test_it_finds_needles_with_held_out_keys(bundled, name):
  found = list(
    exact.examples(get_task(name), bundled.tokenizer.encode, 640, 4, seed=5)
  )
  tokens = np.zeros((len(found), 640), np.int32)
  for row, example in enumerate(found):
    tokens[row, : len(example.tokens)] = example.tokens

  @jax.jit
  def best(weights, tokens):
    scores = transformer.forward(weights, tokens, bundled.config)
    return jnp.argmax(scores, axis=-1)

  said = np.asarray(best(bundled.weights, tokens))
  for row, example in zip(said, found, strict=True):
    end = len(example.tokens) - 1
    assert (row[example.prompt - 1 : end - 1]
            == example.tokens[example.prompt : end]).all()  # fmt: skip
