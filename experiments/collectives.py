"""Bytes that the collectives of a compiled program move, read off its text.

Of a device, with P in its group and n bytes of result or operand:

  all-gather, all-to-all  (P - 1) / P * result
  all-reduce              2 (P - 1) / P * result
  reduce-scatter          (P - 1) * result
  collective-permute      pairs / devices * result: the mean of all devices,
                          where not each of them receives

A TPU's compiler writes a reduce-scatter as a computation that holds an
all-reduce, and whose name says so: it counts as (P - 1) / P * its result.
"""

import math
import re

_BYTES = {
  'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2,
  's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8,
}  # fmt: skip
_OP = re.compile(
  r' = (?P<shape>.*?) (?P<op>all-gather|all-to-all|collective-permute|'
  r'all-reduce|reduce-scatter)(?P<start>-start)?\('
)
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')
_LISTED = re.compile(r'replica_groups=\{\{([\d,]*)\}')
_MESH = re.compile(r'replica_groups=mesh\[(.*?)\] \{(.*?)\}')
_PAIRS = re.compile(r'source_target_pairs=\{(\{[\d,{}]*\})\}')
_IOTA = re.compile(r'replica_groups=\[(\d+),(\d+)\]')


def collective_bytes(text: str, devices: int) -> dict[str, float]:
  """Bytes that a device receives, by kind of collective; {} without any.

  Args:
    text: `compiled.as_text()`.
    devices: of the program: where an op names no groups, and of permutes.

  Each op counts once, in a loop or a branch, too.
  """
  found: dict[str, float] = {}
  scattered = False
  for line in text.splitlines():
    if line.endswith('{'):  # a computation begins
      scattered = line.startswith('%all-reduce-scatter')
    match = _OP.search(line)
    if not match:
      continue
    arrays = [
      _BYTES[kind] * math.prod(map(int, filter(None, dims.split(','))))
      for kind, dims in _ARRAY.findall(match['shape'])
      if kind in _BYTES
    ]
    op = match['op']
    size = float(sum(arrays))
    if match['start'] and match['shape'].startswith('('):
      arrays = [a for a in arrays if a > 4]  # without contexts
      size = float(sum(arrays[len(arrays) // 2 :]))  # results follow operands
    group = _group(line) or devices
    if scattered and op == 'all-reduce':
      op, size = 'reduce-scatter', size / group
    share = {
      'all-gather': (group - 1) / group,
      'all-to-all': (group - 1) / group,
      'all-reduce': 2 * (group - 1) / group,
      'reduce-scatter': group - 1,
      'collective-permute': (len(permuted(line)) or devices) / devices,
    }[op]
    if group > 1 or op == 'collective-permute':
      found[op] = found.get(op, 0.0) + share * size
  return found


def permuted(line: str) -> tuple[tuple[int, int], ...]:
  """(from, to) of each pair of devices of a collective-permute's line."""
  match = _PAIRS.search(line)
  pairs = re.findall(r'\{(\d+),(\d+)\}', match[1]) if match else []
  return tuple((int(a), int(b)) for a, b in pairs)


def _group(line: str) -> int:
  if match := _LISTED.search(line):
    return len(match[1].split(','))
  if match := _MESH.search(line):
    sizes = dict(part.split('=') for part in match[1].split(','))
    return math.prod(int(sizes[name]) for name in match[2].split(','))
  if match := _IOTA.search(line):
    return int(match[2])
  return 0
