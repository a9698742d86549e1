"""Text to tokens and back, and chat templates.

The work is done by the `tokenizers` package: from a folder's tokenizer.json,
or assembled from a GGUF file's metadata by a table of pre-tokenizers. A name
that the table lacks is refused: a wrong split gives wrong tokens silently.
"""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers
from tokenizers import (
  AddedToken,
  Regex,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

_LOG = logging.getLogger(__name__)

# GPT-4's split (tiktoken's cl100k_base); Qwen2 takes digits one at a time,
# Llama 3 up to three. As in the models' tokenizer.json.
_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def _gpt2():
  return [pre_tokenizers.ByteLevel(add_prefix_space=False)]


def _smollm():
  return [pre_tokenizers.Digits(individual_digits=True), *_gpt2()]


def _split(digits):
  return [
    pre_tokenizers.Split(Regex(_SPLIT % digits), 'isolated'),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ]


# tokenizer.ggml.pre -> (parts, options of the BPE model, normalizer).
PRE_TOKENIZERS: dict[str, tuple[Any, dict, Any]] = {
  'gpt-2': (_gpt2, {}, None),
  'smollm': (_smollm, {}, None),
  'qwen2': (lambda: _split(''), {}, normalizers.NFC),
  'deepseek-r1-qwen': (lambda: _split(''), {}, normalizers.NFC),
  'llama-bpe': (lambda: _split('{1,3}'), {'ignore_merges': True}, None),
  'llama3': (lambda: _split('{1,3}'), {'ignore_merges': True}, None),
  'llama-v3': (lambda: _split('{1,3}'), {'ignore_merges': True}, None),
}

# Ends of a turn or a text, where metadata name only one of them (llama.cpp
# treats them so, too).
_END_TOKENS = ('<|im_end|>', '<|eot_id|>', '<|endoftext|>', '<|end_of_text|>')

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A model's tokenizer.

  Attributes:
    backend: of the `tokenizers` package.
    eos_ids: tokens that end a text or a turn.
    bos_token, eos_token: what chat templates call by these names.
    template: the chat template (jinja2), or None.
    where: the file, for messages.
  """

  backend: tokenizers.Tokenizer
  eos_ids: tuple[int, ...] = ()
  bos_token: str = ''
  eos_token: str = ''
  template: str | None = None
  where: str = ''

  @property
  def vocab_size(self) -> int:
    """One more than the highest token."""
    return self.backend.get_vocab_size(with_added_tokens=True)

  def encode(self, text: str, add_special: bool = False) -> list[int]:
    """Tokens of a text; names of special tokens in it become these tokens.

    Args:
      text: any.
      add_special: puts what the model expects around a text, such as its
        first token.
    """
    return self.backend.encode(text, add_special_tokens=add_special).ids

  def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
    """The text of tokens."""
    ids = [int(i) for i in ids]
    return self.backend.decode(ids, skip_special_tokens=skip_special)

  def chat(
    self,
    messages: Sequence[dict[str, str]],
    add_generation_prompt: bool = True,
    **variables,
  ) -> str:
    """A conversation as the text that the model was trained on.

    Args:
      messages: [{'role': 'user', 'content': '...'}, ...].
      add_generation_prompt: ends with the start of the assistant's turn.
      **variables: more names for the template.

    Raises:
      ValueError: the model has no chat template, or it fails or refuses.
    """
    if self.template is None:
      raise ValueError(
        f'{self.where}: the model has no chat template; give plain text'
      )
    try:
      return (
        _environment()
        .from_string(self.template)
        .render(
          messages=list(messages),
          add_generation_prompt=add_generation_prompt,
          bos_token=self.bos_token,
          eos_token=self.eos_token,
          **variables,
        )
      )
    except (jinja2.TemplateError, TypeError, ArithmeticError) as e:
      raise ValueError(
        f'{self.where}: the chat template failed: {" ".join(str(e).split())}'
      ) from e


def _environment():
  # A template is a stranger's program: no attribute of a Python object, no
  # change of an argument, and ranges are bounded.
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=['jinja2.ext.loopcontrols'],
  )

  def refuse(message):
    raise jinja2.TemplateError(message)

  def tojson(value, ensure_ascii=False, indent=None, **options):
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, **options
    )

  names: dict[str, Any] = {'raise_exception': refuse}
  environment.globals.update(names)
  environment.filters['tojson'] = tojson
  return environment


def from_folder(path: pathlib.Path) -> Tokenizer:
  """The tokenizer of a Hugging Face folder.

  Raises:
    ValueError: tokenizer.json is missing, or a file is damaged.
  """
  file = path / 'tokenizer.json'
  if not file.is_file():
    raise ValueError(
      f'{str(path)!r} lacks tokenizer.json; save the tokenizer there with '
      'tokenizer.save_pretrained of the transformers package'
    )
  try:
    backend = tokenizers.Tokenizer.from_file(str(file))
  except Exception as e:  # tokenizers raises bare Exception
    raise ValueError(
      f'{str(file)!r} is damaged ({" ".join(str(e).split())[:200]}); '
      'download it again'
    ) from e
  settings = _json(path / 'tokenizer_config.json')
  generation = _json(path / 'generation_config.json')
  config = _json(path / 'config.json')
  eos_token = _text(settings.get('eos_token'))
  ids = generation.get('eos_token_id', config.get('eos_token_id'))
  ids = ids if isinstance(ids, list) else [ids]
  ids.append(backend.token_to_id(eos_token) if eos_token else None)
  template = settings.get('chat_template')
  if isinstance(template, list):  # named templates
    named = {t.get('name'): t.get('template') for t in template}
    template = named.get('default')
  beside = path / 'chat_template.jinja'
  if beside.is_file():
    template = beside.read_text('utf-8')
  elif not (path / 'tokenizer_config.json').is_file():
    _LOG.warning(
      '%s lacks tokenizer_config.json: prompts get no chat template', path
    )
  return Tokenizer(
    backend,
    eos_ids=tuple(dict.fromkeys(i for i in ids if isinstance(i, int))),
    bos_token=_text(settings.get('bos_token')),
    eos_token=eos_token,
    template=template,
    where=str(path),
  )


def _json(path):
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text('utf-8'))
  except (ValueError, RecursionError) as e:
    raise ValueError(
      f'{str(path)!r} is not JSON ({e}); download it again'
    ) from e
  return value if isinstance(value, dict) else {}


def _text(token):
  """A token is a string, or an AddedToken's dict."""
  if isinstance(token, dict):
    token = token.get('content')
  return token if isinstance(token, str) else ''


def from_gguf(fields: dict[str, Any], where: str) -> Tokenizer:
  """The tokenizer of a GGUF file's metadata.

  Raises:
    ValueError: metadata are missing, or name what the table lacks.
  """

  def get(name, kind, default=None):
    value = fields.get(f'tokenizer.ggml.{name}', default)
    if not isinstance(value, kind):
      raise ValueError(
        f'{where}: tokenizer.ggml.{name} is missing or damaged; a GGUF file '
        'must hold its tokenizer'
      )
    return value

  model = get('model', str)
  tokens = get('tokens', list)
  types = get('token_type', list, [_NORMAL] * len(tokens))
  if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
    raise ValueError(
      f'{where}: {len(tokens)} tokens, {len(set(tokens))} of them distinct, '
      f'{len(types)} token types; the file is damaged: download it again'
    )
  vocab = {token: i for i, token in enumerate(tokens)}
  try:
    if model == 'gpt2':
      backend = _byte_level(vocab, get('merges', list), get('pre', str), where)
    elif model == 'llama':
      prefix = fields.get('tokenizer.ggml.add_space_prefix', True)
      backend = _sentence_piece(
        tokens, get('scores', list), types, vocab, bool(prefix), where
      )
    else:
      raise ValueError(
        f'{where}: tokenizer model {model!r} is not supported; supported: '
        'gpt2 (BPE) and llama (SentencePiece)'
      )
    special = [t for t, kind in zip(tokens, types) if kind == _CONTROL]
    # Plain added tokens are found in text, but are no control tokens.
    plain = [t for t, kind in zip(tokens, types) if kind == _USER_DEFINED]
    backend.add_special_tokens(
      [AddedToken(t, normalized=False) for t in special]
    )
    backend.add_tokens([AddedToken(t, normalized=False) for t in plain])
  except ValueError:
    raise
  except Exception as e:  # tokenizers raises bare Exception
    raise ValueError(
      f'{where}: the tokenizer is damaged ({" ".join(str(e).split())[:200]}); '
      'download the file again'
    ) from e

  def token(name):
    i = fields.get(f'tokenizer.ggml.{name}_token_id')
    known = isinstance(i, int) and 0 <= i < len(tokens)
    return (i, tokens[i]) if known else (None, '')

  bos, bos_token = token('bos')
  eos, eos_token = token('eos')
  ends = [eos, token('eot')[0], token('eom')[0]]
  ends += [vocab.get(t) for t in _END_TOKENS if t in special]
  # llama.cpp's defaults where the file does not say: Llama 2's and Llama 3's
  # tokenizers put their first token before a text.
  pre = fields.get('tokenizer.ggml.pre')
  default = model == 'llama' or pre in ('llama-bpe', 'llama3', 'llama-v3')
  first = fields.get('tokenizer.ggml.add_bos_token', default)
  last = fields.get('tokenizer.ggml.add_eos_token', False)
  pieces = [(bos_token, bos)] if first and bos is not None else []
  tail = [(eos_token, eos)] if last and eos is not None else []
  if pieces or tail:
    order = [t for t, _ in pieces] + ['$A'] + [t for t, _ in tail]
    backend.post_processor = processors.TemplateProcessing(
      single=order, special_tokens=pieces + tail
    )
  template = fields.get('tokenizer.chat_template')
  return Tokenizer(
    backend,
    eos_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
    bos_token=bos_token,
    eos_token=eos_token,
    template=template if isinstance(template, str) else None,
    where=where,
  )


def _byte_level(vocab, merges, pre, where):
  if pre not in PRE_TOKENIZERS:
    raise ValueError(
      f'{where}: pre-tokenizer {pre!r} is unknown; known: '
      f"{sorted(PRE_TOKENIZERS)}; give the model's Hugging Face folder"
    )
  parts, options, normalizer = PRE_TOKENIZERS[pre]
  pairs = [tuple(merge.split(' ')) for merge in merges]
  bad = next((m for m, pair in zip(merges, pairs) if len(pair) != 2), None)
  if bad is not None:
    raise ValueError(
      f'{where}: merge {bad!r} is no pair; the file is damaged: download it '
      'again'
    )
  backend = tokenizers.Tokenizer(
    models.BPE(vocab=vocab, merges=pairs, fuse_unk=False, **options)
  )
  if normalizer is not None:
    backend.normalizer = normalizer()
  backend.pre_tokenizer = pre_tokenizers.Sequence(parts())
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentence_piece(tokens, scores, types, vocab, prefix, where):
  """Llama 2's tokenizer: BPE whose merges follow from the tokens' scores."""
  if len(scores) != len(tokens):
    raise ValueError(
      f'{where}: {len(scores)} scores of {len(tokens)} tokens; the file is '
      'damaged: download it again'
    )
  ranked = []
  for i, (token, kind) in enumerate(zip(tokens, types)):
    if kind != _NORMAL:
      continue
    cuts = [(token[:c], token[c:]) for c in range(1, len(token))]
    cuts = [(a, b) for a, b in cuts if a in vocab and b in vocab]
    # Ties in one token: the pair of the older pieces merges first.
    cuts.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    ranked.extend((-scores[i], i, n, pair) for n, pair in enumerate(cuts))
  ranked.sort(key=lambda entry: entry[:3])
  merges = [pair for *_, pair in ranked]
  unknown = '<unk>' if '<unk>' in vocab else None
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=merges,
      unk_token=unknown,
      fuse_unk=True,
      byte_fallback=_BYTE in types,
    )
  )
  start = [normalizers.Prepend('▁')] if prefix else []
  backend.normalizer = normalizers.Sequence(
    [*start, normalizers.Replace(' ', '▁')]
  )
  tail = [decoders.Strip(content=' ', left=1)] if prefix else []
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *tail,
    ]
  )
  return backend
