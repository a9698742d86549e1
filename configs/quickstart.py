"""SmolLM2-135M answers needles in 1K and 2K tokens: dense, streaming, quest.

python -m experiments.run --config=configs/quickstart.py

Arguments: `smoke` (a tiny model with random weights, seconds, no download),
`method=NAME` (that method beside dense). `--config.model=PATH` takes any
Hugging Face folder or GGUF file; `make demo` fetches the default one.
"""

from configs import common


def get_config(arg=''):
  arg = common.parse_arg(arg, method='')
  config = common.base('evaluate', 'Quickstart: needles in natural text')
  config.model = '.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf'
  config.dtype = 'auto'
  # One budget for both, below half of 1K tokens: there is something to lose.
  window = {'sink': 16, 'recent': 368}
  config.methods = common.methods(
    arg.method,
    {
      'dense': {},
      'streaming': {'prefill': window, 'cache': window, 'decode': window},
      'quest': {'decode': {'budget': 384, 'sink': 16, 'recent': 64}},
    },
  )
  config.tasks = common.table({'niah_single_2': {}, 'niah_multikey_1': {}})
  config.lengths = (1024, 2048)
  config.samples = 5
  config.protocols = ('whole',)
  config.max_new_tokens = 24
  config.batch = 1
  config.capacity = 0
  config.seed = 0
  config.haystack = ''
  config.mesh = (1, 1, 1)
  config.new_keys = 'last'
  config.residual = 'whole'
  config.transfer_guard = 'allow'
  if arg.smoke:
    config.model = 'preset:tiny'
    config.lengths = (512,)
    config.samples = 2
    config.max_new_tokens = 4
  return config
