"""A run whose engine reads the answer off the prompt: no weights, no jit.

As a script it is `experiments.run` with this engine. FAKE_NAN names a method
whose logits are NaN; FAKE_MS is the time of an answer; FAKE_KILL kills the
process while it writes: the numbers of appends before the kill and of the
bytes of the next line that still reach the file.
"""

import dataclasses
import os
import re
import signal
import sys
import time
from unittest import mock

from experiments import answers, environment, models, plots, results, run
from lcx.engine import Generation


@dataclasses.dataclass
class Model:
  tokenizer: object
  config: None = None
  weights: None = None


def load(source, dtype):
  del source, dtype
  return Model(models._bytes_tokenizer())


class Engine:
  """Dense finds every needle, streaming those in the last 300 bytes."""

  calls = 0

  def __init__(self, method):
    self.method = method
    self.tokenizer = models._bytes_tokenizer()

  def generate(self, prompts, max_new_tokens, stop_ids, protocol):
    del stop_ids, protocol
    Engine.calls += 1
    time.sleep(float(os.environ.get('FAKE_MS', '0')) / 1e3)
    return [
      [self._answer(p, i, max_new_tokens) for i in range(len(p.questions))]
      for p in prompts
    ]

  def _answer(self, prompt, index, budget):
    name = self.method.name
    text = self.tokenizer.decode(prompt.whole(index))
    question = self.tokenizer.decode(prompt.questions[index])
    seen = text[-300 - len(question) :] if name == 'streaming' else text
    key = re.search(r'of ([\w-]+), as stated', question)[1]
    needle = re.search(rf'of {key} is ([\w-]+)\.', seen)
    said = self.tokenizer.encode(needle[1] if needle else 'no')[:budget]
    nan = name == os.environ.get('FAKE_NAN')
    return Generation(
      tokens=said,
      status='nan' if nan else 'ok',
      prompt_tokens=len(text),
      prefill_ms=time.perf_counter(),
      decode_ms_per_token=1.0,
      keys_attended=float('nan') if nan else 10.0,
      density=1.0 if name in ('dense', 'quest') else 0.25,
      prefill_density=1.0,
      decode_density=0.25,
      kv_bytes=1024,
      host_bytes=0,
      peak_bytes=None,
      compilations=0,
      compile_s=0.0,
      counters={},
    )


def install(patch=mock.patch.object):
  """Puts the fakes in place.

  The code's version is fixed: sources that change while tests run are no
  concern of theirs. Plots are one pixel: test_report.py looks at real ones.
  """
  return [
    patch(models, 'load', load),
    patch(answers, 'make_engine', lambda _, method, *__: Engine(method)),
    patch(environment, 'code_version', lambda *_: 'fake'),
    patch(environment, 'git', lambda: 'fake'),
    patch(plots, 'draw', lambda _: {'plot.png': b'PNG'}),
  ]


def _kill_in_append(after, size):
  """Kills this process in its append number `after`, `size` bytes in."""
  append, count = results.Results.append, [0]

  def dying(self, rows):
    if count[0] < after:
      count[0] += 1
      return append(self, rows)
    write = os.write

    def torn(file, data):
      write(file, data[:size])
      os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(os, 'write', torn):
      append(self, rows)

  results.Results.append = dying


if __name__ == '__main__':
  for patch in install():
    patch.start()
  if 'FAKE_KILL' in os.environ:
    _kill_in_append(*map(int, os.environ['FAKE_KILL'].split(',')))
  sys.exit(run.main(sys.argv))
