"""lcx as a model of EleutherAI's lm-evaluation-harness: any method, any task.

python -m experiments.lm_eval_model run --model lcx --tasks niah_single_2 \
    --model_args model=PATH,method=quest,length=8192 \
    --metadata '{"max_seq_lengths":[4096]}'

The flags are those of `lm_eval` (extra `eval`: `make .venv/.has-eval`).
Arguments of the model: `model` (a Hugging Face folder, a GGUF file or
preset:NAME), `method` (a name, or prefill+cache+decode), `length` (tokens of
the cache, answers included), `dtype`, `protocol` (`whole`, or `context_first`:
all but the last `question` tokens are read before those are seen), `question`,
and the numbers of the method's parts (`decode.budget=512`).
"""

import sys
from typing import Any, Literal

import jax
import numpy as np
import tqdm
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from experiments import models
from lcx import methods
from lcx.engine import Engine, Session, make_sampling
from lcx.methods.base import Prompt

_STEP = 32  # tokens between two looks for a stop text
_PAGE = 64
_CHUNK = 256  # tokens whose logits are kept at a time


@register_model('lcx')
class LcxModel(LM):
  """One method on one model.

  What a request says, token for token, goes to the model; a tokenizer that
  puts a token before every text (BOS) does so once. Continuations are scored
  through the method's decode, in pieces of its `max_queries` tokens.

  Args:
    model: a Hugging Face folder, a GGUF file or preset:NAME.
    method: what attends.
    length: tokens of the cache; a longer request is refused, never cut.
    dtype: of weights and activations; 'auto': float32 on a CPU, else bfloat16.
    protocol: `whole` or `context_first`.
    question: last tokens of a prompt that count as its question.
    seed: of sampling, and of a preset's weights.
    batch_size: what lm_eval gives; requests run one at a time.
    device: what lm_eval gives; JAX's default device is used.
    **numbers: of the method's parts.

  Raises:
    ValueError: an argument that is not known or does not fit.
  """

  def __init__(
    self,
    model: str,
    method: str = 'dense',
    length: int = 4096,
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto',
    protocol: Literal['whole', 'context_first'] = 'whole',
    question: int = 64,
    seed: int = 0,
    batch_size: Any = 1,
    max_batch_size: Any = None,
    device: Any = None,
    **numbers: Any,
  ):
    super().__init__()
    del batch_size, max_batch_size, device
    if protocol not in ('whole', 'context_first'):
      raise ValueError(f"{protocol=} must be 'whole' or 'context_first'")
    if question < 1:
      raise ValueError(f'{question=} must be at least 1')
    if dtype == 'auto':
      dtype = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
    self._protocol, self._question, self._seed = protocol, question, seed
    self._length = length
    source = models.find(str(model), seed)
    found = models.load(source, dtype)
    self._tokenizer = found.tokenizer
    self._name = source.name
    self._engine = Engine(
      found.config,
      found.weights,
      methods.get_method(method, **numbers),
      capacity=-(-length // _PAGE) * _PAGE,
      trace=False,
    )
    first = found.tokenizer.encode('a', add_special=True)
    plain = found.tokenizer.encode('a')
    extra = len(first) - len(plain)
    self._opening = first[:extra] if first[extra:] == plain else []

  # What the harness asks for.

  def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
    """Greedy (or sampled) answers, cut before the first stop text."""
    return [
      self._kept('generate_until', r, self._generate(*r.args))
      for r in tqdm.tqdm(requests, desc='generate', mininterval=5)
    ]

  def loglikelihood(
    self, requests: list[Any], **_: Any
  ) -> list[tuple[float, bool]]:
    """(log likelihood of the continuation, whether greedy decoding says it)."""
    return [
      self._kept('loglikelihood', r, self._likelihood(*r.args))
      for r in tqdm.tqdm(requests, desc='loglikelihood', mininterval=5)
    ]

  def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
    """Log likelihood of whole texts."""
    return [self._likelihood('', r.args[0])[0] for r in requests]

  def apply_chat_template(
    self,
    chat_history: list[dict[str, str]],
    add_generation_prompt: bool = True,
  ) -> str:
    """A conversation as text; without the model's own first token."""
    return self._tokenizer.chat(chat_history, add_generation_prompt)

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """The model's template, where the harness asks for one."""
    del chat_template
    return self._tokenizer.template

  @property
  def tokenizer_name(self) -> str:
    """Names the model's folder, so that other tasks can load a tokenizer."""
    return self._name

  # How it is done.

  def _kept(self, kind: str, request: Any, answer: Any) -> Any:
    self.cache_hook.add_partial(kind, request.args, answer)
    return answer

  def _read(self, tokens: list[int], more: int) -> Session:
    """Reads a prompt under the protocol."""
    if len(tokens) + more > self._length:
      raise ValueError(
        f'a request of {len(tokens)} tokens and {more} to come exceeds '
        f'length={self._length}: raise it in --model_args'
      )
    ids = np.asarray(tokens, np.int32)
    cut = max(len(ids) - self._question, 0)
    empty = np.zeros((0,), np.int32)
    if cut == 0:  # all of it is the question
      return self._engine.prefill([Prompt(empty, ids)])
    prompt = Prompt(empty, ids[:cut], (ids[cut:],))
    if self._protocol == 'whole':
      return self._engine.prefill([prompt], 0)
    session = self._engine.prefill([prompt])
    self._engine.extend(session, [ids[cut:]])
    return session

  def _encode(self, text: str) -> list[int]:
    return self._opening + self._tokenizer.encode(text)

  def _generate(self, context: str, options: dict[str, Any]) -> str:
    until = options.get('until') or []
    until = [until] if isinstance(until, str) else list(until)
    until = [stop for stop in until if stop]
    most = int(options.get('max_gen_toks', 256))
    sampled = options.get('do_sample', False)
    warm = float(options.get('temperature') or 0.0) if sampled else 0.0
    tokenizer, eos = self._tokenizer, self._tokenizer.eos_ids
    sampling = make_sampling(
      1,
      temperature=warm,
      top_p=float(options.get('top_p') or 1.0),
      seed=self._seed,
      stop=tuple(eos),
    )
    session = self._read(self._encode(context), most)
    ids: list[int] = []
    while len(ids) < most:
      (new,), (status,) = self._engine.decode(
        session, min(_STEP, most - len(ids)), sampling
      )
      if status != 'ok':
        raise FloatingPointError(f'method {self._engine.method.name}: {status}')
      ended = bool(new) and new[-1] in eos
      ids += new[:-1] if ended else new
      text = tokenizer.decode(ids)
      if ended or not new or any(stop in text for stop in until):
        break
    text = tokenizer.decode(ids)
    for stop in until:
      text = text.partition(stop)[0]
    return text

  def _likelihood(self, context: str, wanted: str) -> tuple[float, bool]:
    # Trailing blanks belong to the continuation's first token; what follows
    # is split where the tokens of both together are, as in the harness.
    blanks = len(context) - len(context.rstrip())
    if blanks:
      wanted = context[-blanks:] + wanted
      context = context[:-blanks]
    before = self._encode(context) or list(self._tokenizer.eos_ids[:1])
    after = self._encode(context + wanted)
    after = after[len(self._encode(context)) :]
    if not before:
      before, after = after[:1], after[1:]
    session = self._read(before, len(after))
    total, greedy = 0.0, True
    for first in range(0, len(after), _CHUNK):
      ids = np.asarray(after[first : first + _CHUNK], np.int32)
      logits = self._engine.score(session, [ids])[0].astype(np.float64)
      top = logits.max(axis=1, keepdims=True)
      norm = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
      total += float((logits[np.arange(len(ids)), ids] - norm).sum())
      greedy &= bool((logits.argmax(axis=1) == ids).all())
    return total, greedy


if __name__ == '__main__':
  from lm_eval.__main__ import cli_evaluate

  sys.exit(cli_evaluate())
