"""The bundled needle model at 4K tokens: every method, dense beside it.

python -m experiments.run --config=configs/needle.py

Nothing is downloaded. Methods that differ from dense in decode alone share one
dense prefill a sample. Arguments: `length=16384` (or any), `samples=N`,
`method=NAME` (that method beside dense), `smoke` (seconds).
"""

from configs import common

# Budgets of at most a quarter of 4K tokens; a method not named here, new
# ones included ('*'), runs with its own numbers.
_WINDOW = {'sink': 4, 'recent': 1020}
_BUDGETS = {
  'dense': {},
  'a_shape': {'prefill': {'sink': 64, 'recent': 960}},
  'lserve': {
    'prefill': {'sink': 64, 'local': 960},
    'decode': {'budget': 512, 'sink': 64, 'recent': 128},
  },
  'quest': {'decode': {'budget': 512, 'sink': 16, 'recent': 64}},
  'retrieval': {'decode': {'queries': 512, 'neighbours': 32}},
  'retrieval_cluster': {
    'decode': {
      'top': 64,
      'probe': 512,
      'sink': 64,
      'recent': 128,
      'segment': 512,
    },
  },
  'snapkv': {'decode': {'budget': 512}},
  'streaming': {'prefill': _WINDOW, 'cache': _WINDOW, 'decode': _WINDOW},
  'tokenselect': {
    'prefill': {'k': 256, 'sink': 16, 'local': 256, 'chunk': 128},
    'decode': {'k': 256, 'sink': 16, 'local': 256},
  },
  'vertical_slash': {'prefill': {'columns': 256, 'diagonals': 512}},
  '*': {},
}


def get_config(arg=''):
  arg = common.parse_arg(arg, method='', length=4096, samples=2)
  config = common.base('evaluate', 'Bundled model: needles in 4K tokens')
  config.model = 'lcx/models/needle'
  config.dtype = 'float32'
  config.methods = common.methods(arg.method, _BUDGETS)
  config.tasks = {
    'niah_single_2': {'questions': 1},
    'niah_multikey_1': {'questions': 1},
  }
  config.lengths = (arg.length,)
  config.samples = arg.samples
  config.protocols = ('whole',)
  config.max_new_tokens = 12
  config.batch = 1
  config.capacity = 0
  config.seed = 0
  config.haystack = ''
  config.shared_gib = 4.0
  config.transfer_guard = 'allow'
  if arg.smoke:
    config.methods = common.methods(arg.method or 'streaming', _BUDGETS)
    config.lengths = (512,)
    config.samples = 1
    config.max_new_tokens = 6
    config.tasks = {'niah_single_2': {'questions': 1}}
  return config
