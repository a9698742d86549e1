"""The bundled needle model at 4K tokens: dense, streaming, quest.

python -m experiments.run --config=configs/needle.py

Nothing is downloaded. Arguments: `length=16384` (or any), `samples=N`,
`method=NAME` (that method beside dense), `smoke` (seconds).
"""

from configs import common


def get_config(arg=''):
  arg = common.parse_arg(arg, method='', length=4096, samples=5)
  config = common.base('evaluate', 'Bundled model: needles and variables')
  config.model = 'lcx/models/needle'
  config.dtype = 'float32'
  window = {'sink': 4, 'recent': 1020}
  config.methods = common.methods(
    arg.method,
    {
      'dense': {},
      'streaming': {'prefill': window, 'decode': window},
      'quest': {'decode': {'budget': 512, 'sink': 16, 'recent': 64}},
    },
  )
  config.tasks = {
    'niah_single_2': {'questions': 1},
    'niah_multikey_1': {'questions': 1},
    'vt_2_hops': {'task': 'vt', 'hops': 2},
  }
  config.lengths = (arg.length,)
  config.samples = arg.samples
  config.protocols = ('whole',)
  config.max_new_tokens = 24
  config.batch = 1
  config.capacity = 0
  config.seed = 0
  config.haystack = ''
  config.transfer_guard = 'allow'
  if arg.smoke:
    config.lengths = (512,)
    config.samples = 1
    config.max_new_tokens = 6
    config.tasks = {'niah_single_2': {'questions': 1}}
  return config
