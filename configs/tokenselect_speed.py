"""TokenSelect on the shape of Llama 3 8B: decode hit and miss, prefill, answer.

python -m experiments.run --config=configs/tokenselect_speed.py

Arguments: `op=hit|miss|prefill|answer` (one of the four; without it `miss`),
`length=N` (one length), `method=NAME` (one row beside dense, several with a /
between them, their names without commas), `smoke`.

  hit      decode attention of one layer while queries stay alike: the
           Selection Cache serves, 128K and 1M
  miss     the same when every query selects: all tokens scored, int8 copies of
           them, the best 8,192 by page bounds (their lost votes on real keys:
           configs/tokenselect_quality.py:vary=scoring)
  prefill  the whole model over 128K
  answer   a prompt of 128K and 128 tokens after it, beside dense attention that
           is not fused (experiments/peers.py) and block retrieval: prompt
           blocks by their mean (spargeattn's estimate, 64 blocks of 128 a row)
           and decode pages by bounds (quest), both within InfLLM's budget of
           8,192 tokens (4K + 4K), though it is not InfLLM

Dense is our own kernels'. What lies on the disk is resumed.
"""

from configs import common

KIB = 1024
BUDGET = {'scoring': 'budget', 'scored': 8192}
OPS = {
  'hit': 'layer_alike',
  'miss': 'layer',
  'prefill': 'prefill',
  'answer': 'answer',
}


def get_config(arg=''):
  arg = common.parse_arg(arg, op='miss', length=0, method='')
  if arg.op not in OPS:
    raise ValueError(
      f'config argument op={arg.op!r} is not one of {", ".join(OPS)}'
    )
  config = common.base('measure_methods', f'TokenSelect: speed, {arg.op}')
  config.preset = 'llama3_8b'
  config.ops = (OPS[arg.op],)
  whole = arg.op in ('prefill', 'answer')
  lengths = (128 * KIB,) if whole else (128 * KIB, KIB * KIB)
  config.lengths = (arg.length,) if arg.length else lengths
  found = rows(arg.op, max(config.lengths))
  if arg.method:  # a comma ends an argument
    named = {name.replace(',', ''): name for name in found}
    chosen = common.rows(arg.method, named).values()
    found = {name: found[name] for name in chosen}
  config.methods = common.table({'dense': {}} | found)
  config.weights = ''
  config.dtype = 'bfloat16'
  config.steps = 128 if arg.op == 'answer' else 32
  config.layer_steps = 1024
  config.repeats = 10
  config.warm = 0
  config.layers = 0
  if arg.smoke:
    config.preset = 'tiny'
    config.dtype = 'float32'
    config.lengths = (512,)
    config.steps = config.layer_steps = 2
    config.repeats = 1
    budget = common.table(BUDGET | {'k': 64, 'scored': 128})
    config.methods = common.table({'dense': {}})
    config.methods.tokenselect = common.table(
      {
        'prefill': {'k': 64},
        'decode': budget.to_dict(),
        'cache': {'page': 16, 'stats': True},
      }
    )
  return config


def rows(op, length):
  bounds = {'page': 16, 'stats': True}
  if op == 'hit':
    # One step in 448 selects.
    decode = {'reuse': 448}
    return {'hit': {'method': 'tokenselect', 'decode': decode}}
  if op == 'miss':
    return {
      'miss, all tokens': {'method': 'tokenselect'},
      'miss, int8 copies': {
        'method': 'tokenselect',
        'decode': {'score_bits': 8},
      },
      'miss, best pages': {
        'method': 'tokenselect',
        'decode': BUDGET,
        'cache': bounds,
      },
      'miss, best pages of int8 copies': {
        'method': 'tokenselect',
        'decode': BUDGET | {'score_bits': 8},
        'cache': bounds,
      },
    }
  tokenselect = {'method': 'tokenselect', 'decode': BUDGET, 'cache': bounds}
  if op == 'prefill':
    return {'tokenselect': tokenselect}
  blocks = {'threshold': None, 'density': 8192 / length, 'similarity': -1.0}
  return {
    'tokenselect': tokenselect,
    'block retrieval': {
      'method': 'spargeattn+paged+quest',
      'prefill': blocks | {'width': 66},
      'decode': {'budget': 8192, 'recent': 4096, 'dense_layers': 0},
    },
    'dense, not fused': {'method': 'unfused'},
  }
