"""LServe beside dense on the shape of Llama 3 8B: decode step, layer, prefill.

python -m experiments.run --config=configs/lserve_speed.py

Arguments: `length=N` (one length), `op=step|layer|prefill` (one op), `bits=8`
or `4` (of the cache, on both sides), `weights=w8a8|w4a16|fp8` (on both sides),
`method=lserve` (without each kind of sparsity alone), `reuse` (lserve's layer
with a selection every 4, 2 and 64 steps), `looseness=X` (a share of bounds that
lserve takes off, 0 to 1), `scorer=moments`, `logical=N` (tokens of a logical
page), `smoke`. Rows name what is not the default: `lserve moments/4`, `lserve
looseness=70%`. Half of the kv heads stream by a fixed rule: which ones does not
matter to time.

A step of a layer takes A + S / C, where a selection S serves C steps (these
three list as many pages): S = (t4 - t64) / (1/4 - 1/64), and of the rest, which
is attention, append and what a step spends to find that no selection is due,
selection takes the share S / 4 / (t4 - S / 4).
"""

from configs import common

KIB = 1024


def get_config(arg=''):
  arg = common.parse_arg(
    arg,
    length=0,
    op='',
    bits=16,
    weights='',
    method='',
    reuse=False,
    looseness=0.0,
    scorer='bounds',
    logical=16,
  )
  config = common.base('measure_methods', 'LServe: speed on Llama 3 8B')
  config.preset = 'llama3_8b'
  dense = {'method': 'dense'}
  if arg.bits < 16:
    dense = {'method': f'dense+paged_int{arg.bits}+dense', 'stats': 'none'}
  static = {'profile': 'alternate'}
  # Selected at every length, whatever the policy file advises.
  dynamic = {'dynamic': 'xattention', 'density': 0.125, 'dense_below': 0}
  prefill = arg.op == 'prefill'
  # What the policy file has of crossovers comes from these rows.
  always = {'decode': {'crossover': 0, 'looseness': arg.looseness}}
  lserve = {'method': 'lserve', 'bits': arg.bits, **always}
  other = ''
  if (arg.scorer, arg.logical) != ('bounds', 16):
    lserve |= {'scorer': arg.scorer, 'stats': arg.scorer}
    lserve |= {'logical_page': arg.logical}
    other = f' {arg.scorer}/{arg.logical}'
  if arg.looseness:
    other += f' looseness={arg.looseness:.0%}'  # names take no dots
  config.methods = common.table(
    {
      'dense': dense,
      'lserve': {**lserve, **static, **(dynamic if prefill else {})},
      'static only': {
        **lserve,
        **static,
        # A retrieval head sees everything below a crossover.
        'decode': {'crossover': 2**30},
      },
      'dynamic only': {**lserve, **(dynamic if prefill else {})},
    }
  )
  if arg.reuse:
    config.methods = common.table(
      {'dense': dense}
      | {f'reuse={n}': {**lserve, **static, 'reuse': n} for n in (4, 2, 64)}
    )
  if arg.method and arg.method not in config.methods:
    names = ', '.join(config.methods)
    raise ValueError(
      f'config argument method={arg.method!r} is not one of {names}'
    )
  if arg.method:
    chosen = {arg.method: config.methods[arg.method]}
    config.methods = common.table({'dense': dense} | chosen)
  config.lengths = tuple(KIB * n for n in (64, 128, 256))
  if arg.length:
    config.lengths = (arg.length,)
  config.ops = (arg.op,) if arg.op else ('step', 'layer')
  if arg.reuse:
    config.ops = ('layer',)
  config.weights = arg.weights
  config.dtype = 'bfloat16'
  config.steps = 128  # a call costs 1 to 2 ms once
  config.layer_steps = 1024
  config.repeats = 10
  config.warm = 0
  config.layers = 0
  if arg.smoke:
    config.preset = 'tiny'
    config.dtype = 'float32'
    config.lengths = (512,)
    config.ops = ('layer',)
    config.steps = config.layer_steps = 4
    config.repeats = 1
    sparse = 'reuse=4' if arg.reuse else 'lserve'
    keep = {name: config.methods[name] for name in ('dense', sparse)}
    config.methods = common.table(keep)
    config.methods[sparse].decode.budget = 320
  of_all = f', int{arg.bits}' if arg.bits < 16 else ''
  config.methods = common.table(
    {
      name + ('' if name == 'dense' else other) + of_all: method.to_dict()
      for name, method in config.methods.items()
    }
  )
  return config
