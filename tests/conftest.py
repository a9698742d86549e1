"""How every test runs: on the CPU, as 8 devices, compilations cached."""

import gc
import importlib.util
import itertools
import os
import pathlib

import hypothesis
import pytest

from tests import xla_flags

ROOT = pathlib.Path(__file__).parent.parent
# Folders whose tests compile for longer than they run: XLA leaves out most
# optimizations there, which saves a third of their time.
COMPILING = frozenset(
  {
    'cache',
    'engine',
    'experiments',
    'kernels',
    'methods',
    'models',
    'select',
    'train',
  }
)

hypothesis.settings.register_profile(
  'default', derandomize=True, deadline=None, max_examples=20, database=None
)
hypothesis.settings.register_profile(
  'long', derandomize=True, deadline=None, max_examples=500, database=None
)
hypothesis.settings.load_profile('default')


def pytest_addoption(parser):
  parser.addoption(
    '--platform',
    default='cpu',
    choices=('cpu', 'gpu', 'tpu'),
    help='where the tests run (default: cpu, as 8 fake devices)',
  )


def pytest_configure(config):
  # The environment, not jax.config: subprocesses of tests inherit it.
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(ROOT / '.cache' / 'jax')
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.5'
  os.environ['MPLBACKEND'] = 'agg'
  if config.getoption('--platform') != 'cpu':
    return
  os.environ['JAX_PLATFORMS'] = 'cpu'
  # libtpu as a compiler on a machine without a TPU: ask no metadata server,
  # and let two workers load it.
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
  os.environ['TPU_WORKER_ID'] = '0'
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  os.environ['XLA_FLAGS'] = ' '.join(
    (
      os.environ.get('XLA_FLAGS', ''),
      '--xla_force_host_platform_device_count=8',
      # Two cores play 8 devices: one that comes late to a collective would
      # abort the process.
      '--xla_cpu_collective_call_terminate_timeout_seconds=600',
      *xla_flags.FAST_TO_COMPILE,
    )
  )


def pytest_collection_modifyitems(config, items):
  """Skips what needs a GPU or libtpu; tests of a mesh share one worker."""
  on_gpu = config.getoption('--platform') == 'gpu'
  has_libtpu = importlib.util.find_spec('libtpu') is not None
  for item in items:
    if item.get_closest_marker('gpu') and not on_gpu:
      item.add_marker(pytest.mark.skip(reason='needs --platform=gpu'))
    if item.get_closest_marker('tpu_aot') and not has_libtpu:
      item.add_marker(
        pytest.mark.skip(reason='needs libtpu: make test TPU=1 installs it')
      )
    if not item.get_closest_marker('xdist_group'):
      item.add_marker(pytest.mark.xdist_group(_group(item)))


def pytest_collection_finish():
  """Python's collector no longer walks what was imported and collected.

  Tracing makes many objects and little garbage: at the default threshold of
  700 new objects a twentieth of the tests' CPU time goes into looking for it.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 10, 10)


def _group(item) -> str:
  """Tests that one worker runs: those that share what they compile."""
  if item.get_closest_marker('mesh'):
    return 'mesh'  # two meshes at once would starve each other
  params = item.callspec.params if hasattr(item, 'callspec') else {}
  return f'{item.path.stem} {params.get("name", "")}'


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Chooses how hard XLA's CPU compiler tries."""
  import jax

  hasty = item.path.parent.name in COMPILING
  hasty &= item.config.getoption('--platform') == 'cpu'
  jax.config.update('jax_disable_most_optimizations', hasty)
  # Subprocesses, too: they compile what the test does, or interpret kernels.
  os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = str(int(hasty))


_TESTS = itertools.count(1)  # counting maps takes 20 ms: at every tenth


def _memory_maps() -> int:
  try:
    with open('/proc/self/maps', 'rb') as file:
      return sum(1 for _ in file)
  except OSError:  # no Linux
    return 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
  """Lets go of a module's programs, at its end or when they are too many.

  Each takes memory maps, of which a process may have 65,530 on Linux: beyond
  that, XLA's compiler crashes.
  """
  same = nextitem is not None and nextitem.module is item.module
  if same and (next(_TESTS) % 10 or _memory_maps() < 45_000):
    return
  for value in vars(item.module).values():
    if hasattr(value, 'cache_clear'):
      value.cache_clear()
  import jax

  jax.clear_caches()
  gc.collect()
