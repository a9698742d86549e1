"""Small model files: a Hugging Face folder and the same model as GGUF."""

import json
import pathlib

import gguf
import numpy as np
import safetensors.numpy
import tokenizers

from lcx.models import hf, load
from tests.golden import families

TEMPLATE = (
  '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>'
  '\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n'
  '{% endif %}'
)
SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']


def byte_vocab() -> list[str]:
  """Special tokens, the 256 bytes, and a few merged pieces."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  return [*SPECIAL, *alphabet, 'th', 'the', 'Ġt', 'Ġthe', '12']


MERGES = ['t h', 'th e', 'Ġ t', 'Ġ the', '1 2']


def raw_config(name='llama3', **changes):
  """One layer of a golden family."""
  return {**families.FAMILIES[name], 'num_hidden_layers': 1, **changes}


def write_folder(path: pathlib.Path, raw: dict, shards: int = 1):
  """A Hugging Face folder with the golden families' weights."""
  path.mkdir(parents=True, exist_ok=True)
  (path / 'config.json').write_text(json.dumps(raw))
  shapes = load.tensor_shapes(hf.parse_config(raw, 'test'))
  tensors = {n: families.weight(n, s) for n, s in shapes.items()}
  if shards == 1:
    safetensors.numpy.save_file(tensors, path / 'model.safetensors')
  else:
    table = {}
    for i in range(shards):
      file = f'model-{i}.safetensors'
      part = dict(list(tensors.items())[i::shards])
      safetensors.numpy.save_file(part, path / file)
      table.update(dict.fromkeys(part, file))
    index = path / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': table}))
  vocab = {t: i for i, t in enumerate(byte_vocab())}
  pairs = [tuple(m.split(' ')) for m in MERGES]
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(SPECIAL)
  backend.save(str(path / 'tokenizer.json'))
  settings = {
    'eos_token': {'content': '<|im_end|>'},
    'bos_token': '<|im_start|>',
    'chat_template': TEMPLATE,
  }
  (path / 'tokenizer_config.json').write_text(json.dumps(settings))
  (path / 'generation_config.json').write_text('{"eos_token_id": [2, 0]}')
  return path


def write_gguf(
  path: pathlib.Path,
  raw: dict,
  kind: str = 'F32',
  pre: str = 'smollm',
  more: dict | None = None,
):
  """The same model as a GGUF file; matrices quantised as `kind`."""
  family = raw['model_type']
  writer = gguf.GGUFWriter(path, family)
  config = hf.parse_config(raw, 'test')
  writer.add_block_count(config.n_layers)
  writer.add_context_length(config.max_position)
  writer.add_embedding_length(config.d_model)
  writer.add_feed_forward_length(config.d_ff)
  writer.add_head_count(config.n_heads)
  writer.add_head_count_kv(config.n_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_rope_freq_base(config.rope.theta)
  writer.add_rope_dimension_count(config.head_dim)
  for key, value in (more or {}).items():
    add = writer.add_string if isinstance(value, str) else writer.add_uint32
    add(key, value)
  vocab = byte_vocab()
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(vocab)
  writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocab) - 3))
  writer.add_token_merges(MERGES)
  writer.add_eos_token_id(2)
  writer.add_bos_token_id(1)
  writer.add_add_bos_token(False)
  writer.add_chat_template(TEMPLATE)
  names = load.gguf._gguf_name
  for name, shape in load.tensor_shapes(config).items():
    value = families.weight(name, shape)
    if family == 'llama' and ('q_proj' in name or 'k_proj' in name):
      # convert_hf_to_gguf.py: pairs (i, i + H/2) become neighbours.
      heads = value.reshape(-1, 2, config.head_dim // 2, *shape[1:])
      value = np.ascontiguousarray(heads.swapaxes(1, 2).reshape(shape))
    if len(shape) == 1 or kind == 'F32':
      writer.add_tensor(names(name), value)
    else:
      dtype = gguf.GGMLQuantizationType[kind]
      packed = gguf.quants.quantize(value, dtype)
      writer.add_tensor(names(name), packed, raw_dtype=dtype)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path
