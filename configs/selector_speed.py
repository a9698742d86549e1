"""Selectors: estimate and whole attention beside dense cuDNN, 1K to 256K.

python -m experiments.run --config=configs/selector_speed.py

Arguments: `smoke` (a short prompt, no peer, seconds on a CPU), `length=N` (one
length in place of all), `real` (queries and keys of Qwen2.5-Coder-0.5B from
.cache/models, by chunks of 32K, thresholds beside densities; another model:
`--config.numbers.model=PATH`), `decode` (snapkv's gain: decode attention of a
layer beside dense). The ratio of an `attention` row is the speed-up
over cuDNN; `python -m experiments.fit_policy` reads crossovers off the rows.
"""

from configs import common

FIXED = ('a_shape_1024_4096', 'snapkv_2048')  # alike on any keys
# On random keys no block's mean is like its keys, and columns fall anywhere:
# these would list everything.
REAL = (
  'sparge_20',
  'sparge_60',
  'vertical_slash_128_256',
  'vertical_slash_1000_6096',
  FIXED[0],  # how much of a model's mass its tokens hold
)
MODEL = '.cache/models/qwen2.5-coder-0.5b-instruct.gguf'


def get_config(arg=''):
  arg = common.parse_arg(arg, length=0, real=False, decode=False)
  if arg.decode:
    return decode(arg)
  config = common.base('measure', 'Selectors: estimate and attention')
  config.suite = 'selector_bench'
  lengths = tuple(1024 * n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256))
  config.numbers = common.table(
    {
      'lengths': (arg.length,) if arg.length else lengths,
      'shares': (8, 16),
      'selectors': ('xattention_16', 'xattention_8', 'sparge')
      + (REAL if arg.real else FIXED),
      'peers': True,
      'model': MODEL if arg.real else '',
      'thresholds': (0.9, 0.98) if arg.real else (),
    }
  )
  config.repeats = 10
  if arg.smoke:
    config.numbers.lengths = (512,)
    config.numbers.shares = (2,)
    config.numbers.selectors = ('xattention_16', *FIXED)
    config.numbers.peers = False
    config.repeats = 1
  return config


def decode(arg):
  """SnapKV reads prompts densely; what it evicts then saves decoding."""
  config = common.base('measure_methods', 'SnapKV: decode of a layer')
  config.preset = 'llama3_8b'
  # What is asked for is measured, whatever the policy file advises.
  snapkv = {'decode': {'crossover': 0}}
  config.methods = common.table({'dense': {}, 'snapkv': snapkv})
  lengths = tuple(1024 * n for n in (2, 4, 8, 16, 32, 64, 128))
  config.lengths = (arg.length,) if arg.length else lengths
  config.ops = ('layer',)
  config.weights = ''
  config.dtype = 'bfloat16'
  config.steps = 32
  config.layer_steps = 256
  config.repeats = 5
  config.layers = 1
  if arg.smoke:
    config.preset = 'tiny'
    config.dtype = 'float32'
    config.lengths = (512,)
    config.layer_steps = 4
    config.repeats = 1
  return config
