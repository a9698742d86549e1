"""Where a row comes from: revision, versions, device, sources."""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable

import jax

from lcx import cores

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Modules of this folder that decide what a row says.
_SAID_BY = ('answers', 'prompts')
_PACKAGES = ('jax', 'jaxlib', 'flax', 'numpy', 'ml_dtypes', 'tokenizers')
# What may stand beside in a benchmark; named where it is installed.
_PEERS = ('torch', 'tokamax', 'flashinfer-python', 'faiss-cpu')


def git() -> str:
  """The revision; `-dirty` where tracked files differ; `unknown` outside.

  LCX_REVISION names it where a copy without a repository runs.
  """
  if named := os.environ.get('LCX_REVISION'):
    return named
  command = ['git', '-C', str(ROOT), 'describe', '--always', '--dirty']
  command += ['--abbrev=12', '--exclude=*']
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, timeout=20, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return 'unknown'
  return done.stdout.strip()


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that decide numbers."""
  found = {'python': platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = 'absent'
  for name in _PEERS:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def device() -> str:
  """Kind and number of devices, as in `2 x NVIDIA H100 80GB HBM3`."""
  devices = jax.devices()
  return f'{len(devices)} x {devices[0].device_kind}'


def command() -> str:
  """This run's command line, without the folder that it was started in."""
  return ' '.join(('python -m experiments.run', *map(quoted, sys.argv[1:])))


def quoted(word: str) -> str:
  """A word of a command as a shell takes it, in double quotes where they do."""
  plain = shlex.quote(word)
  if plain == word or re.search(r'["$`\\!]', word):
    return plain
  return f'"{word}"'


def describe() -> dict:
  """The content of env.json."""
  revision = git()
  return {
    'git': revision,
    'dirty': revision.endswith('-dirty'),
    'versions': versions(),
    'device': device(),
    'platform': jax.default_backend(),
    'processes': jax.process_count(),
    'cores': cores.available(),
    'machine': platform.platform(),
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
    'command': command(),
  }


def code_version(methods: Iterable[str] = ()) -> str:
  """A hash of the sources that decide a quality row.

  These are all of `lcx` and `kernels_pallas` but the files of methods that the
  row does not use, and the modules here that ask and score. So an edit of a
  method, or a new one, computes that method again and no other; a change of
  anything shared computes everything again; README and plots cost nothing.

  Args:
    methods: names of the modules in `lcx/methods` that the row uses.
  """
  folder = ROOT / 'lcx' / 'methods'
  used = _closure(folder, methods)
  digest = hashlib.blake2b(digest_size=16)
  for path in _sources():
    if path.parent == folder and path.stem not in used:
      continue
    digest.update(f'{path.relative_to(ROOT)}\0'.encode())
    digest.update(_bytes(path) + b'\0')
  return digest.hexdigest()


@functools.cache
def _sources() -> tuple[pathlib.Path, ...]:
  found = [ROOT / 'experiments' / f'{name}.py' for name in _SAID_BY]
  for package in ('lcx', 'kernels_pallas'):
    for suffix in ('*.py', '*.json'):
      found += (ROOT / package).rglob(suffix)
  return tuple(sorted(found))


@functools.cache
def _bytes(path: pathlib.Path) -> bytes:
  return path.read_bytes()


def _closure(folder: pathlib.Path, methods: Iterable[str]) -> set[str]:
  """Modules of a folder that the named ones import, themselves included."""
  names = {p.stem for p in folder.glob('*.py')}
  todo = [*methods, '__init__', 'base', 'compose']
  used: set[str] = set()
  while todo:
    name = todo.pop()
    if name in used or name not in names:
      continue
    used.add(name)
    for node in ast.walk(ast.parse(_bytes(folder / f'{name}.py'))):
      if isinstance(node, ast.ImportFrom):
        base = node.module or ''
        words = [f'{base}.{a.name}' for a in node.names] + [base]
      elif isinstance(node, ast.Import):
        words = [a.name for a in node.names]
      else:
        continue
      todo += [w.split('.')[2] for w in words if w.startswith('lcx.methods.')]
  return used
