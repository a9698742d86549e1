"""Sweeps the static sizes of a kernel; the one writer of the tuned table.

python -m experiments.tune_blocks --function=attend_pages --tokens=131072

Every candidate runs in a process of its own, since one that the compiler or
the device rejects may take its process along. The best of a bucket, with what
it was chosen from, is written to kernels_pallas/tuned_block_sizes.json; review
the difference before committing it. A default that is within 1% stays.
"""

import itertools
import json
import pathlib
import subprocess
import sys

from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
TABLE = ROOT / 'kernels_pallas' / 'tuned_block_sizes.json'
# A candidate that compiles for longer than this has lost.
LIMIT_S = 180
WORTHWHILE = 0.99  # of the default's time

SPACES = {
  'block_sparse': {
    'tile_k': (64, 128),
    'stages': (2, 3),
    'overlap': (0, 1),
    'turns': (0, 1),
  },
  'attend_pages': {
    'keys': (64, 128),
    'splits': (8, 16, 32),
    'stages': (0, 2, 4),
  },
}

_FUNCTION = flags.DEFINE_enum(
  'function', 'block_sparse', sorted(SPACES), 'The kernel.'
)
_TOKENS = flags.DEFINE_integer('tokens', 32768, 'Length of the measured case.')
_BITS = flags.DEFINE_enum('bits', '16', ['16', '8', '4'], 'Of attend_pages.')
_CANDIDATE = flags.DEFINE_string('candidate', '', 'One candidate, as JSON.')


def candidates(function: str) -> list[dict[str, int]]:
  """Every point of the space; the empty one, the default, first."""
  space = SPACES[function]
  points = itertools.product(*space.values())
  return [{}, *(dict(zip(space, point, strict=True)) for point in points)]


def measure(sizes: dict[str, int]) -> dict:
  """Times one candidate in this process."""
  import jax

  from experiments import kernel_bench
  from lcx import timing

  if _FUNCTION.value == 'block_sparse':
    cases = kernel_bench.prompts(
      [_TOKENS.value], [], 'gpu', [sizes] if sizes else [], peers=False
    )
  else:
    cases = kernel_bench.decodes(
      [_TOKENS.value],
      [int(_BITS.value)],
      'gpu',
      [sizes] if sizes else [],
      peers=False,
    )
  (case,) = cases
  call = list(case.calls.values())[-1]()
  time = timing.measure(call.function, call.inputs, shared=call.shared)
  return {'ms': time.ms, 'device': jax.devices()[0].device_kind}


def main(argv: list[str]) -> None:
  """Measures one candidate, or sweeps them all and writes the best."""
  del argv
  if _CANDIDATE.value:
    print(json.dumps(measure(json.loads(_CANDIDATE.value))))
    return
  found = []
  for sizes in candidates(_FUNCTION.value):
    command = [
      sys.executable,
      '-m',
      'experiments.tune_blocks',
      f'--function={_FUNCTION.value}',
      f'--tokens={_TOKENS.value}',
      f'--bits={_BITS.value}',
      f'--candidate={json.dumps(sizes) if sizes else "{}"}',
    ]
    try:
      done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
      )
    except subprocess.TimeoutExpired:
      print(f'{sizes}: longer than {LIMIT_S} s')
      continue
    if done.returncode:
      print(f'{sizes}: {(done.stderr.strip().splitlines() or ["failed"])[-1]}')
      continue
    row = json.loads(done.stdout.strip().splitlines()[-1])
    found.append((row['ms'], sizes, row['device']))
    print(f'{row["ms"]:10.4f} ms  {sizes or "default"}', flush=True)
  write(found)


def write(found: list[tuple[float, dict[str, int], str]]) -> None:
  """Enters the best candidate, if it beats the default, into the table.

  Raises:
    ValueError: the default did not run, so nothing can be compared.
  """
  default = [ms for ms, sizes, _ in found if not sizes]
  if not default:
    raise ValueError('the default sizes did not run')
  ms, sizes, device = min(found, key=lambda x: x[0])
  if ms > WORTHWHILE * default[0]:
    print('the default stays')
    return
  block = _FUNCTION.value == 'block_sparse'
  bucket = 'h128' if block else f'bits{_BITS.value}'
  table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
  table.setdefault(_FUNCTION.value, {}).setdefault(device, {})[bucket] = {
    'sizes': sizes,
    'evidence': {
      'tokens': _TOKENS.value,
      'ms': ms,
      'default_ms': default[0],
      'candidates': len(found),
    },
  }
  TABLE.write_text(json.dumps(table, indent=2, sort_keys=True) + '\n')
  print(f'{bucket}: {sizes}, {ms:.4f} ms for {default[0]:.4f}')


if __name__ == '__main__':
  app.run(main)
