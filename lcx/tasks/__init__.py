"""Evaluation tasks: RULER's and InfiniteBench's kinds, files, scores.

  task = get_task('niah_multikey_1', questions=2)
  sample = task.sample(count, length=4096, seed=0, index=7)
  text = sample.user(0)         # system + context + question
  score(sample, 0, prediction)  # in [0, 1]

Samples from the benchmarks' own JSONL files: `load`.
"""

import dataclasses
from typing import Any

from lcx.tasks import (
  documents,
  frequencies,
  functions,
  infinite,
  needles,
  variables,
)
from lcx.tasks.base import Question, Sample, Task, score
from lcx.tasks.files import load, truncate_middle

RULER: tuple[Task, ...] = (
  *needles.TASKS,
  *variables.TASKS,
  *frequencies.TASKS,
  *documents.TASKS,
)
INFINITE_BENCH: tuple[Task, ...] = (*infinite.TASKS, *functions.TASKS)
TASKS: dict[str, Task] = {t.name: t for t in (*RULER, *INFINITE_BENCH)}

__all__ = [
  'INFINITE_BENCH',
  'RULER',
  'TASKS',
  'Question',
  'Sample',
  'Task',
  'get_task',
  'load',
  'score',
  'truncate_middle',
]


def get_task(name: str, **changes: Any) -> Task:
  """The task of that name, with changed parameters if any are given.

  Raises:
    ValueError: there is no such task, it has no such parameter, or the
      parameter's value is of another type or out of range.
  """
  if name not in TASKS:
    raise ValueError(f'no task {name!r}; tasks: {", ".join(TASKS)}')
  task = TASKS[name]
  known = {field.name for field in dataclasses.fields(task)} - {'name'}
  if wrong := sorted(changes.keys() - known):
    raise ValueError(
      f'{name} has no parameter {", ".join(wrong)}; it has '
      f'{", ".join(sorted(known))}'
    )
  for key, value in changes.items():
    default = getattr(task, key)
    if isinstance(default, tuple) and isinstance(value, list):
      changes[key] = tuple(value)
    elif isinstance(default, float) and type(value) is int:
      changes[key] = float(value)
    elif type(value) is not type(default):
      raise ValueError(
        f'{name}: {key}={value!r} must be of type {type(default).__name__}, '
        f'like its default {default!r}'
      )
  return dataclasses.replace(task, **changes)
