"""Exact answers, teacher-forced: what greedy decoding would say, in one pass.

If every token of an answer is the most likely one after the tokens before it,
greedy decoding writes exactly that answer, and the other way round.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lcx import sharding
from lcx.models.config import ModelConfig
from lcx.tasks import base, get_task
from lcx.tasks.needles import Needles
from lcx.train import model
from lcx.train.text import held_out

_KEY = re.compile(r' of (\S+) is ')


@dataclasses.dataclass(frozen=True)
class Example:
  """One question with its answer.

  Attributes:
    tokens: int32 [n], the answer and its end included.
    prompt: tokens before the answer.
  """

  tokens: np.ndarray
  prompt: int


def examples(
  task: base.Task,
  encode: Callable[[str], list[int]],
  length: int,
  count: int,
  seed: int = 0,
  *,
  first: Sequence[int] = (1,),
  last: Sequence[int] = (2,),
  only_held_out: bool = True,
) -> Iterator[Example]:
  """Samples of an evaluation task; needles' keys are ones never trained on.

  Tasks for which `filters_keys` is False are taken as they come.

  Args:
    task: of `lcx.tasks`.
    encode: text to tokens, without special ones.
    length: tokens of a sample at most.
    count: how many.
    seed: of the samples.
    first: tokens before the prompt.
    last: tokens after the answer.
    only_held_out: skips samples with a key that training may draw, in tasks
      that have few keys.

  Raises:
    ValueError: too few samples in 100 * count have such keys alone.
  """
  made = 0
  for index in range(100 * count + 1000):
    if made == count:
      return
    if only_held_out and not _held_out(task, seed, index):
      continue
    sample = task.sample(
      lambda text: len(encode(text)), length, seed, index, overhead=len(first)
    )
    question = sample.questions[0]
    prompt = [*first, *encode(sample.prompt(0))]
    said = question.answers
    if getattr(task, 'values', 1) > 1:  # in the order in which they stand
      said = sorted(said, key=sample.context.find)
    answer = encode(' ' + ', '.join(said))
    made += 1
    tokens = np.asarray([*prompt, *answer, *last], np.int32)
    yield Example(tokens, len(prompt))
  if made < count:
    raise ValueError(
      f'{task.name}: only {made} of {count} samples have held-out keys'
    )


def filters_keys(task: base.Task) -> bool:
  """Whether samples with keys that training may draw are skipped.

  Only where keys are words: random numbers and names have no halves. And not
  where every line has a key of its own (niah_multikey_2): among so many, some
  always are of training's half.
  """
  if not isinstance(task, Needles):
    return False
  return task.key_kind == 'words' and task.haystack != 'needle'


def _held_out(task, seed, index):
  """Whether all keys of a sample are held out, where they are looked at."""
  if not filters_keys(task):
    return True
  probe = dataclasses.replace(task, haystack='noise', max_new_tokens=1)
  draw = functools.partial(base.stream, task.name, seed, index)
  text = probe.draft(0, draw, 0, '').context
  return all(held_out(key, 2) for key in _KEY.findall(text))


class Judge:
  """Scores examples.

  Args:
    config: the model.
    mesh: where it runs.
    batch: examples at a time.
  """

  def __init__(self, config: ModelConfig, mesh, batch: int = 4):
    self.config, self.mesh, self.batch = config, mesh, batch
    self._best = jax.jit(self._most_likely)

  def _most_likely(self, params, tokens, index):
    x = model.hidden(params, tokens, self.config, self.mesh)
    x = jnp.take_along_axis(x, index[..., None], axis=1)
    return jnp.argmax(model.logits(params, x, self.config), axis=-1)

  def score(
    self, params: model.Params, found: Sequence[Example], length: int
  ) -> dict[str, float]:
    """Shares of exact answers and of right answer tokens.

    Args:
      params: of `lcx.train.model.stack`.
      found: the examples; the ends of their answers do not count.
      length: tokens to which they are padded.
    """
    exact, right, total = 0, 0, 0
    most = max(len(e.tokens) - e.prompt for e in found)
    place = sharding.named(self.mesh, P('data', 'seq'))
    for start in range(0, len(found), self.batch):
      part = found[start : start + self.batch]
      tokens = np.zeros((self.batch, length), np.int32)
      index = np.zeros((self.batch, most), np.int32)
      for row, e in enumerate(part):
        tokens[row, : len(e.tokens)] = e.tokens
        size = len(e.tokens) - e.prompt - 1
        index[row, :size] = np.arange(e.prompt - 1, e.prompt - 1 + size)
      best = np.asarray(
        self._best(params, jax.device_put(tokens, place), index)
      )
      for row, e in enumerate(part):
        answer = e.tokens[e.prompt : -1]
        hits = best[row, : len(answer)] == answer
        exact += bool(hits.all())
        right += int(hits.sum())
        total += len(answer)
    return {'exact': exact / len(found), 'tokens': right / total}


def suite(
  encode: Callable[[str], list[int]],
  cells: Sequence[tuple[str, dict, int]],
  count: int,
  seed: int = 0,
) -> dict[tuple[str, int], list[Example]]:
  """Examples of several (task, changed fields, length)."""
  return {
    (label(name, fields), length): list(
      examples(get_task(name, **fields), encode, length, count, seed)
    )
    for name, fields, length in cells
  }


def label(name: str, fields: dict) -> str:
  """A task's name with its changed fields."""
  return name + ''.join(f',{k}={v}' for k, v in fields.items())
