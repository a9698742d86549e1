"""TokenSelect: one 512-token prefill chunk beside dense cuDNN, 128K to 1M.

python -m experiments.run --config=configs/tokenselect_chunk_speed.py

A layer of Qwen2-7B's shape. Arguments: `length=N` (one length in place of all),
`smoke` (a tiny layer, no peer, seconds on a CPU).
"""

from configs import common


def get_config(arg=''):
  arg = common.parse_arg(arg, length=0)
  config = common.base('measure', 'TokenSelect: one chunk of a prefill')
  config.suite = 'tokenselect_bench'
  lengths = tuple(1024 * n for n in (128, 256, 512, 1024))
  config.numbers = common.table(
    {
      'lengths': (arg.length,) if arg.length else lengths,
      'preset': 'qwen2_7b',
      'k': 2048,
      'sink': 128,
      'chunk': 512,
      'peers': True,
    }
  )
  config.repeats = 10
  if arg.smoke:
    config.numbers = common.table(
      {
        'lengths': (512,),
        'preset': 'tiny',
        'k': 64,
        'sink': 16,
        'chunk': 64,
        'peers': False,
      }
    )
    config.repeats = 1
  return config
