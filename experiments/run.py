"""Runs a config: evaluates, measures, trains or sweeps, as its `kind` says.

python -m experiments.run --config=configs/NAME.py[:ARGS]
    [--config.FIELD=VALUE ...] [--workdir=DIR] [--debug]

ARGS are comma separated: `smoke` for a run of seconds, `method=NAME` where the
config compares methods. A run that was cut off goes on where it stood when the
same command is given again. Exit code 0: done; 2: bad input; 1: failure.

On several hosts, give the same command on each, with --distributed where JAX
knows the cluster, else with --coordinator, --processes and --process.
"""

import argparse
import ast
import importlib
import importlib.util
import logging as python_logging
import os
import pathlib
import sys
import traceback
from typing import Any

from absl import flags, logging
from ml_collections import config_flags
from ml_collections.config_flags import config_flags as config_files

from experiments import environment, errors, processes, resolve

KINDS = (
  'evaluate',
  'long_output',
  'measure',
  'measure_methods',
  'measure_prefill',
  'measure_retrieval',
  'train',
  'train_head_profile',
  'train_retaining_head',
  'sweep',
)
_SHOWN = (
  'config', 'workdir', 'coordinator', 'processes', 'process', 'distributed',
  'heartbeat', 'debug',
)  # fmt: skip
SPREADS = ('evaluate',)  # kinds that several processes may share
ROOT = pathlib.Path(__file__).resolve().parent.parent

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The config file, with arguments after a colon.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where rows and reports go (default: runs/NAME).'
)
# Read by `_join`, before the other flags.
flags.DEFINE_string(
  'coordinator', '', 'HOST:PORT of process 0, where a run has several.'
)
flags.DEFINE_integer('processes', 0, 'How many processes.')
flags.DEFINE_integer('process', -1, 'Number of this one, from 0.')
flags.DEFINE_bool(
  'distributed', False, 'Several processes, found by JAX: Slurm, GKE, TPU.'
)
flags.DEFINE_integer(
  'heartbeat', 30, 'Seconds of silence after which a process is dead.'
)
_DEBUG = flags.DEFINE_bool('debug', False, 'Show the traceback of an error.')


def main(argv: list[str]) -> int:
  """Runs one command line and returns its exit code."""
  if {'-h', '--help', '--helpshort', '--helpfull'} & set(argv[1:]):
    print(help_text())
    return 0
  debug = '--debug' in argv
  try:
    _join(argv)
    _parse(argv)
    run()
    return 0
  except (Exception, KeyboardInterrupt) as error:
    if debug:
      traceback.print_exc()
    line, code = errors.describe(error)
    processes.fail(line, code)
    print(f'error: {line}', file=sys.stderr)
    return code


def _join(argv: list[str]) -> None:
  """Joins the other processes before anything else can go wrong in one."""
  early = argparse.ArgumentParser(
    add_help=False, allow_abbrev=False, exit_on_error=False
  )
  early.add_argument('--coordinator', default='')
  early.add_argument('--processes', type=int, default=0)
  early.add_argument('--process', type=int, default=-1)
  early.add_argument('--heartbeat', type=int, default=30)
  early.add_argument('--distributed', nargs='?', const='true', default='')
  try:
    found, _ = early.parse_known_args(argv[1:])
  except argparse.ArgumentError as error:
    raise ValueError(str(error)) from error
  if found.coordinator or found.distributed.lower() in ('true', '1'):
    processes.start(
      found.coordinator,
      found.processes,
      found.process,
      heartbeat=found.heartbeat,
    )


def run() -> None:
  """Resolves the parsed config and hands it to the module of its kind."""
  values = _plain(_CONFIG.value)
  kind = values.pop('kind', None)
  if kind not in KINDS:
    raise ValueError(f'config.kind={kind!r} must be one of {", ".join(KINDS)}')
  name = f'experiments.{kind}'
  if importlib.util.find_spec(name) is None:
    raise ValueError(f'config.kind={kind!r}: there is no {name} yet')
  cache = values.pop('compilation_cache', '')
  module = importlib.import_module(name)
  config = resolve.resolve(module.Config, values)
  if processes.count() > 1 and kind not in SPREADS:
    raise ValueError(
      f'config.kind={kind!r} runs in one process; in several: '
      f'{", ".join(SPREADS)}'
    )
  processes.agree(
    {f'config.{name}': value for name, value in values.items()}
    | {'the code': environment.code_version(), 'kind': kind}
    | environment.versions()
  )
  _keep_compilations(cache)
  module.run(config, _workdir())
  processes.finish()


def _workdir() -> pathlib.Path:
  if _WORKDIR.value:
    return pathlib.Path(_WORKDIR.value)
  name, _, arg = _config_name().partition(':')
  words = [pathlib.Path(name).stem, *arg.replace('=', '-').split(',')]
  return pathlib.Path('runs', '_'.join(filter(None, words)).replace('/', '-'))


def _config_name() -> str:
  return config_flags.get_config_filename(flags.FLAGS['config'])


def _keep_compilations(folder: Any) -> None:
  """Keeps compiled programs on disk, where this is possible."""
  import jax

  if not isinstance(folder, str):
    raise ValueError(f'config.compilation_cache={folder!r} must be str')
  if not folder:
    return
  path = pathlib.Path(folder).expanduser().absolute()
  try:
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
      raise PermissionError(13, 'not writable', str(path))
  except OSError as error:
    logging.warning('compilations are not kept: %s', error)
    return
  jax.config.update('jax_compilation_cache_dir', str(path))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def _parse(argv: list[str]) -> None:
  """Parses flags; every mistake becomes a ValueError of one line."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  python_logging.getLogger('jax').setLevel(python_logging.ERROR)
  if '--debug' not in argv:
    logging.get_absl_logger().addFilter(errors.no_traceback)
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    raise ValueError(_one_line(str(error))) from error
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(_bad_override(argv) or _one_line(str(error))) from error
  if len(rest) > 1:
    raise ValueError(f'{rest[1]!r} is no flag; --help shows what there is')
  try:
    config = _CONFIG.value
    if config is not None:
      config.get('kind')  # a file that is not there fails on first use
  except Exception as error:
    raise ValueError(f'--config: {_one_line(str(error))}') from error
  if config is None:
    raise ValueError('give --config=configs/NAME.py; --help lists them')


def _one_line(text: str) -> str:
  """The message of an absl error; the last line where it holds a traceback."""
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  if not lines:
    return 'the flags cannot be read'
  if 'Traceback' in text:
    return f'{lines[0].split(": Error whilst")[0]}: {lines[-1]}'
  return ' '.join(lines)


def _bad_override(argv: list[str]) -> str | None:
  """Names the first `--config.a.b` that the config does not have."""
  given = [a.lstrip('-').partition('=') for a in argv[1:]]
  file = next((value for name, _, value in given if name == 'config'), '')
  try:
    config = config_files.ConfigFileFlagParser('config').parse(file)
    config.keys()
  except (ValueError, TypeError, OSError):
    return None
  for name, _, _ in given:
    here, at = config, 'config'
    for word in name.split('.')[1:] if name.startswith('config.') else ():
      at = f'{at}.{word}'
      if not hasattr(here, 'keys') or word not in here:
        known = here.keys() if hasattr(here, 'keys') else ()
        return resolve.unknown(at, word, known)
      here = here[word]
  return None


def _plain(config: Any) -> Any:
  """A ConfigDict as nested dicts, in its own order, references resolved."""
  if hasattr(config, 'items') and hasattr(config, 'keys'):
    return {k: _plain(config[k]) for k in config}
  return config


def help_text() -> str:
  """Usage, the configs with their first line, the methods with theirs."""
  lines = [(__doc__ or '').strip(), '', 'Configs:']
  for path in sorted((ROOT / 'configs').glob('*.py')):
    if path.stem not in ('common', '__init__'):
      doc = ast.get_docstring(ast.parse(path.read_text())) or ''
      lines.append(f'  {path.stem:20} {doc.partition(chr(10))[0]}')
  lines += ['', 'Methods:']
  compose = importlib.import_module('lcx.methods.compose')
  for name in compose.names():
    lines.append(f'  {name:20} {compose.about(name)}')
  lines += [
    '  prefill+cache+decode  parts of three methods, e.g. dense+paged+quest',
    '',
    'Flags:',
    *(
      f'  --{flag.name:18} {flag.help}'
      for flag in (flags.FLAGS[n] for n in _SHOWN)
    ),
  ]
  return '\n'.join(lines)


if __name__ == '__main__':
  if '--debug' not in sys.argv:
    sys.unraisablehook = errors.unraisable
  sys.exit(main(sys.argv))
