"""Retaining heads: labels, loss, resuming, and their use by APB."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx import methods
from lcx.engine import Engine
from lcx.head_profile import fingerprint
from lcx.methods.base import Prompt
from lcx.models import transformer
from lcx.models.presets import PRESETS
from lcx.select import retaining_head as heads_file
from lcx.train import retaining_head
from lcx.train.checkpoint import Checkpoints
from lcx.train.passkeys import Passkeys, Writer
from lcx.train.retaining_head import HeadTrainer, Recipe

CONFIG = dataclasses.replace(PRESETS['tiny'], dtype='float32')
RECIPE = Recipe(steps=6, rate=5e-3, warmup=2, width=16)


def trainer(**fields):
  hay = np.random.default_rng(1).integers(97, 123, 300)
  style = Passkeys(lengths=(384,), passkeys=2, words=3)
  writer = Writer(hay, lambda text: list(text.encode()), style, 0, (1,))
  weights = transformer.init(CONFIG, jax.random.key(0))
  recipe = dataclasses.replace(RECIPE, **fields)
  return HeadTrainer(CONFIG, weights, 'ab', writer, recipe)


def test_labels_are_the_best_score_of_an_answer():
  draw = np.random.default_rng(0)
  q, k = draw.normal(size=(200, 4, 8)), draw.normal(size=(200, 2, 8))
  answer = np.zeros(200, bool)
  answer[30:60] = answer[90:160] = True  # more than one chunk
  got = jax.jit(retaining_head.labels)(
    *(jnp.asarray(x, jnp.float32) for x in (q, k)), answer
  )
  scores = np.einsum('mkgh,tkh->mkgt', q[answer].reshape(-1, 2, 2, 8), k)
  want = scores.max(axis=(0, 2)).T * 8**-0.5
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_loss_is_what_the_module_says():
  draw = np.random.default_rng(0)
  q, k, v, label = (
    draw.normal(size=shape)
    for shape in ((50, 4, 16), (50, 2, 16), (50, 2, 16), (50, 2))
  )
  heads = jax.tree.map(
    lambda x: x[0], heads_file.init(CONFIG, 16, jax.random.key(0))
  )
  prompt = np.arange(50) < 40
  total, fit = jax.jit(retaining_head.layer_loss)(
    heads,
    *(jnp.asarray(x, jnp.float32) for x in (q, k, v, label)),
    prompt,
    0.5,
  )
  joint = np.concatenate(
    [q.reshape(50, 2, 2, 16), k[:, :, None], v[:, :, None]], axis=2
  )
  hidden = np.einsum('tkch,kchw->tw', joint, heads['first'])
  score = (hidden / (1 + np.exp(-hidden))) @ np.asarray(heads['second'])
  error = (score - label)[:40]
  size = np.abs(error)
  want = np.mean(np.where(size < 1, 0.5 * error**2, size - 0.5))
  assert float(fit) == pytest.approx(want, rel=1e-4)
  step = np.mean(np.diff(score[:40], axis=0) ** 2)
  assert float(total - fit) == pytest.approx(0.5 * step, rel=1e-4)


@pytest.mark.long
def test_loss_falls_and_a_resumed_run_repeats_it_exactly(tmp_path):
  whole = trainer()
  rows = list(whole.run(99))
  assert rows[-1]['fit'] < 0.9 * rows[0]['fit']
  first = trainer()
  before = list(first.run(2))
  store = Checkpoints(tmp_path, first.fingerprint)
  first.save(store)
  store.close()
  second = trainer()
  store = Checkpoints(tmp_path, second.fingerprint)
  assert second.restore(store) and second.step == 2
  after = list(second.run(99))
  store.close()
  assert [r['loss'] for r in before + after] == [r['loss'] for r in rows]
  other = trainer(smooth=0.1)
  store = Checkpoints(tmp_path, other.fingerprint)
  with pytest.raises(ValueError, match='belongs to another config'):
    other.restore(store)
  store.close()


@pytest.fixture
def path(tmp_path):
  arrays = heads_file.init(CONFIG, 16, jax.random.key(3))
  about = {'architecture': fingerprint(CONFIG), 'sha256': 'ab', 'model': 'x'}
  found = heads_file.RetainingHeads(
    {n: np.asarray(x) for n, x in arrays.items()}, about
  )
  path = tmp_path / 'heads.safetensors'
  path.write_bytes(found.to_bytes())
  return str(path)


def answer(path, mesh=None, **fields):
  method = methods.get_method(
    'apb', **{'compressor': 'retaining_head', 'heads': path} | fields
  )
  engine = Engine(
    CONFIG,
    transformer.init(CONFIG, jax.random.key(0)),
    method,
    capacity=1024,
    mesh=mesh,
  )
  draw = np.random.default_rng(0)
  context = draw.integers(0, 256, 900).astype(np.int32)
  prompt = Prompt(context[:4], context, (context[5:14],))
  return np.asarray(engine.prefill([prompt], 0).scores)


@pytest.mark.long
@pytest.mark.mesh
def test_apb_passes_what_the_heads_choose_on_any_mesh(path):
  from lcx import sharding

  alone = answer(path)
  spread = answer(path, sharding.make_mesh(1, 2, 2))
  np.testing.assert_allclose(spread, alone, rtol=2e-3, atol=2e-3)
  random = answer(path, compressor='random')
  assert not np.allclose(alone, random, atol=1e-3)


def test_heads_of_another_model_are_refused(path, tmp_path):
  other = CONFIG.replace(n_layers=3)
  with pytest.raises(ValueError, match='of another model'):
    heads_file.load(path).check(other)
  torn = tmp_path / 'torn'
  torn.write_bytes(b'{}')
  with pytest.raises(ValueError, match='holds no retaining heads'):
    heads_file.load(str(torn))
  with pytest.raises(ValueError, match=r'warmup=6 must be below'):
    Recipe(steps=6, warmup=6)
