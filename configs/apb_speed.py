"""APB's prefill, ms a layer by part, beside Star and the exact methods.

python -m experiments.run --config=configs/apb_speed.py

Llama 3 8B's shape, random weights. Arguments: `devices=4` (GPUs of this
machine; 2 and 8 work, too), `length=N` (one length), `method=NAME` (one row, or
several with / between them), `exchange` (only the rows that compare the two
exchanges of passing blocks), `few` (without what compares exchanges,
compressors and layers), `anchor=N`, `passing=N` (tokens of APB's; else a
quarter of a block and an eighth; the paper's at 512K is 8192 each, named so in
the rows), `smoke`. 128K, 256K and 512K tokens.

`devices=1,hosts=4` (or any number of hosts) has all hosts on one GPU, one after
the other, and nothing to send: against dense there, by how much each form has
less to compute. Of balanced forms a quarter of the time is each device's own.
"""

from configs import common

KIB = 1024


def get_config(arg=''):
  arg = common.parse_arg(
    arg,
    devices=0,
    hosts=0,
    length=0,
    method='',
    exchange=False,
    few=False,
    anchor=0,
    passing=0,
  )
  config = common.base('measure_prefill', "APB's prefill by part")
  config.preset = 'llama3_8b'
  config.devices = arg.devices or (1 if arg.smoke else 4)
  if arg.hosts and config.devices > 1:
    raise ValueError(
      f'config argument hosts={arg.hosts} is of one device: with '
      f'devices={config.devices}, each is a host'
    )
  hosts = arg.hosts or config.devices
  plain = {'method': 'apb', 'hosts': hosts}
  once = plain | {'shared_anchor': True}
  # Two hosts a device, from both ends.
  balanced = once | {'hosts': 2 * hosts, 'order': 'zigzag'}
  forward = {'exchange': 'forward'}
  exchanges = {
    'apb': plain,
    'apb forward': plain | forward,
    'apb balanced': balanced,
    'apb balanced forward': balanced | forward,
  }
  rows = {
    'all-gather': {'method': 'dense'},
    'ring': {'method': 'ring'},
    'ring contiguous': {'method': 'ring_contiguous'},
    'ulysses': {'method': 'ulysses'},
    'star': {'method': 'star', 'hosts': hosts},
    'apb': plain,
    'apb anchor once': once,
    'apb balanced': balanced,
    'apb balanced overlap': balanced | {'overlap': True},
    'apb balanced local 1to8': balanced | {'density': 0.125},
  }
  more = {
    'apb every 2nd layer': once | {'every': 2},
    'apb snapkv': plain | {'compressor': 'snapkv'},
    'apb random': plain | {'compressor': 'random'},
  }
  if arg.exchange:
    rows = exchanges
  elif not arg.few:
    rows |= more | exchanges
  if arg.hosts:  # on one device exact methods are dense, and nothing is sent
    exact = ('ring', 'ring contiguous', 'ulysses')
    rows = {
      name: fields
      for name, fields in rows.items()
      if name not in exact and 'forward' not in name
    }
  rows = common.rows(arg.method, rows)
  blocks = {name: arg[name] for name in ('anchor', 'passing') if arg[name]}
  named = ''.join(f', {name} {tokens}' for name, tokens in blocks.items())

  def sized(row, fields):
    if fields['method'] != 'apb':
      return row, fields
    return f'{row}{named}', fields | blocks

  config.methods = common.table(dict(sized(*row) for row in rows.items()))
  config.lengths = tuple(KIB * n for n in (128, 256, 512))
  if arg.length:
    config.lengths = (arg.length,)
  config.bandwidths = (0.1, 1.0)
  config.parts = True
  config.repeats = 10
  config.dtype = 'bfloat16'
  config.output = ''
  if arg.smoke:
    config.preset = 'tiny'
    config.dtype = 'float32'
    config.lengths = (512,)
    config.repeats = 1
    small = {'method': 'apb', 'hosts': max(2, hosts), 'shared_anchor': True}
    rows = {'ring': {}, 'apb': small, 'apb forward': small | forward}
    config.methods = common.table(rows)
  return config
