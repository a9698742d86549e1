"""Kernels against their peers on one GPU: rates, shares of the ceiling.

python -m experiments.run --config=configs/kernel_bench.py:op=block_sparse

Arguments: `op=NAME` (block_sparse, passing_block, selected_token, scores;
default: all), `smoke` (tiny sizes, plain XLA, any device). Rows also go to
experiments/results/kernels.jsonl with
`--config.output=experiments/results/kernels.jsonl`. Heads are Llama-3-8B's:
32 query heads, 8 kv heads, head dim 128.
"""

from configs import common

K = 1024


def get_config(arg=''):
  arg = common.parse_arg(arg, op='')
  config = common.base('measure', 'Kernels')
  # Kernels compile in seconds, and their compile time is a column.
  config.compilation_cache = ''
  config.ops = (
    (arg.op,)
    if arg.op
    else ('block_sparse', 'passing_block', 'selected_token', 'scores')
  )
  config.prompts = (32 * K, 128 * K)
  config.shares = (2, 4, 8, 16)
  config.mixture = 128 * K
  config.anchor = 4 * K
  config.decodes = (32 * K, 128 * K, 512 * K)
  config.bits = (16, 8, 4)
  config.select = 128 * K
  config.batch = 16
  config.ceilings = True
  config.implementation = ''
  config.peers = True
  config.repeats = 10
  config.output = ''
  if arg.smoke:
    config.prompts = (256,)
    config.shares = (2,)
    config.mixture = 0
    config.anchor = 0
    config.decodes = (256,)
    config.bits = (16, 4)
    config.select = 0
    config.batch = 0
    config.ceilings = False
    config.peers = False
    config.repeats = 1
  return config
