"""APB's quality by task, hosts and part, beside dense and Star.

python -m experiments.run --config=configs/apb_quality.py

RULER on a real model with 4 hosts on one device (virtual: the numbers are those
of 4 devices). Arguments: `part=tasks` (all methods by task; default),
`part=hosts` (2, 4 and 8 hosts, APB and Star), `part=ablation` (anchor, passing,
compressor and question in the anchor, each off; several parts with `/` between
them), `hosts=N` (instead of 4: a multiple of the mesh's seq axis; not with
`part=hosts`), `heads=FILE` (adds trained retaining heads), `method=` (labels of
the part, `/` between them, beside dense), `alone` (without dense: as in
ruler_real), `samples=N`, `length=N`, `short` (needles in 2K tokens alone:
minutes on a CPU), `needle` (the same by the bundled model), `smoke`.
`--config.model=PATH` takes any Hugging Face folder or GGUF file.
"""

import functools

from configs import common

TASKS = (
  'niah_single_2',
  'niah_multikey_1',
  'niah_multivalue',
  'niah_multiquery',
  'vt',
  'fwe',
)


def get_config(arg=''):
  arg = common.parse_arg(
    arg,
    part='tasks',
    hosts=0,
    heads='',
    method='',
    alone=False,
    samples=50,
    length=0,
    short=False,
    needle=False,
  )
  config = common.base('evaluate', f"APB's quality: {arg.part}")
  config.model = '.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf'
  config.dtype = 'auto'
  parts = {'tasks': tasks, 'hosts': hosts, 'ablation': ablation}
  rows = {}
  for part in arg.part.split('/'):
    if part not in parts:
      raise ValueError(
        f'config argument part={part!r}: one of {", ".join(parts)}'
      )
    if arg.hosts and part == 'hosts':
      raise ValueError(
        f'config argument hosts={arg.hosts}: part=hosts has its own, leave it '
        'out'
      )
    rows |= parts[part](arg.hosts or 4, arg.heads)
  common.rows(arg.method, rows)  # names that are not there are refused
  config.methods = common.methods(arg.method, {'dense': {}} | rows, arg.alone)
  config.tasks = common.table({name: {} for name in TASKS})
  config.lengths = (arg.length,) if arg.length else (16384, 32768)
  config.samples = arg.samples
  config.protocols = ('whole',)
  config.max_new_tokens = 0
  config.batch = 1
  config.capacity = 0
  config.seed = 0
  config.haystack = ''
  config.mesh = (1, 1, 1)
  config.new_keys = 'last'
  config.residual = 'whole'
  config.transfer_guard = 'allow'
  if arg.short or arg.needle:
    config.tasks = common.table({n: {'questions': 1} for n in TASKS[:2]})
    config.lengths = (arg.length or 2048,)
    config.max_new_tokens = 24
  if arg.needle:
    config.model = 'lcx/models/needle'
    config.dtype = 'float32'
    config.max_new_tokens = 12
  if arg.smoke:
    config.model = 'preset:tiny'
    few = apb(arg.hosts or 2)
    config.methods = common.methods('', {'dense': {}, 'apb': few}, arg.alone)
    config.tasks = common.table({'niah_single_2': {}})
    config.lengths = (512,)
    config.samples = 1
    config.max_new_tokens = 2
  return config


def apb(hosts, **fields):
  # What is asked for is measured, whatever the policy file advises.
  return {'method': 'apb', 'hosts': hosts, 'crossover': 0} | fields


def trained(n, heads):
  if not heads:
    return {}
  return {'apb heads': apb(n, compressor='retaining_head', heads=heads)}


def tasks(n, heads):
  return {
    'star': {'hosts': n, 'crossover': 0},
    'apb': apb(n),
    'apb snapkv': apb(n, compressor='snapkv'),
    'apb query seen': apb(n, first_sees_query=True),
    # Two hosts a device, from both ends.
    f'apb zigzag {2 * n}': apb(2 * n, order='zigzag'),
    'apb local half': apb(n, density=0.5),
    'apb every 2nd layer': apb(n, every=2),
    **trained(n, heads),
  }


def hosts(n, heads):
  del n, heads
  rows = {}
  for n in (2, 4, 8):
    rows[f'star {n}'] = {'method': 'star', 'hosts': n, 'crossover': 0}
    rows[f'apb {n}'] = apb(n)
  return rows


def ablation(n, heads):
  """The paper's table 3; 'query' as a compressor needs the question."""
  silent = {'query_in_anchor': False}
  row = functools.partial(apb, n)
  return {
    'apb': row(),
    **trained(n, heads),
    'snapkv': row(compressor='snapkv'),
    'snapkv no query': row(compressor='snapkv', **silent),
    'random': row(compressor='random'),
    'random no query': row(compressor='random', **silent),
    'no passing': row(passing=0),
    'no passing no query': row(passing=0, compressor='random', **silent),
    'no anchor': row(anchor=0, compressor='snapkv', **silent),
    'no anchor random': row(anchor=0, compressor='random', **silent),
    'nothing': row(anchor=0, passing=0, compressor='random', **silent),
    'gap': row(gap=True),
  }
