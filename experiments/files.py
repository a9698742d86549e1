"""A benchmark's own JSONL file as a task: published prompts, verbatim."""

import dataclasses
import hashlib
import pathlib
from typing import Any

from lcx import tasks


@dataclasses.dataclass(frozen=True)
class FileTask:
  """Samples of one file, in the file's order.

  Attributes:
    path: the file.
    sha256: of the file.
    options: what `lcx.tasks.load` was told.
    samples: all of them.
    questions: a context (always 1: published prompts ask one).
  """

  path: str
  sha256: str
  options: tuple[tuple[str, Any], ...]
  samples: tuple[tasks.Sample, ...] = dataclasses.field(repr=False)
  questions: int = 1

  @property
  def size(self) -> int:
    """How many samples there are."""
    return len(self.samples)

  def sample(
    self, count, length, seed, index, haystack=None, *, overhead=0
  ) -> tasks.Sample:
    """The sample of that number, its context's middle cut to the length."""
    del seed, haystack
    return tasks.truncate_middle(
      self.samples[index], count, length, overhead=overhead
    )

  def score(self, sample: tasks.Sample, question: int, text: str) -> float:
    """Scores one prediction, in [0, 1]."""
    return tasks.score(sample, question, text)


def open_file(
  file: str, benchmark: str = 'ruler', max_new_tokens: int = 0, **options: Any
) -> FileTask:
  """Reads a file of a benchmark.

  Args:
    file: the path.
    benchmark: 'ruler', 'infinitebench' or 'longbench'.
    max_new_tokens: of an answer; 0: the benchmark's.
    **options: of the benchmark's loader.

  Raises:
    ValueError: a row of another form, or an unknown option.
    OSError: the file cannot be read.
  """
  try:
    samples = tasks.load(benchmark, file, **options)
  except TypeError as error:
    raise ValueError(f'{file}: {error}') from error
  if max_new_tokens:
    samples = [
      dataclasses.replace(s, max_new_tokens=max_new_tokens) for s in samples
    ]
  digest = hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()
  told = {'benchmark': benchmark, 'max_new_tokens': max_new_tokens} | options
  return FileTask(file, digest, tuple(sorted(told.items())), tuple(samples))
