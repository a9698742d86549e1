"""The Hopper kernels through the CUDA compiler, on a machine without a GPU."""

import json

import pytest

from experiments import gpu_schedule
from kernels_pallas.selected_token import gpu as selected_token_gpu

needs_compiler = pytest.mark.skipif(
  gpu_schedule.missing() is not None,
  reason='jax-cuda13-plugin, which compiles for CUDA, is not installed',
)
MEASURED = ('registers', 'spill_stores_bytes', 'shared_bytes', 'instructions')
SHARED = 227 * 1024  # bytes that a program may take
# A case a kernel and kind of page; the others in the long run.
FEW = (('block_sparse', 128), ('attend_pages', 8, 1))


def committed():
  return [json.loads(x) for x in gpu_schedule.RESULTS.read_text().splitlines()]


def check(found):
  assert found['spill_stores_bytes'] == 0
  assert 0 < found['registers'] <= 255
  assert 0 < found['shared_bytes'] <= SHARED


@needs_compiler
@pytest.mark.h100_aot
@pytest.mark.parametrize(
  'case',
  [
    pytest.param(c, marks=[] if c in FEW else pytest.mark.long)
    for c in gpu_schedule.CASES
  ],
)
def test_a_kernel_compiles_without_spills(case):
  found = gpu_schedule.row(*case)
  check(found)
  now = {'versions', 'date'}
  (want,) = [
    r for r in committed()
    if all(r.get(k) == found[k] for k in found.keys() - now - set(MEASURED))
  ]  # fmt: skip
  if want['versions'] == found['versions']:  # layouts are searched for: about
    for name in MEASURED:
      assert found[name] == pytest.approx(want[name], rel=0.1), name


def test_as_many_decode_programs_fit_as_splits_are_made_for():
  rows = [r for r in committed() if r['kernel'] == 'attend_pages']
  for row in rows:
    programs = selected_token_gpu.PROGRAMS[row['bits']]
    # Of 228 KiB a multiprocessor, 1 KiB a program is the system's.
    assert programs * (row['shared_bytes'] + 1024) <= 228 * 1024, row
  assert len(rows) == 6


def test_every_kernel_has_its_row():
  rows = committed()
  assert len(rows) == len(gpu_schedule.CASES)
  for case, row in zip(gpu_schedule.CASES, rows, strict=True):
    assert row['kernel'] == case[0]
    numbers = [row[k] for k in ('head_dim', 'bits', 'queries') if k in row]
    assert numbers == list(case[1:])
    check(row)


def test_the_assemblers_report_is_read(tmp_path):
  said = 'info : 8 bytes spill stores, 4 bytes spill loads\n'
  (tmp_path / 'k.ptxas').write_text(said + 'info : Used 70 registers, used 2')
  (tmp_path / 'k.resources.txt').write_text('R(smem_scratch_bytes=512, x=1)')
  (tmp_path / 'k.sass_ctrl').write_text(
    '.L_1:\n -- /*00f0*/ MOV\n /*0100*/ X\n'
  )
  assert gpu_schedule.read(str(tmp_path)) == {
    'registers': 70,
    'spill_stores_bytes': 8,
    'shared_bytes': 512,
    'instructions': 2,
  }
  (tmp_path / 'k.ptxas').write_text('nothing')
  with pytest.raises(ValueError, match='no report of the CUDA assembler'):
    gpu_schedule.read(str(tmp_path))
