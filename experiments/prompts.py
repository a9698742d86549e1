"""From a sample's texts to a prompt's tokens, in the model's chat template."""

from typing import Any

import numpy as np

from lcx.methods.base import Prompt
from lcx.tasks.base import Sample, join

# Stands for the user's words while the template is rendered.
_HERE = '\N{OBJECT REPLACEMENT CHARACTER}lcx\N{OBJECT REPLACEMENT CHARACTER}'


class Template:
  """What a model puts around the user's words.

  Attributes:
    overhead: tokens that it adds to a prompt.
  """

  def __init__(self, tokenizer: Any):
    self._tokenizer = tokenizer
    self._opening: list[int] = []
    self._head = self._tail = ''
    if tokenizer.template is None:
      # No template: what the tokenizer puts before a text, such as a BOS.
      with_special = tokenizer.encode('a', add_special=True)
      plain = tokenizer.encode('a')
      extra = len(with_special) - len(plain)
      if with_special[extra:] == plain:
        self._opening = with_special[:extra]
    else:
      text = tokenizer.chat([{'role': 'user', 'content': _HERE}])
      self._head, found, self._tail = text.partition(_HERE)
      if not found:
        raise ValueError(
          f"{tokenizer.where}: the chat template drops the user's words"
        )
    self.overhead = len(self._opening) + sum(
      len(tokenizer.encode(part)) for part in (self._head, self._tail)
    )

  def prompt(self, sample: Sample) -> Prompt:
    """The tokens of a sample, span by span."""
    plain = self._tokenizer.template is None or not sample.chat
    head, tail = ('', '') if plain else (self._head, self._tail)
    questions = []
    for question in sample.questions:
      if plain:
        asked = join(question.text, question.answer_prefix)
      else:
        asked = question.text + tail + question.answer_prefix
      questions.append(self._encode(asked))
    opening = np.asarray(self._opening, np.int32)
    return Prompt(
      np.concatenate([opening, self._encode(head + sample.system)]),
      self._encode(sample.context),
      tuple(questions),
    )

  def _encode(self, text: str) -> np.ndarray:
    return np.asarray(self._tokenizer.encode(text), np.int32)
