"""Dense attention: a decoded token, a prompt and both compile times of a model.

python -m experiments.run --config=configs/dense_speed.py

Qwen2.5-0.5B's shape at 32K, random weights; a row has its compile time.
Arguments: `model=NAME` (another preset), `length=N`, `op=step|prefill` (one of
the two), `weights=w8a8|w4a16|fp8`, `smoke`. What sparse methods are worth
beside it: configs/lserve_speed.py, configs/tokenselect_speed.py.
"""

from configs import common


def get_config(arg=''):
  arg = common.parse_arg(
    arg, model='qwen2_5_0_5b', length=32768, op='', weights=''
  )
  config = common.base('measure_methods', f'Dense: speed of {arg.model}')
  config.preset = arg.model
  config.methods = common.table({'dense': {}})
  config.lengths = (arg.length,)
  config.ops = (arg.op,) if arg.op else ('step', 'prefill')
  config.weights = arg.weights
  config.dtype = 'bfloat16'
  config.steps = 256  # a call costs 1 to 2 ms once
  config.layer_steps = 256
  config.repeats = 10
  config.warm = 0
  config.layers = 0
  if arg.smoke:
    config.preset = 'tiny'
    config.dtype = 'float32'
    config.lengths = (512,)
    config.steps = 4
    config.repeats = 1
  return config
