"""TokenSelect beyond the trained length: needles where dense fails.

python -m experiments.run --config=configs/tokenselect_extrapolation.py

SmolLM2 was trained to 8K; here it reads 8K, 16K and 32K: dense, TokenSelect
with true positions, with ranks as positions (arXiv:2411.02886, section 5.4),
and an attention sink with a window, which never leaves the trained length but
forgets. Arguments: `length=N`, `samples=N`, `method=NAME` (that one beside
dense), `task=NAME` (that one alone), `smoke`.
"""

from configs import common


def get_config(arg=''):
  arg = common.parse_arg(arg, method='', task='', length=0, samples=100)
  config = common.base('evaluate', 'TokenSelect: length extrapolation')
  config.model = '.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf'
  config.dtype = 'auto'
  rank, window = {'positions': 'rank'}, {'sink': 128, 'recent': 2560}
  rows = {
    'dense': {},
    'ranks': {
      'method': 'tokenselect',
      'prefill': rank,
      'decode': rank,
      'cache': {'rotated': False},
    },
    'true positions': {'method': 'tokenselect'},
    'streaming': {'prefill': window, 'cache': window, 'decode': window},
  }
  if arg.method and arg.method not in rows:
    raise ValueError(
      f'config argument method={arg.method!r} is not one of {", ".join(rows)}'
    )
  config.methods = common.methods(arg.method, rows)
  tasks = (arg.task,) if arg.task else ('niah_single_2', 'passkey')
  config.tasks = common.table({task: {} for task in tasks})
  config.lengths = (arg.length,) if arg.length else (8192, 16384, 32768)
  config.samples = arg.samples
  config.protocols = ('whole',)
  config.max_new_tokens = 24
  config.batch = 1
  config.capacity = 0
  config.seed = 0
  config.haystack = ''
  config.shared_gib = 0.0
  config.transfer_guard = 'allow'
  if arg.smoke:
    small = {'k': 128, 'sink': 8, 'local': 32}
    config.model = 'preset:tiny'
    ranks = rows['ranks'] | {
      'prefill': {**rank, **small, 'chunk': 32},
      'decode': {**rank, **small},
    }
    config.methods = common.table({'dense': {}, 'ranks': ranks})
    config.tasks = common.table({'niah_single_2': {}})
    config.lengths = (512,)
    config.samples = 1
    config.max_new_tokens = 2
  return config
