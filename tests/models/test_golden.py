"""Logits and greedy text equal Hugging Face transformers' (golden files)."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.models import hf, load, transformer
from tests.golden import families

ROOT = pathlib.Path(__file__).parent.parent.parent
GOLDEN = ROOT / 'tests' / 'golden'
MODEL = ROOT / '.cache' / 'models' / 'SmolLM2-135M-Instruct.Q4_1.gguf'

# Of the logits' standard deviation.
TOLERANCE = 1e-3


class Random:
  """The tensors of a random family."""

  def __init__(self, config):
    self.where, self.shapes = 'random', load.tensor_shapes(config)

  def label(self, name):
    return name

  def read(self, name, rows):
    return families.weight(name, self.shapes[name])[rows]


def check(got, golden):
  want = golden['steps'] * golden['step']
  got = np.asarray(got)[np.ix_(golden['rows'], golden['columns'])]
  worst = np.abs(got - want).max() / golden['std']
  print(f'{worst:.2e} of the standard deviation; {golden["versions"]}')
  assert worst < TOLERANCE


@pytest.mark.parametrize('name', sorted(families.FAMILIES))
def test_random_family(name):
  raw = families.FAMILIES[name]
  config = hf.parse_config(raw, name)
  weights = load.fill(Random(config), config)
  tokens = jnp.asarray(families.tokens(name, raw))[None]
  run = jax.jit(functools.partial(transformer.forward, config=config))
  check(run(weights, tokens)[0], np.load(GOLDEN / f'{name}.npz'))


def test_golden_files_are_small():
  files = list(GOLDEN.glob('*.npz'))
  assert len(files) == len(families.FAMILIES) + 1
  assert sum(file.stat().st_size for file in files) < 2**20


@pytest.fixture(scope='module')
def smollm2():
  if not MODEL.is_file():
    pytest.skip(f'{MODEL.relative_to(ROOT)} is missing: make demo gets it')
  return load.load(MODEL, 'float32')


def test_smollm2_tokens(smollm2):
  golden = np.load(GOLDEN / 'smollm2_135m_q4_1.npz')
  text = (ROOT / 'LICENSE').read_text('utf-8')
  tokens = smollm2.tokenizer.encode(text)[: len(golden['tokens'])]
  assert tokens == golden['tokens'].tolist()


def test_smollm2_logits_and_greedy_text(smollm2):
  """One pass over prompt and continuation shows both.

  If each of the 64 tokens is the likeliest after those before it, greedy
  decoding gives exactly these.
  """
  golden = np.load(GOLDEN / 'smollm2_135m_q4_1.npz')
  prompt, new = golden['tokens'], golden['greedy']
  tokens = jnp.asarray(np.concatenate([prompt, new]))[None]
  config, attend = smollm2.config, transformer.dense_attention(smollm2.config)

  @jax.jit
  def layer(weights, x):
    q, k, v = transformer.attention_inputs(weights, x, config)
    return transformer.layer_output(weights, x, attend(q, k, v, 0), config)

  x = transformer.embed(smollm2.weights.embed, tokens, config)
  for state in smollm2.weights.layers:
    x = layer(state, x)
  out = transformer.logits(smollm2.weights, x, config)[0]
  check(out[: len(prompt)], golden)
  best = np.asarray(jnp.argmax(out[len(prompt) - 1 : -1], axis=-1))
  assert best.tolist() == new.tolist()
