"""Import of Hugging Face folders and GGUF files, good ones and bad ones."""

import json
import pathlib
import shutil

import chex
import gguf as gguf_package
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lcx import sharding
from lcx.models import load, transformer
from lcx.models.config import RopeConfig
from lcx.models.gguf import read_header
from tests.models import model_files as files


def test_folder_in_shards_and_gguf_are_the_same_model(tmp_path, gguf_file):
  folder = files.write_folder(tmp_path / 'a', files.raw_config(), shards=3)
  ours, theirs = load.load(folder), load.load(gguf_file)
  assert ours.config == theirs.config
  chex.assert_trees_all_equal(ours.weights, theirs.weights)
  assert len(ours.sha256) == 64 and ours.sha256 != theirs.sha256
  text = 'the 12 thé\n<|im_start|>x'
  ids = ours.tokenizer.encode(text)
  assert ids == theirs.tokenizer.encode(text)
  for model in (ours, theirs):
    assert model.tokenizer.decode(ids) == text
    assert set(model.tokenizer.eos_ids) == {0, 2}


@pytest.mark.parametrize('family', ['qwen2', 'qwen3'])
def test_gguf_of_a_family(tmp_path, family):
  raw = files.raw_config(family, sliding_window=None)
  path = files.write_gguf(tmp_path / 'm.gguf', raw)
  model = load.load(path)
  again = load.load(files.write_folder(tmp_path / 'a', raw))
  assert model.config == again.config
  chex.assert_trees_all_equal(model.weights, again.weights)


@pytest.mark.parametrize(
  'kind', ['F16', 'BF16', 'Q4_0', 'Q4_1', 'Q5_0', 'Q8_0']
)
def test_quantisations(tmp_path, kind, folder):
  path = files.write_gguf(tmp_path / 'm.gguf', files.raw_config(), kind)
  want, got = load.load(folder).weights, load.load(path).weights
  # A block of 32 values in [-a, a] has steps of a / 8 (Q4) and finer.
  limit = {'4': 0.2, '5': 0.1, '8': 0.01, 'F': 0.01}[
    kind[1] if kind[0] == 'Q' else 'F'
  ]
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    assert np.abs(a - b).max() <= limit * np.abs(b).max()


@pytest.mark.mesh
@pytest.mark.parametrize('kind', ['hf', 'gguf'])
def test_each_shard_is_read_where_it_lives(kind, folder, gguf_file, tmp_path):
  raw = files.raw_config('qwen2')
  if kind == 'hf':
    path = files.write_folder(tmp_path / 'a', raw)
  else:
    path = files.write_gguf(tmp_path / 'm.gguf', raw)
  mesh = sharding.make_mesh(data=2, seq=2, model=2)
  one, spread = load.load(path), load.load(path, mesh=mesh)
  chex.assert_trees_all_equal(one.weights, spread.weights)
  qkv = spread.weights.layers[0]['qkv']
  assert qkv.sharding.spec == sharding.spec(
    'kv_heads', None, 'head_dim', 'embed'
  )
  assert qkv.addressable_shards[0].data.shape == (1, 4, 16, 64)
  tokens = jnp.arange(32).reshape(2, 16)
  run = jax.jit(lambda w: transformer.forward(w, tokens, one.config))
  chex.assert_trees_all_close(
    run(one.weights), run(spread.weights), rtol=1e-4, atol=1e-5
  )


def test_dtype(folder):
  model = load.load(folder, 'bfloat16')
  assert model.config.dtype == 'bfloat16'
  assert {a.dtype.name for a in jax.tree.leaves(model.weights)} == {'bfloat16'}


def test_tied_table_stored_twice(tmp_path):
  raw = files.raw_config('smollm2')
  folder = files.write_folder(tmp_path / 'a', raw)
  file = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
  safetensors.numpy.save_file(tensors, file)
  assert load.load(folder).weights.head.keys() == {'norm'}
  tensors['lm_head.weight'][3, 3] += 1
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(ValueError, match='set tie_word_embeddings to false'):
    load.load(folder)


def test_rope_of_gguf(tmp_path):
  more = {
    'llama.rope.scaling.type': 'yarn',
    'llama.rope.scaling.original_context_length': 64,
  }
  path = files.write_gguf(tmp_path / 'm.gguf', files.raw_config(), more=more)
  config = load.gguf.open_file(path).config
  assert config.rope == RopeConfig(500000.0, 'yarn', 1.0, original_max=64)


def one_line(error) -> str:
  """A message for a user: one line, and says what to do."""
  text = str(error.value)
  assert '\n' not in text and len(text) < 700, text
  return text


# A change of a good folder, and what the message must say.
def _config(**changes):
  def change(path):
    raw = json.loads((path / 'config.json').read_text())
    (path / 'config.json').write_text(json.dumps({**raw, **changes}))

  return change


def _bytes(name, edit):
  def change(path):
    data = bytearray((path / name).read_bytes())
    (path / name).write_bytes(edit(data))

  return change


def _flip(at):
  def edit(data):
    data[at] ^= 0x55
    return data

  return edit


def _tensors(edit):
  def change(path):
    tensors = safetensors.numpy.load_file(path / 'model.safetensors')
    edit(tensors)
    safetensors.numpy.save_file(tensors, path / 'model.safetensors')

  return change


def _pickled(path):
  (path / 'model.safetensors').rename(path / 'pytorch_model.bin')


WEIGHTS = 'model.safetensors'
BROKEN_FOLDERS = {
  'no config': (lambda p: (p / 'config.json').unlink(), 'config.json'),
  'config cut': (_bytes('config.json', lambda d: d[:40]), 'not JSON'),
  'architecture': (_config(architectures=['GPT2LMHeadModel']), 'GPT2LMHead'),
  'activation': (_config(hidden_act='gelu'), "hidden_act='gelu'"),
  'rope kind': (_config(rope_scaling={'type': 'longrope'}), 'longrope'),
  'mixed windows': (
    _config(
      architectures=['Qwen2ForCausalLM'],
      layer_types=['full_attention', 'sliding_attention'],
      sliding_window=8,
    ),
    'use_sliding_window',
  ),
  'field missing': (_config(hidden_size=None), 'config.json'),
  'field of a wrong type': (_config(vocab_size='many'), 'config.json'),
  'heads': (_config(num_key_value_heads=3), 'must divide'),
  'no tokenizer': (lambda p: (p / 'tokenizer.json').unlink(), 'tokenizer.json'),
  'tokenizer cut': (_bytes('tokenizer.json', lambda d: d[:99]), 'damaged'),
  'another tokenizer': (_config(vocab_size=16), 'not of one model'),
  'no weights': (lambda p: (p / WEIGHTS).unlink(), 'lacks model.safetensors'),
  'pickled weights': (_pickled, 'convert them to safetensors'),
  'weights cut': (_bytes(WEIGHTS, lambda d: d[:9000]), 'cut or damaged'),
  'header length': (_bytes(WEIGHTS, _flip(2)), 'cut or damaged'),
  'header byte': (_bytes(WEIGHTS, _flip(8)), 'cut or damaged'),
  'tensor missing': (
    _tensors(lambda t: t.pop('model.layers.0.mlp.up_proj.weight')),
    'lacks model.layers.0.mlp.up_proj.weight',
  ),
  'tensor left over': (
    _tensors(lambda t: t.update(extra=np.zeros(3, np.float32))),
    'has extra, unused',
  ),
  'another shape': (_config(intermediate_size=96), '(160, 64), the config'),
  'more layers': (_config(num_hidden_layers=3), '(18 tensors)'),
  'far more': (_config(num_hidden_layers=10**9), 'only 12 tensors'),
}  # fmt: skip


@pytest.mark.parametrize('what', sorted(BROKEN_FOLDERS))
def test_broken_folder(what, folder, tmp_path):
  change, said = BROKEN_FOLDERS[what]
  path = pathlib.Path(shutil.copytree(folder, tmp_path / 'm'))
  change(path)
  with pytest.raises(ValueError) as error:
    load.load(path)
  assert said in one_line(error)


def test_no_model_there(tmp_path):
  with pytest.raises(ValueError, match='does not exist'):
    load.load(tmp_path / 'nothing')


def test_gguf_cut_anywhere(gguf_file, tmp_path):
  data, path = gguf_file.read_bytes(), tmp_path / 'm.gguf'
  sizes = [0, 3, 4, 7, 20, 60, 200, 4000, len(data) // 2, len(data) - 40]
  for size in sizes:
    path.write_bytes(data[:size])
    with pytest.raises(ValueError) as error:
      load.load(path)
    assert str(path) in one_line(error)


def test_gguf_flipped_header_byte(gguf_file):
  """Whatever byte is flipped: refused in one line, or harmless, never worse."""
  data = bytearray(gguf_file.read_bytes())
  _, tensors = read_header(memoryview(bytes(data)), 'test')
  header = min(t.start for t in tensors.values())
  rng = np.random.default_rng(0)
  refused = 0
  for at in [*range(24), *rng.integers(24, header, 400)]:
    data[at] ^= 1 << rng.integers(8)
    try:
      fields, tensors = read_header(memoryview(data), 'test')
      shapes = {load.gguf._hf_name(n): t.shape for n, t in tensors.items()}
      load.gguf.parse_config(fields, shapes, (), 'test', None)
      load.gguf.from_gguf(fields, 'test')
    except ValueError as e:
      assert '\n' not in str(e)
      refused += 1
    data = bytearray(gguf_file.read_bytes())
  print(f'{refused} of 424 flips refused')
  assert refused > 100


def test_gguf_that_is_not_supported(tmp_path):
  raw = files.raw_config()
  cases = {
    'is unknown; known': {'pre': 'klingon'},
    'are unknown': {'more': {'llama.rope.scaling.new': 2}},
    'mixtures of experts': {'more': {'llama.expert_count': 8}},
    "rope scaling 'longrope'": {
      'more': {'llama.rope.scaling.type': 'longrope'}
    },
  }
  for i, (said, options) in enumerate(cases.items()):
    path = files.write_gguf(tmp_path / f'{i}.gguf', raw, **options)
    with pytest.raises(ValueError) as error:
      load.load(path)
    assert said in one_line(error)
  writer = gguf_package.GGUFWriter(tmp_path / 'g.gguf', 'gemma')
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  with pytest.raises(ValueError, match="'gemma' is not supported"):
    load.load(tmp_path / 'g.gguf')
