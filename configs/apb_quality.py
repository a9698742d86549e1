"""APB's quality by task, hosts and part, beside dense and Star.

python -m experiments.run --config=configs/apb_quality.py

RULER on a real model with 4 hosts on one device (virtual: the numbers are those
of 4 devices). Arguments: `part=tasks` (all methods by task; default),
`part=hosts` (2, 4 and 8 hosts, APB and Star), `part=ablation` (anchor, passing,
compressor and question in the anchor, each off), `heads=FILE` (adds trained
retaining heads), `samples=N`, `length=N`, `short` (needles in 2K tokens alone:
minutes on a CPU), `needle` (the same by the bundled model), `smoke`.
`--config.model=PATH` takes any Hugging Face folder or GGUF file.
"""

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
    heads='',
    samples=50,
    length=0,
    short=False,
    needle=False,
  )
  config = common.base('evaluate', f"APB's quality: {arg.part}")
  config.model = '.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf'
  config.dtype = 'auto'
  parts = {'tasks': tasks, 'hosts': hosts, 'ablation': ablation}
  if arg.part not in parts:
    raise ValueError(
      f'config argument part={arg.part!r}: one of {", ".join(parts)}'
    )
  config.methods = common.table({'dense': {}} | parts[arg.part](arg.heads))
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
    config.methods = common.table({'dense': {}, 'apb': apb(hosts=2)})
    config.tasks = common.table({'niah_single_2': {}})
    config.lengths = (512,)
    config.samples = 1
    config.max_new_tokens = 2
  return config


def apb(**fields):
  # What is asked for is measured, whatever the policy file advises.
  return {'method': 'apb', 'hosts': 4, 'crossover': 0} | fields


def trained(heads):
  if not heads:
    return {}
  return {'apb heads': apb(compressor='retaining_head', heads=heads)}


def tasks(heads):
  return {
    'star': {'hosts': 4},
    'apb': apb(),
    'apb snapkv': apb(compressor='snapkv'),
    'apb query seen': apb(first_sees_query=True),
    'apb zigzag 8': apb(hosts=8, order='zigzag'),
    'apb local half': apb(density=0.5),
    'apb every 2nd layer': apb(every=2),
    **trained(heads),
  }


def hosts(heads):
  del heads
  rows = {}
  for n in (2, 4, 8):
    rows[f'star {n}'] = {'method': 'star', 'hosts': n}
    rows[f'apb {n}'] = apb(hosts=n)
  return rows


def ablation(heads):
  """The paper's table 3; 'query' as a compressor needs the question."""
  silent = {'query_in_anchor': False}
  return {
    'apb': apb(),
    **trained(heads),
    'snapkv': apb(compressor='snapkv'),
    'snapkv no query': apb(compressor='snapkv', **silent),
    'random': apb(compressor='random'),
    'random no query': apb(compressor='random', **silent),
    'no passing': apb(passing=0),
    'no passing no query': apb(passing=0, compressor='random', **silent),
    'no anchor': apb(anchor=0, compressor='snapkv', **silent),
    'no anchor random': apb(anchor=0, compressor='random', **silent),
    'nothing': apb(anchor=0, passing=0, compressor='random', **silent),
    'gap': apb(gap=True),
  }
