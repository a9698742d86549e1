"""LServe on RULER: budgets, reuse, page sizes, cache types, scorers.

python -m experiments.run --config=configs/lserve_budget.py

Arguments: `profile=FILE` (of configs/train_head_profile.py; without one no head
streams, and all rows share dense's prefills), `vary=budget|reuse|page|cache|
scorer|piece` (one column of the table), `method=NAME` (one row beside dense),
`task=NAME` (one, several with `/` between them, or `ruler` for all of it),
`samples=N`, `smoke`. The default model is small; --config.model and
--config.lengths take any other. `needle` takes the bundled model at 4K, budgets
of a quarter and tasks that it can do: minutes on a CPU.
"""

from configs import common

TASKS = ('niah_single_2', 'niah_multikey_1', 'niah_multivalue', 'vt')


def get_config(arg=''):
  arg = common.parse_arg(
    arg, method='', profile='', vary='', task='', samples=100, needle=False
  )
  config = common.base('evaluate', 'LServe: what its numbers cost in quality')
  config.model = '.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf'
  config.dtype = 'bfloat16'
  rows = {'dense': {}}
  lserve = {'method': 'dense+lserve+lserve'}
  if arg.profile:
    lserve = {'method': 'lserve', 'profile': arg.profile}
  for vary, variants in _variants(4 if arg.needle else 1).items():
    if arg.vary in ('', vary):
      rows |= {
        f'lserve {name}': lserve | fields for name, fields in variants.items()
      }
  config.methods = common.methods(arg.method, rows)
  config.tasks = common.tasks(arg.task, {name: {} for name in TASKS})
  config.lengths = (8192,)
  config.samples = arg.samples
  config.protocols = ('whole', 'context_first')
  config.max_new_tokens = 0
  config.batch = 1
  config.capacity = 0
  config.seed = 0
  config.haystack = ''
  config.shared_gib = 8.0
  config.transfer_guard = 'allow'
  if arg.needle:
    config.model = 'lcx/models/needle'
    config.dtype = 'float32'
    config.lengths = (4096,)
    config.protocols = ('whole',)
    config.max_new_tokens = 24
    config.tasks = common.tasks(arg.task, {name: {} for name in TASKS[:2]})
  if arg.smoke:
    config.model = 'preset:tiny'
    config.dtype = 'float32'
    config.methods = common.table(
      {'dense': {}, 'lserve': {'budget': 384, 'profile': 'alternate'}}
    )
    config.tasks = common.table({'niah_single_2': {}})
    config.lengths = (512,)
    config.samples = 1
    config.protocols = ('whole',)
    config.max_new_tokens = 2
  return config


def _variants(small):
  """Labels name the undivided budgets."""

  def budget(n):
    decode = {'budget': n // small, 'crossover': 0}
    if small > 1:
      decode |= {'sink': 64, 'recent': 256 // small}
    return {'decode': decode}

  two = budget(2048)
  pages = {
    f'page={page}': {'cache': {'logical_page': 16, 'page': page}}
    for page in (16, 32)
  }
  alone = {
    f'page={n}, logical={n}': {'cache': {'page': n, 'logical_page': n}}
    for n in (32, 64)
  }
  alone['page=64, logical=8'] = {'cache': {'page': 64, 'logical_page': 8}}
  moments = {'scorer': 'moments', 'stats': 'moments'}
  return {
    'budget': {f'budget={n}': budget(n) for n in (1024, 2048, 4096, 8192)},
    'reuse': {f'reuse={n}': two | {'reuse': n} for n in (1, 2, 8, 16)},
    'page': {name: two | fields for name, fields in (pages | alone).items()},
    'cache': {f'bits={n}': two | {'bits': n} for n in (8, 4)},
    'scorer': {
      'moments': two | moments,
      'moments, logical=4': two | moments | {'logical_page': 4},
      'group=sum': two | {'group': 'sum'},
      'looseness=50%': two | {'looseness': 0.5},
      'looseness=70%': two | {'looseness': 0.7},
    },
    # Pieces of a question see everything: of use context first alone.
    'piece': {
      'piece=1': two | {'selected_piece': 1},
      'piece=1 looseness=70%': two | {'selected_piece': 1, 'looseness': 0.7},
    },
  }
