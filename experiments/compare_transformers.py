"""Times prefill and decode against Hugging Face transformers, in turns.

  python -m experiments.compare_transformers --torch_python=PATH/bin/python \
    --model=.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf

PATH's Python needs torch, transformers, accelerate and gguf; it is no part of
this project's environment. Both sides run in float32 on the same cores, one
after the other in every round, so that what else the machine does falls on
both. Prints a table and, as JSON, one speed row a phase.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

from absl import app, flags

MODEL = flags.DEFINE_string(
  'model', '.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf', 'A GGUF file.'
)
TORCH = flags.DEFINE_string(
  'torch_python', None, 'Python with torch and transformers.', required=True
)
TOKENS = flags.DEFINE_integer('tokens', 2048, 'Length of the prompt.')
NEW = flags.DEFINE_integer('new', 32, 'Tokens decoded.')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Rounds after one that warms up.')
CORES = flags.DEFINE_integer('cores', 2, 'Cores that both sides share.')
OUT = flags.DEFINE_string('out', None, 'JSON lines file that rows go to.')

# The most that ours may take, times the other's (issue: the model).
LIMITS = {'prefill': 1.3, 'decode': 1.0}
ROOT = pathlib.Path(__file__).parent.parent

# Runs in the other Python: answers every line of ids with times and tokens.
_PEER = """
import json, pathlib, sys, time
import torch, transformers
path, new, cores = pathlib.Path(sys.argv[1]).resolve(), *map(int, sys.argv[2:])
torch.set_num_threads(cores)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained(
  path.parent, gguf_file=path.name, dtype=torch.float32).eval()
versions = {'torch': torch.__version__,
            'transformers': transformers.__version__,
            'attention': model.config._attn_implementation}
print(json.dumps(versions), flush=True)
for line in sys.stdin:
  with torch.inference_mode():
    ids = torch.tensor(json.loads(line))[None]
    start = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - start
    tokens, past = [], out.past_key_values
    start = time.perf_counter()
    for _ in range(new):
      best = out.logits[:, -1:].argmax(-1)
      tokens.append(int(best))
      out = model(best, past_key_values=past, use_cache=True)
    decode = (time.perf_counter() - start) / new
    del out, past
  print(json.dumps([prefill * 1e3, decode * 1e3, tokens]), flush=True)
"""


class Peer:
  """transformers in a process of its own."""

  def __init__(self, python: str, model: str, new: int, cores: int):
    self._process = subprocess.Popen(
      [python, '-c', _PEER, model, str(new), str(cores)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.versions = self._read()

  def run(self, ids: list[int]):
    """(prefill ms, decode ms a token, tokens)."""
    self._process.stdin.write(json.dumps(ids) + '\n')
    self._process.stdin.flush()
    return self._read()

  def _read(self):
    line = self._process.stdout.readline()
    if not line:
      raise OSError(
        f'{TORCH.value} ended with code {self._process.wait()}: it needs '
        'torch, transformers, accelerate and gguf'
      )
    return json.loads(line)

  def close(self):
    self._process.stdin.close()
    self._process.wait()


class Ours:
  """The engine, dense."""

  def __init__(self, model: str, length: int, new: int):
    import jax
    import numpy as np

    from lcx.engine import Engine
    from lcx.methods import dense
    from lcx.methods.base import Prompt
    from lcx.models import load

    self._jax, self._np, self._prompt = jax, np, Prompt
    loaded = load.load(model, 'float32')
    self.tokenizer = loaded.tokenizer
    capacity = -(-(length + new) // 64) * 64
    self._new = new
    self._engine = Engine(
      loaded.config,
      loaded.weights,
      dense.METHOD,
      capacity=capacity,
      trace=False,
    )

  def run(self, ids: list[int]):
    """(prefill ms, decode ms a token, tokens)."""
    prompt = self._prompt(
      self._np.zeros(0, self._np.int32), self._np.array(ids, self._np.int32)
    )
    start = time.perf_counter()
    session = self._engine.prefill([prompt])
    self._jax.block_until_ready(session.scores)
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    tokens, _ = self._engine.decode(session, self._new)
    decode = (time.perf_counter() - start) / self._new
    return prefill * 1e3, decode * 1e3, tokens[0]


def prompt_ids(tokenizer, length: int) -> list[int]:
  """Natural text, repeated if it is short."""
  text = (ROOT / 'LICENSE').read_text('utf-8')
  ids = tokenizer.encode(text)
  return (ids * (length // len(ids) + 1))[:length]


def main(_):
  """Alternates the two sides and prints what each took."""
  # Before jax starts its threads; the other process inherits it.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: CORES.value])
  os.environ['JAX_PLATFORMS'] = 'cpu'
  ours = Ours(MODEL.value, TOKENS.value, NEW.value)
  peer = Peer(TORCH.value, MODEL.value, NEW.value, CORES.value)
  ids = prompt_ids(ours.tokenizer, TOKENS.value)
  rounds = []
  for i in range(ROUNDS.value + 1):
    pair = ours.run(ids), peer.run(ids)
    if i:
      rounds.append(pair)
    print(
      f'round {i}{" (warm-up)" if not i else ""}: prefill {pair[0][0]:.0f} and '
      f'{pair[1][0]:.0f} ms, decode {pair[0][1]:.1f} and {pair[1][1]:.1f} ms',
      file=sys.stderr,
    )
  peer.close()
  same = all(a[2] == b[2] for a, b in rounds)
  print(f'\n{TOKENS.value} tokens, float32, {CORES.value} cores; ours, theirs')
  for at, phase in enumerate(LIMITS):
    rows = [[r[side][at] for r in rounds] for side in (0, 1)]
    report(phase, rows, peer.versions)
  print(f'greedy tokens identical: {same}')


def report(phase: str, samples: list[list[float]], versions: dict):
  """Prints one phase and its speed row."""
  from experiments import environment

  ms, peer_ms = (statistics.median(s) for s in samples)
  print(
    f'{phase:8s} {ms:9.1f} ms {peer_ms:9.1f} ms   takes {ms / peer_ms:.2f} '
    f'times transformers (at most {LIMITS[phase]})'
  )
  row = {
    'op': phase,
    'case': f'{pathlib.Path(MODEL.value).stem} {TOKENS.value} tokens float32',
    'implementation': 'lcx dense',
    'repeats_ms': [round(x, 2) for x in samples[0]],
    'ms': round(ms, 2),
    'unit': 'ms',
    'peer': 'transformers',
    'peer_repeats_ms': [round(x, 2) for x in samples[1]],
    'peer_ms': round(peer_ms, 2),
    'ratio': round(peer_ms / ms, 3),
    'device': f'{CORES.value} CPU cores',
    'versions': {**environment.versions(), **versions},
    'git': environment.git(),
    'command': 'python -m experiments.compare_transformers '
    f'--tokens={TOKENS.value} --new={NEW.value} --cores={CORES.value}',
    'date': time.strftime('%Y-%m-%d'),
  }
  if OUT.value:
    with open(OUT.value, 'a', encoding='utf-8') as file:
      file.write(json.dumps(row) + '\n')


if __name__ == '__main__':
  app.run(main)
