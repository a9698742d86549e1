"""Weights come back from orbax as they went."""

import os
import pathlib
import signal
import subprocess
import sys

import chex
import jax
import pytest

from lcx import sharding
from lcx.models import checkpoint, transformer
from lcx.models.config import RopeConfig
from lcx.models.presets import preset

TINY = preset(
  'tiny',
  dtype='bfloat16',
  tie_embeddings=False,
  rope=RopeConfig(kind='table', table=(1.0,) * 8),
)


def test_save_restore_and_spread(tmp_path):
  weights = transformer.init(TINY, jax.random.key(0))
  checkpoint.save(tmp_path / 'a', TINY, weights)
  checkpoint.save(tmp_path / 'a', TINY, weights)  # replaces
  config, again = checkpoint.restore(tmp_path / 'a')
  assert config == TINY
  chex.assert_trees_all_equal(again, weights)
  mesh = sharding.make_mesh(model=2)
  _, spread = checkpoint.restore(tmp_path / 'a', mesh)
  chex.assert_trees_all_equal(spread, weights)
  assert spread.layers[0]['down'].sharding.spec == sharding.spec('embed', 'ff')


def test_a_checkpoint_that_is_not_whole(tmp_path):
  checkpoint.save(tmp_path, TINY, transformer.init(TINY, jax.random.key(0)))
  file = tmp_path / 'model.json'
  text = file.read_text()
  file.write_text(text.replace('"d_model": 64', '"d_model": 32'))
  with pytest.raises(ValueError, match='do not fit the config'):
    checkpoint.restore(tmp_path)
  file.write_text(text[:50])
  with pytest.raises(ValueError, match='is damaged'):
    checkpoint.restore(tmp_path)
  file.unlink()
  with pytest.raises(ValueError, match='holds no whole checkpoint'):
    checkpoint.restore(tmp_path)


def test_cut_weights_are_refused(tmp_path):
  checkpoint.save(tmp_path, TINY, transformer.init(TINY, jax.random.key(0)))
  for file in tmp_path.glob('weights-*/**/*'):
    if file.is_file() and file.stat().st_size > 4096:
      os.truncate(file, 2048)
  with pytest.raises(ValueError, match='missing, damaged or do not fit'):
    checkpoint.restore(tmp_path)


_KILL = """
import os, signal, sys
import jax
from lcx.models import checkpoint, transformer
from tests.models.test_checkpoint import TINY

checkpoint.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save(sys.argv[1], TINY, transformer.init(TINY, jax.random.key(1)))
"""


def test_a_kill_during_a_save_leaves_the_checkpoint_before_it(tmp_path):
  weights = transformer.init(TINY, jax.random.key(0))
  checkpoint.save(tmp_path, TINY, weights)
  root = pathlib.Path(__file__).parent.parent.parent
  done = subprocess.run(
    [sys.executable, '-c', _KILL, str(tmp_path)],
    cwd=root,
    env=os.environ | {'PYTHONPATH': str(root)},
    capture_output=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == -signal.SIGKILL, done.stderr[-500:]
  assert len(list(tmp_path.glob('weights-*'))) == 2
  _, again = checkpoint.restore(tmp_path)
  chex.assert_trees_all_equal(again, weights)
  checkpoint.save(tmp_path, TINY, weights)
  assert len(list(tmp_path.glob('weights-*'))) == 1
