"""LServe beside dense on the shape of Llama 3 8B: decode step, layer, prefill.

python -m experiments.run --config=configs/lserve_speed.py

Arguments: `length=N` (one length), `op=step|layer|prefill` (one op), `bits=8`
or `4` (of the cache, on both sides), `weights=w8a8|w4a16|fp8` (on both sides),
`method=lserve` (without each kind of sparsity alone), `smoke`. Half of the kv
heads stream by a fixed rule: which ones does not matter to time.
"""

from configs import common

KIB = 1024


def get_config(arg=''):
  arg = common.parse_arg(arg, length=0, op='', bits=16, weights='', method='')
  config = common.base('measure_methods', 'LServe: speed on Llama 3 8B')
  config.preset = 'llama3_8b'
  cache = {16: 'paged', 8: 'paged_int8', 4: 'paged_int4'}[arg.bits]
  dense = 'dense' if arg.bits == 16 else f'dense+{cache}+dense'
  static = {'profile': 'alternate'}
  # Selected at every length, whatever the policy file advises.
  dynamic = {'dynamic': 'xattention', 'density': 0.125, 'dense_below': 0}
  prefill = arg.op == 'prefill'
  lserve = {'method': 'lserve', 'bits': arg.bits}
  config.methods = common.table(
    {
      'dense': {'method': dense},
      'lserve': {**lserve, **static, **(dynamic if prefill else {})},
      'static only': {
        **lserve,
        **static,
        # A retrieval head sees everything below the crossover.
        'decode': {'crossover': 2**30},
      },
      'dynamic only': {**lserve, **(dynamic if prefill else {})},
    }
  )
  if arg.method and arg.method not in config.methods:
    names = ', '.join(config.methods)
    raise ValueError(
      f'config argument method={arg.method!r} is not one of {names}'
    )
  if arg.method:
    chosen = {arg.method: config.methods[arg.method]}
    config.methods = common.table({'dense': {'method': dense}} | chosen)
  config.lengths = tuple(KIB * n for n in (64, 128, 256))
  if arg.length:
    config.lengths = (arg.length,)
  config.ops = (arg.op,) if arg.op else ('step', 'layer')
  config.weights = arg.weights
  config.dtype = 'bfloat16'
  config.steps = 128  # a call costs 1 to 2 ms once
  config.layer_steps = 1024
  config.repeats = 10
  config.layers = 0
  if arg.smoke:
    config.preset = 'tiny'
    config.dtype = 'float32'
    config.lengths = (512,)
    config.ops = ('layer',)
    config.steps = config.layer_steps = 4
    config.repeats = 1
    keep = {'dense': config.methods['dense']}
    keep['lserve'] = config.methods['lserve']
    config.methods = common.table(keep)
    config.methods.lserve.decode = {'budget': 320}
  return config
