"""Heads of a small model in the shape of a larger one keep their scores."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models, real_heads
from lcx.models import transformer
from lcx.tasks.haystacks import default_text

SPEC = 'preset:tiny'


def own(tokens):
  """Rotated (q, k) of each layer of the model, by its forward pass."""
  model = models.load(models.find(SPEC, 0), 'bfloat16')
  ids = np.asarray(model.tokenizer.encode(default_text()), np.int32)[:tokens]
  dense = transformer.dense_attention(model.config)
  rope = transformer.make_rope(model.config)
  at = jnp.arange(tokens)[None]
  found = []

  def attention(q, k, v, layer):
    found.append((rope(q, at), rope(k, at)))
    return dense(q, k, v, layer)

  transformer.forward(model.weights, ids[None], model.config, attention)
  return model.config, found


def test_scores_are_the_model_s_own():
  config, layers = own(96)
  kv, dim = 2, 2 * config.head_dim
  q, k, v = real_heads.read(
    SPEC, 96, heads=kv * config.group, kv_heads=kv, head_dim=dim
  )
  chex.assert_shape(q, (1, 96, kv * config.group, dim))
  chex.assert_shape((k, v), (1, kv, 96, dim))
  # The first head of the first layer and the last one of the last.
  for head, (layer, at) in enumerate(((0, 0), (-1, -1))):
    theirs_q, theirs_k = layers[layer]
    theirs_q = theirs_q.reshape(1, 96, config.n_kv_heads, config.group, -1)
    want = jnp.einsum(
      'tgh,sh->gts',
      theirs_q[0, :, at].astype(jnp.float32),
      theirs_k[0, :, at].astype(jnp.float32),
    )
    mine = q[0].reshape(96, kv, config.group, dim)[:, head]
    got = jnp.einsum(
      'tgh,sh->gts', mine.astype(jnp.float32), k[0, head].astype(jnp.float32)
    )
    got, want = got * dim**-0.5, want * config.head_dim**-0.5
    scale = float(jnp.max(jnp.abs(want)))
    chex.assert_trees_all_close(got, want, atol=0.02 * scale, rtol=0)


@pytest.mark.parametrize(
  'shape, match',
  (
    ({'head_dim': 1}, 'do not fit'),
    ({'heads': 3}, 'no multiple'),
    ({'heads': 1000, 'kv_heads': 1000}, 'fewer than'),
    ({'text': 'a few words'}, 'are read at once'),
  ),
)
def test_what_cannot_be_is_refused(shape, match, tmp_path):
  asked = {'tokens': 99, 'heads': 2, 'kv_heads': 2, 'head_dim': 64} | shape
  if 'text' in asked:
    path = tmp_path / 'text'
    path.write_text(asked['text'])
    asked['text'] = str(path)
  with pytest.raises(ValueError, match=match):
    real_heads.read(SPEC, asked.pop('tokens'), **asked)
