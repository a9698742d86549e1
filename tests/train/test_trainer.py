"""Training learns, resumes exactly, survives a kill, and splits over a mesh."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from lcx.models import transformer
from lcx.train import export, mixture, model, optimizer
from tests.train import tiny

ROOT = pathlib.Path(__file__).parent.parent.parent


def losses(rows):
  return [row['loss'] for row in rows]


@pytest.fixture(scope='module')
def straight():
  run = tiny.make()
  return tiny.rows(run, 8), run


def test_a_resumed_run_repeats_the_curve_exactly(tmp_path, straight):
  rows, whole = straight
  first = tiny.make()
  before = tiny.rows(first, 3)
  store = tiny.saves(tmp_path, first)
  first.save(store)
  tiny.rows(first, 5)  # steps that the kill takes away
  store.close()

  second = tiny.make()
  store = tiny.saves(tmp_path, second)
  assert second.restore(store)
  assert second.step == 3
  after = tiny.rows(second, 8)
  store.close()
  assert losses(before) + losses(after) == losses(rows)
  for a, b in zip(
    jax.tree.leaves(second.state), jax.tree.leaves(whole.state), strict=True
  ):
    assert np.array_equal(a, b)


def test_metrics_say_what_was_done(straight):
  rows, _ = straight
  assert [row['step'] for row in rows] == list(range(8))
  assert {row['length'] for row in rows} == {64, 128}
  assert all(row['tokens'] == 256 and row['flops'] > 0 for row in rows)


def test_a_kill_during_a_save_leaves_the_checkpoint_before_it(tmp_path):
  done = subprocess.run(
    [sys.executable, 'tests/train/tiny.py', str(tmp_path)],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == -signal.SIGKILL, done.stderr[-500:]
  left = sorted(path.name for path in tmp_path.iterdir())
  assert '1' in left and '2' not in left
  assert len(left) == 2  # and what the kill left behind
  run = tiny.make()
  store = tiny.saves(tmp_path, run)
  assert run.restore(store)
  assert run.step == 1
  tiny.rows(run, 2)
  run.save(store)
  assert store.latest == 2
  store.close()


def test_another_config_and_a_cut_checkpoint_are_refused(tmp_path):
  run = tiny.make()
  store = tiny.saves(tmp_path, run)
  assert not run.restore(store)
  tiny.rows(run, 1)
  run.save(store)
  store.close()

  other = tiny.make(seed=1)
  store = tiny.saves(tmp_path, other)
  with pytest.raises(ValueError, match='another config'):
    other.restore(store)
  store.close()

  wider = tiny.make(config=tiny.MODEL.replace(d_ff=96))
  wider.fingerprint = run.fingerprint
  store = tiny.saves(tmp_path, wider)
  with pytest.raises(ValueError, match='another shape'):
    wider.restore(store)
  store.close()

  for file in (tmp_path / '1' / 'state').rglob('*'):
    if file.is_file() and file.stat().st_size > 4096:
      os.truncate(file, 2048)
  again = tiny.make()
  store = tiny.saves(tmp_path, again)
  with pytest.raises(ValueError, match='cut'):
    again.restore(store)
  store.close()
  shutil.rmtree(tmp_path)


def test_the_loss_falls_on_one_batch():
  run = tiny.make()
  again = run.mixture.batch(0)
  run.mixture.batch = lambda step: again
  curve = losses(tiny.rows(run, 5))
  assert curve[-1] < curve[0] - 0.1


@pytest.mark.long
@pytest.mark.mesh
def test_a_mesh_and_remat_give_the_same_loss_and_gradient():
  whole = tiny.make()
  split = tiny.make(mesh=(2, 2, 2), remat=True)
  batch = whole.mixture.batch(0)
  data = (batch.tokens, batch.index, batch.weight, batch.kind)
  a, said = whole._gradient(whole.state['params'], *data)
  b, again = split._gradient(split.state['params'], *data)
  np.testing.assert_allclose(said['loss'], again['loss'], rtol=1e-5)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, atol=2e-5)


def test_a_mesh_that_does_not_fit_is_refused():
  stages = [mixture.Stage(128, 3, 1, 8, tiny.MIX)]
  with pytest.raises(ValueError, match='must divide batch=3'):
    tiny.make(stages, mesh=(2, 1, 1))


def test_stacked_layers_are_the_transformer(straight):
  _, run = straight
  tokens = run.mixture.batch(0).tokens

  @jax.jit
  def stacked(params):
    x = model.hidden(params, tokens, tiny.MODEL, run.mesh)
    return model.logits(params, x, tiny.MODEL)

  forward = jax.jit(lambda w: transformer.forward(w, tokens, tiny.MODEL))
  got = stacked(run.state['params'])
  want = forward(run.weights('float32'))
  np.testing.assert_allclose(got, want, atol=2e-4)


def test_flops_count_weights_pairs_and_head():
  config = tiny.MODEL
  weights = 2 * (32 * 16 * 12 + 3 * 32 * 64)
  pairs = 128 * 128 / 2 * 2 * 4 * 4 * 16
  head = 2 * 10 * 32 * 2600
  assert model.flops(config, 128, 10) == 3 * (2 * weights * 128 + pairs + head)


def test_schedule_rises_stays_and_falls():
  factor = optimizer.shape(optimizer.OptimizerConfig(warmup=10, decay=0.5), 100)
  assert [float(factor(i)) for i in (0, 5, 10, 50, 100)] == [0, 0.5, 1, 1, 0]
  assert 0.4 < float(factor(75)) < 0.6


@pytest.mark.parametrize(
  'wrong', [{'rate': 0.0}, {'decay': 0.0}, {'name': 'sgd'}]
)
def test_bad_optimizer_numbers_are_refused(wrong):
  with pytest.raises(ValueError, match='optimizer'):
    optimizer.OptimizerConfig(**wrong)


def test_exported_tensors_are_a_hugging_face_folder(tmp_path, straight):
  import json

  import safetensors.numpy

  from lcx.models.load import load

  _, run = straight
  tensors = export.tensors(run.weights('float32'), tiny.MODEL)
  safetensors.numpy.save_file(tensors, tmp_path / 'model.safetensors')
  (tmp_path / 'tokenizer.json').write_text(
    run.mixture.writer.tokenizer.to_str()
  )
  (tmp_path / 'config.json').write_text(
    json.dumps(export.config_json(tiny.MODEL, 2, 1))
  )
  loaded = load(tmp_path, 'float32')
  assert loaded.tokenizer.eos_ids == (2,)
  for a, b in zip(
    jax.tree.leaves(loaded.weights),
    jax.tree.leaves(run.weights('float32')),
    strict=True,
  ):
    assert np.array_equal(a, b)
