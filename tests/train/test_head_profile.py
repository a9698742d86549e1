"""Gates are pulled down, held up where distance counts, and resume exactly."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx import head_profile as profiles
from lcx import sharding
from lcx.models import transformer
from lcx.models.presets import PRESETS
from lcx.train import head_profile
from lcx.train.checkpoint import Checkpoints
from lcx.train.head_profile import GateTrainer, Recipe
from lcx.train.passkeys import Passkeys, Writer

CONFIG = dataclasses.replace(PRESETS['tiny'], dtype='float32')
RECIPE = Recipe(steps=6, rate=0.1, sink=4, recent=16)
STYLE = Passkeys(lengths=(384,), passkeys=2, words=3)
MESH = sharding.make_mesh()
RESULTS = pathlib.Path(__file__).parents[2] / 'experiments' / 'results'


def encode(text):
  return list(text.encode())


def writer(style=STYLE, seed=0):
  hay = np.random.default_rng(1).integers(97, 123, 300)
  return Writer(hay, encode, style, seed, opening=(1,))


@functools.cache
def weights():
  return transformer.init(CONFIG, jax.random.key(0))


def trainer(**fields):
  recipe = dataclasses.replace(RECIPE, **fields)
  return GateTrainer(CONFIG, weights(), 'ab', writer(), recipe, MESH)


def test_a_document_holds_what_it_asks_for():
  tokens, answer = writer().document(3)
  assert tokens.shape == answer.shape == (384,) and tokens[0] == 1
  text = bytes(tokens[1:].astype(np.uint8)).decode()
  answers = ''.join(
    chr(t) if a else '|' for t, a in zip(tokens[1:], answer[1:])
  )
  found = [part for part in answers.split('|') if part]
  assert len(found) == 2
  for name, key in zip(('first', 'second'), found):
    assert f'Remember this: the {name} passkey is:{key}' in text
    assert f'What is the {name} passkey?\nAnswer: The passkey is:{key}' in text
  again = writer().document(3)
  assert np.array_equal(again[0], tokens)
  assert not np.array_equal(writer().document(4)[0], tokens)
  assert not np.array_equal(writer(seed=1).document(3)[0], tokens)


def test_bad_documents_and_recipes_are_refused():
  with pytest.raises(ValueError, match='cannot hold 2 passkeys'):
    writer(dataclasses.replace(STYLE, lengths=(100,))).document(0)
  with pytest.raises(ValueError, match='haystack is empty'):
    Writer(np.zeros(0), encode, STYLE)
  with pytest.raises(ValueError, match='passkeys=0'):
    Passkeys(passkeys=0)
  with pytest.raises(ValueError, match='see no key'):
    Recipe(recent=0)


def test_the_rate_rises_stays_and_falls():
  recipe = Recipe(steps=100, rate=0.02)
  rates = np.asarray([recipe.schedule(i) for i in range(100)])
  assert rates[0] == pytest.approx(0.002) == rates[-1]
  assert np.all(rates[20:80] == pytest.approx(0.02))
  assert np.all(np.diff(rates[:20]) >= 0) and np.all(np.diff(rates[80:]) <= 0)


def test_the_loss_is_what_the_module_says():
  """Against plain attention with masks; its gradient, numerically."""
  tokens, answer = (x[None] for x in writer().document(0))
  gates = jnp.asarray([[0.9, 0.2], [0.0, 0.6]], jnp.float32)
  stacked = head_profile.stack(weights(), CONFIG)

  @jax.jit
  def loss(gates, recipe=RECIPE):
    return head_profile.losses(
      gates, stacked, tokens, answer, CONFIG, MESH, recipe
    )

  at = np.arange(384)
  rope = transformer.make_rope(CONFIG)
  causal = at <= at[:, None]
  near = causal & ((at < 4) | (at > at[:, None] - 16))

  @jax.jit
  def forward(gates):
    x = transformer.embed(weights().embed, tokens, CONFIG)
    for layer, gate in zip(weights().layers, gates):
      q, k, v = transformer.attention_inputs(layer, x, CONFIG)
      q, k = rope(q, at[None]), rope(k, at[None])
      k, v = (jnp.repeat(y, CONFIG.group, axis=2) for y in (k, v))
      score = jnp.einsum('btnh,bsnh->bnts', q, k) * CONFIG.head_dim**-0.5
      full, some = (
        jnp.einsum(
          'bnts,bsnh->btnh',
          jax.nn.softmax(jnp.where(mask, score, -jnp.inf)),
          v,
        )
        for mask in (causal, near)
      )
      gate = jnp.repeat(gate, CONFIG.group)[:, None]
      out = gate * full + (1 - gate) * some
      x = transformer.layer_output(layer, x, out, CONFIG)
    head = weights().head
    return transformer.rms_norm(x, head['norm'], CONFIG.norm_eps)

  error = np.mean((forward(jnp.ones((2, 2))) - forward(gates)) ** 2, axis=-1)
  want = np.mean(error[answer])
  total, parts = loss(gates)
  assert float(parts['distill']) == pytest.approx(float(want), rel=1e-3)
  assert float(total) == pytest.approx(float(want) + 0.05 * 0.425, rel=1e-4)
  assert float(loss(jnp.ones((2, 2)))[1]['distill']) < 1e-9
  slope = jax.jit(jax.grad(lambda g: loss(g)[0]))(gates)
  for index in ((0, 1), (1, 1)):
    up, down = (loss(gates.at[index].add(sign * 0.02))[0] for sign in (1, -1))
    numeric = float(up - down) / 0.04
    assert float(slope[index]) == pytest.approx(numeric, rel=0.05, abs=2e-4)


def test_gates_fall_and_a_resumed_run_repeats_them_exactly(tmp_path):
  whole = trainer()
  rows = list(whole.run(99))
  assert [row['step'] for row in rows] == list(range(6))
  assert rows[-1]['gate'] < rows[0]['gate'] <= 1.0
  assert all(0 <= g <= 1 for row in whole.gates for g in row)

  first = trainer()
  before = list(first.run(2))
  store = Checkpoints(tmp_path, first.fingerprint)
  first.save(store)
  list(first.run(4))  # steps that the kill takes away
  store.close()
  second = trainer()
  store = Checkpoints(tmp_path, second.fingerprint)
  assert second.restore(store) and second.step == 2
  after = list(second.run(99))
  store.close()
  assert [r['loss'] for r in before + after] == [r['loss'] for r in rows]
  assert second.gates == whole.gates

  other = trainer(weight=0.1)
  store = Checkpoints(tmp_path, other.fingerprint)
  with pytest.raises(ValueError, match='belongs to another config'):
    other.restore(store)
  store.close()


def test_looking_finds_the_mass_far_away():
  gates = head_profile.distant_mass(
    CONFIG, weights(), writer(), RECIPE, documents=1, queries=8
  )
  assert np.shape(gates) == (2, 2)
  # Random keys: nearly uniform attention over some 370 tokens, 20 of them near.
  assert all(0.7 < g < 1 for row in gates for g in row)
  wide = dataclasses.replace(RECIPE, recent=384)
  found = head_profile.distant_mass(
    CONFIG, weights(), writer(), wide, documents=1, queries=8
  )
  assert all(g == 0 for row in found for g in row)


@pytest.mark.parametrize('name', ['qwen_0_5b', 'qwen_0_5b_untrained'])
def test_committed_profiles_are_of_their_model(name):
  path = RESULTS / f'head_profile_{name}.json'
  found = profiles.load(str(path))
  assert np.shape(found.gates) == (24, 2)
  assert found.model == 'qwen2.5-coder-0.5b-instruct'
  source = 'distant_mass' if name.endswith('untrained') else 'train'
  assert found.recipe['source'] == source
  # Half of them stream, over all layers or in each.
  assert np.sum(found.streaming(0.5)) == 24
  assert np.all(np.sum(found.streaming(0.5, balanced=True), axis=1) == 1)
