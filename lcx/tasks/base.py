"""What a task is: samples from (seed, index), and an exact score in [0, 1].

A task draws everything from the sample's own generators (`stream`), so a
sample depends on its task, seed and index alone, and two samples share no
shuffle (RULER's fixed seed gives all samples of CWE and FWE nearly one
structure). Lengths are in the model's own tokens and include the template and
the answer.
"""

import abc
import dataclasses
import hashlib
import random
from collections.abc import Callable
from typing import ClassVar

from lcx.tasks import haystacks, scores

# Tokens of a text, as the model's tokenizer counts them.
Count = Callable[[str], int]

FILL = 0.95  # a sample that fills this share of its length is not enlarged
TARGET = 0.975  # of the length: what the search for a size aims at


@dataclasses.dataclass(frozen=True)
class Question:
  """One question about a context.

  Attributes:
    text: what follows the context, its leading whitespace included.
    answer_prefix: how the answer starts; stands after the assistant's header.
    answers: what is looked for in a prediction.
    depths: where the evidence starts in the context, 0 (start) to 1 (end);
      empty where it is spread over all of it.
    choices: the classes or options that the metric needs to know, if any.
  """

  text: str
  answer_prefix: str
  answers: tuple[str, ...]
  depths: tuple[float, ...] = ()
  choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Draw:
  """The generators of one sample: one for each purpose, each call afresh."""

  task: str
  seed: int
  index: int

  def __call__(self, purpose: str) -> random.Random:
    return stream(self.task, self.seed, self.index, purpose)

  @property
  def depth(self) -> float:
    """A depth in [0, 1) that sweeps it evenly as the index counts up.

    Multiples of the golden ratio, from an offset of the seed's: consecutive
    indices leave no large gap, whatever their number.
    """
    offset = stream(self.task, self.seed, 'depth').random()
    return (self.index * 0.6180339887498949 + offset) % 1.0


@dataclasses.dataclass(frozen=True)
class Draft:
  """A sample's texts, before its size is settled."""

  system: str
  context: str
  questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class Sample:
  """One context with its questions. Texts join verbatim, without separators.

  Attributes:
    task: the task's name.
    metric: the name of its score in `scores.METRICS`.
    system: what stands before the context (instructions, solved examples).
    context: the long part.
    questions: at least one; under the context-first protocol all of them are
      asked of one prefilled context.
    max_new_tokens: budget of the answer. The metrics are recalls, so this is a
      part of them.
    length: the length asked for, in tokens; 0 for a sample from a file.
    tokens: what the longest question's prompt takes, template and answer
      included; <= length. 0 for a sample from a file.
    seed: the sample's seed.
    index: its number under that seed, or in its file.
    chat: whether the prompt goes into the model's chat template.
  """

  task: str
  metric: str
  system: str
  context: str
  questions: tuple[Question, ...]
  max_new_tokens: int
  length: int = 0
  tokens: int = 0
  seed: int = 0
  index: int = 0
  chat: bool = True

  def user(self, question: int = 0) -> str:
    """What the user says: system, context and question."""
    return self.system + self.context + self.questions[question].text

  def prompt(self, question: int = 0) -> str:
    """The whole prompt of a model without a chat template."""
    asked = self.questions[question]
    return join(self.user(question), asked.answer_prefix)

  @property
  def depth(self) -> float | None:
    """Where the first question's first piece of evidence stands, or None."""
    depths = self.questions[0].depths
    return depths[0] if depths else None

  @property
  def digest(self) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of all texts."""
    parts = [self.system, self.context]
    for question in self.questions:
      parts += [question.text, question.answer_prefix, *question.answers]
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:16]


def score(sample: Sample, question: int, prediction: str) -> float:
  """Scores one prediction by the sample's metric, in [0, 1]."""
  asked = sample.questions[question]
  metric = scores.METRICS[sample.metric]
  return float(metric(prediction, asked.answers, asked.choices))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
  """A family of samples with its parameters; `dataclasses.replace` varies it.

  Attributes:
    name: as in the benchmark.
    max_new_tokens: budget of the answer, from the benchmark's table.
    questions: how many questions are asked of one context.
  """

  name: str
  max_new_tokens: int
  questions: int = 1

  metric: ClassVar[str]

  @property
  def smallest(self) -> int:
    """The smallest size that `draft` takes."""
    return 0

  @abc.abstractmethod
  def draft(self, size: int, draw: Draw, length: int, haystack: str) -> Draft:
    """The texts with `size` units of filling (sentences, words, pairs...).

    A draft of another size holds the same secrets: generators are drawn by
    purpose.
    """

  def sample(
    self,
    count: Count,
    length: int,
    seed: int,
    index: int,
    haystack: str | None = None,
    *,
    overhead: int = 0,
  ) -> Sample:
    """One sample that fills 0.90 to 1.00 of `length` tokens.

    It fills less only where one more unit of filling (a line, a pair of
    UUIDs, a document) takes more than a tenth of the length.

    Args:
      count: tokens of a text.
      length: tokens of the longest question's prompt, of `overhead` and of the
        answer's budget together.
      seed: seed of the run.
      index: number of the sample.
      haystack: text to hide things in; default: `haystacks.default_text()`.
      overhead: tokens that the chat template and special tokens add.

    Raises:
      ValueError: the smallest sample is longer than `length`.
    """
    text = haystacks.default_text() if haystack is None else haystack
    draw = Draw(self.name, seed, index)
    fixed = overhead + self.max_new_tokens
    draft, used = fit(
      lambda size: self.draft(size, draw, length, text),
      lambda draft: fixed + prompt_tokens(count, draft),
      self.smallest,
      length,
      self.name,
    )
    return Sample(
      task=self.name,
      metric=self.metric,
      system=draft.system,
      context=draft.context,
      questions=draft.questions,
      max_new_tokens=self.max_new_tokens,
      length=length,
      tokens=used,
      seed=seed,
      index=index,
    )

  def score(self, sample: Sample, question: int, prediction: str) -> float:
    """Scores one prediction, in [0, 1]."""
    return score(sample, question, prediction)


def join(text: str, answer_prefix: str) -> str:
  """A text and an answer's start; a newline where no whitespace stands."""
  if not answer_prefix or answer_prefix[0].isspace() or text[-1:].isspace():
    return text + answer_prefix
  return f'{text}\n{answer_prefix}'


def prompt_tokens(count: Count, texts: Draft | Sample) -> int:
  """Tokens of system, context and longest question, each encoded by itself.

  So the engine encodes them, to know where the context ends; a text encoded
  whole takes no more, but for rare merges across the bounds.
  """
  asked = (count(join(q.text, q.answer_prefix)) for q in texts.questions)
  return count(texts.system) + count(texts.context) + max(asked)


def stream(*key: object) -> random.Random:
  """A generator that depends on the key alone (hashlib, never hash())."""
  digest = hashlib.sha256('/'.join(map(str, key)).encode()).digest()
  return random.Random(int.from_bytes(digest[:16]))


def locate(context: str, *evidence: str) -> tuple[float, ...]:
  """Where each piece of evidence starts in the context, 0 to 1."""
  found = (context.find(piece) for piece in evidence)
  return tuple(round(at / max(len(context), 1), 4) for at in found)


def fit(
  draft: Callable[[int], Draft],
  tokens: Callable[[Draft], int],
  smallest: int,
  length: int,
  name: str,
) -> tuple[Draft, int]:
  """The draft whose tokens fill the length, and their number.

  Tokens grow nearly linearly with the size, so a secant needs two or three
  counts of a whole prompt, and bisection hardly ever takes over.
  """
  best = draft(smallest)
  low, used = smallest, tokens(best)
  if used > length:
    raise ValueError(
      f'{length=} is too short for {name}: its smallest sample takes {used} '
      'tokens, template and answer included'
    )
  first, high, over, probe = used, None, 0, smallest + 32
  for step in range(64):
    if used >= FILL * length or (high is not None and high - low <= 1):
      break
    trial = draft(probe)
    if trial.context == best.context:
      break  # nothing more to fill with: all documents are in
    trial_tokens = tokens(trial)
    if trial_tokens <= length:
      low, used, best = probe, trial_tokens, trial
    else:
      high, over = probe, trial_tokens
    if high is None:
      per_unit = max((used - first) / max(low - smallest, 1), 1e-3)
      probe = max(smallest + int((TARGET * length - first) / per_unit), low + 1)
    else:
      # Between the two: texts are denser here and there.
      share = (TARGET * length - used) / (over - used) if step < 8 else 0.5
      probe = low + max(1, min(int(share * (high - low)), high - low - 1))
  return best, used
