"""LServe writes 2,000 tokens: where it leaves dense, and what it still knows.

python -m experiments.run --config=configs/long_output.py:profile=FILE

FILE comes from configs/train_head_profile.py; without one no head streams.
Arguments: `method=NAME` (that method beside dense), `smoke`. The default model
is the bundled one; --config.model, --config.length take any other.
"""

from configs import common


def get_config(arg=''):
  arg = common.parse_arg(arg, method='', profile='')
  config = common.base('long_output', 'Long outputs')
  config.model = 'lcx/models/needle'
  rows = {
    'lserve': {'profile': arg.profile, 'budget': 1024},
    'lserve int8': {
      'method': 'lserve', 'profile': arg.profile, 'budget': 1024, 'bits': 8,
    },
  }  # fmt: skip
  config.methods = common.methods(arg.method, rows)
  config.task = 'niah_single_2'
  config.length = 4096
  config.new_tokens = 2000
  config.samples = 8
  config.weights = ''
  config.seed = 0
  config.dtype = 'auto'
  if arg.smoke:
    config.model = 'preset:tiny'
    config.dtype = 'float32'
    config.methods = common.table({'lserve': {'budget': 384}})
    config.length = 512
    config.new_tokens = 20
    config.samples = 1
  return config
