"""Tokenizers of GGUF metadata, and chat templates in their sandbox."""

import pytest
import tokenizers

from lcx.models import tokenizer
from tests.models import model_files as files


def _fields(pre='smollm', **more):
  vocab = files.byte_vocab()
  kinds = [3] * len(files.SPECIAL) + [1] * (len(vocab) - len(files.SPECIAL))
  fields = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': pre,
    'tokenizer.ggml.tokens': vocab,
    'tokenizer.ggml.token_type': kinds,
    'tokenizer.ggml.merges': files.MERGES,
    'tokenizer.ggml.eos_token_id': 2,
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.chat_template': files.TEMPLATE,
  }
  fields.update({f'tokenizer.ggml.{k}': v for k, v in more.items()})
  return fields


TEXT = "It's the 1234th — naïve  x\n\n\t日本 e\u0301"


@pytest.mark.parametrize('pre', sorted(tokenizer.PRE_TOKENIZERS))
def test_text_comes_back(pre):
  tok = tokenizer.from_gguf(_fields(pre), 'test')
  text = tok.decode(tok.encode(TEXT))
  if tokenizer.PRE_TOKENIZERS[pre][2] is None:
    assert text == TEXT
  else:  # Qwen2 composes letter and accent
    assert text == TEXT.replace('e\u0301', '\u00e9')


def test_digits():
  """smollm and qwen2 take digits alone, gpt-2 in one piece."""
  pieces = {}
  for pre in ('gpt-2', 'smollm', 'qwen2', 'llama-bpe'):
    tok = tokenizer.from_gguf(_fields(pre), 'test')
    split = tok.backend.pre_tokenizer.pre_tokenize_str('a 12345')
    pieces[pre] = [piece for piece, _ in split]
  assert pieces['gpt-2'] == ['a', 'Ġ12345']
  assert pieces['smollm'] == ['a', 'Ġ', '1', '2', '3', '4', '5']
  assert pieces['qwen2'] == ['a', 'Ġ', '1', '2', '3', '4', '5']
  assert pieces['llama-bpe'] == ['a', 'Ġ', '123', '45']


def test_special_tokens_and_first_token():
  plain = tokenizer.from_gguf(_fields(), 'test')
  assert plain.encode('<|im_start|>', add_special=True) == [1]
  first = tokenizer.from_gguf(_fields(add_bos_token=True), 'test')
  assert first.encode('the', add_special=True)[0] == 1
  assert first.encode('the') == plain.encode('the')
  llama3 = tokenizer.from_gguf(_fields('llama-bpe'), 'test')
  assert llama3.encode('the', add_special=True)[0] == 1
  assert plain.eos_ids == (2, 0)
  assert plain.decode([1, 261], skip_special=True) == plain.decode([261])


def test_sentence_piece():
  """Llama 2's kind: spaces as ▁, unknown characters as bytes."""
  tokens = ['<unk>', '<s>', '</s>']
  tokens += [f'<0x{i:02X}>' for i in range(256)]
  tokens += ['▁', 't', 'h', 'e', '▁t', 'th', '▁th', '▁the', 'he']
  kinds = [2, 3, 3] + [6] * 256 + [1] * 9
  scores = [0.0] * 259 + [-9.0, -9.1, -9.2, -9.3, -1.0, -5.0, -2.0, -3.0, -4.0]
  fields = {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': kinds,
    'tokenizer.ggml.scores': scores,
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.eos_token_id': 2,
  }
  tok = tokenizer.from_gguf(fields, 'test')
  ids = tok.encode('the the', add_special=True)
  assert [tokens[i] for i in ids] == ['<s>', '▁the', '▁the']
  ids = tok.encode('thé')
  assert [tokens[i] for i in ids] == ['▁th', '<0xC3>', '<0xA9>']
  assert tok.decode(ids) == 'thé'
  fields['tokenizer.ggml.scores'] = scores[:-1]
  with pytest.raises(ValueError, match='267 scores of 268 tokens'):
    tokenizer.from_gguf(fields, 'test')


def test_damaged_metadata():
  for change, said in (
    ({'pre': 'klingon'}, "pre-tokenizer 'klingon' is unknown"),
    ({'model': 't5'}, "tokenizer model 't5' is not supported"),
    ({'merges': ['th']}, 'is no pair'),
    ({'merges': ['zq x']}, 'the tokenizer is damaged'),
    ({'tokens': ['a', 'a']}, '1 of them distinct'),
    ({'tokens': None}, 'tokenizer.ggml.tokens is missing'),
    ({'token_type': [1]}, '1 token types'),
  ):
    with pytest.raises(ValueError, match=said):
      tokenizer.from_gguf(_fields(**change), 'test')


def _with(template):
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  return tokenizer.Tokenizer(backend, template=template, where='test')


def test_chat():
  tok = tokenizer.from_gguf(_fields(), 'test')
  messages = [{'role': 'user', 'content': 'hi'}]
  turn = '<|im_start|>user\nhi<|im_end|>\n'
  assert tok.chat(messages) == turn + '<|im_start|>assistant\n'
  assert tok.chat(messages, add_generation_prompt=False) == turn
  assert tok.encode(turn)[0] == 1


@pytest.mark.parametrize(
  'template',
  [
    '{{ messages.__class__.__mro__ }}',
    '{{ messages.append(1) }}',
    '{{ "".join.__globals__.os }}',
    '{% for i in range(10**8) %}{% endfor %}',
    '{{ raise_exception("roles must alternate") }}',
    '{{ messages[0].nothing.more }}',
    '{% if %}',
    '{{ 1 / 0 }}',
  ],
)
def test_templates_that_fail_or_attack(template):
  with pytest.raises(ValueError, match='the chat template failed'):
    _with(template).chat([{'role': 'user', 'content': 'hi'}])


def test_no_template():
  with pytest.raises(ValueError, match='has no chat template'):
    _with(None).chat([])
