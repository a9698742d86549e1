"""How every test runs: on the CPU, as 8 devices, compilations cached."""

import os
import pathlib

import hypothesis
import pytest

ROOT = pathlib.Path(__file__).parent.parent

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
  os.environ['XLA_FLAGS'] = ' '.join(
    (
      os.environ.get('XLA_FLAGS', ''),
      '--xla_force_host_platform_device_count=8',
      # Two cores play 8 devices: one that comes late to a collective would
      # abort the process.
      '--xla_cpu_collective_call_terminate_timeout_seconds=600',
    )
  )


def pytest_collection_modifyitems(config, items):
  """Skips GPU tests elsewhere; tests of a mesh share one worker."""
  on_gpu = config.getoption('--platform') == 'gpu'
  for item in items:
    if item.get_closest_marker('gpu') and not on_gpu:
      item.add_marker(pytest.mark.skip(reason='needs --platform=gpu'))
    if item.get_closest_marker('mesh'):
      item.add_marker(pytest.mark.xdist_group('mesh'))
