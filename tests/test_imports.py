"""The architecture, read off the imports: who may import whom."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ('kernels_pallas', 'lcx', 'experiments', 'configs')
# What a package must not import, transitively or not: each file is read.
FORBIDDEN = {
  'kernels_pallas': {
    'lcx', 'experiments', 'configs', 'flax', 'absl', 'ml_collections',
  },
  'lcx': {'experiments', 'configs', 'absl', 'ml_collections'},
  'experiments': {'configs'},
  'configs': {'kernels_pallas', 'lcx', 'experiments'},
}  # fmt: skip
MAX_LINES = 600

FILES = sorted(
  path for package in PACKAGES for path in (ROOT / package).rglob('*.py')
)


def imported_roots(source: str) -> set[str]:
  """Top-level packages that a file imports, anywhere in it."""
  roots = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      roots |= {alias.name.split('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
      roots.add(node.module.split('.')[0])
  return roots


@pytest.mark.parametrize(
  'package', [p for p in PACKAGES if (ROOT / p).exists()]
)
def test_imports_point_one_way(package):
  wrong = [
    f'{path.relative_to(ROOT)} imports {", ".join(sorted(bad))}'
    for path in FILES
    if path.relative_to(ROOT).parts[0] == package
    and (bad := imported_roots(path.read_text()) & FORBIDDEN[package])
  ]
  assert not wrong, '\n'.join(wrong)


def test_no_relative_imports():
  wrong = [
    str(path.relative_to(ROOT))
    for path in FILES
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.ImportFrom) and node.level
  ]
  assert not wrong, wrong


def test_files_are_small_and_named_for_what_they_hold():
  files = FILES + sorted((ROOT / 'tests').rglob('*.py'))
  too_long = {
    str(path.relative_to(ROOT)): lines
    for path in files
    if (lines := len(path.read_text().splitlines())) > MAX_LINES
  }
  assert not too_long, f'over {MAX_LINES} lines: {too_long}'
  drawers = [path for path in files if path.stem in ('utils', 'helpers')]
  assert not drawers, drawers


# Checkpoints and snapshots of an index, which they are asked for.
WRITERS = ('lcx/models/checkpoint.py', 'lcx/select/vector_index.py')


def test_lcx_writes_no_files():
  """Only what it is asked for: no open(..., 'w') elsewhere."""
  wrong = []
  for path in FILES:
    if str(path.relative_to(ROOT)) in WRITERS:
      continue
    if path.relative_to(ROOT).parts[0] not in ('kernels_pallas', 'lcx'):
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if not isinstance(node, ast.Call):
        continue
      name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
      writes = name in ('write_text', 'write_bytes') or (
        name == 'open'
        and any(
          isinstance(arg, ast.Constant)
          and isinstance(arg.value, str)
          and arg.value[:1] in ('w', 'a', 'x')
          and len(arg.value) <= 3
          for arg in [*node.args, *(k.value for k in node.keywords)]
        )
      )
      if writes:
        wrong.append(f'{path.relative_to(ROOT)}:{node.lineno}')
  assert not wrong, wrong


def test_the_reader_of_imports_reads():
  source = 'import a.b\ndef f():\n  from c.d import e\nfrom . import g\n'
  assert imported_roots(source) == {'a', 'c'}
