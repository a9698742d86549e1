"""Block selectors: density, captured mass and quality on a real model.

python -m experiments.run --config=configs/selectors.py

Arguments: `method=NAME` (that method beside dense), `few` (one row a method),
`task=NAME`, `protocol=NAME`, `length=N`, `samples=N`, `smoke` (a tiny model
with random weights, seconds, no download).
`--config.model=PATH` takes any Hugging Face folder or GGUF file.

Both protocols: the context first, then the question through the decode path;
and the whole prompt at once. Density stands beside every score; beside those of
who selects blocks, captured softmax mass of the prefill (exact, over sampled
queries), the selector's own estimate of it, and what the width cut off.
"""

from typing import Any

from configs import common

# What is asked for is measured, whatever the policy file advises.
SELECT = {'dense_below': 0}


def get_config(arg=''):
  arg = common.parse_arg(
    arg, method='', few=False, task='', protocol='', length=0, samples=100
  )
  config = common.base('evaluate', 'Block selectors: density and quality')
  config.model = '.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf'
  config.dtype = 'auto'
  # xattention: stride 16 and threshold 0.9, its default.
  rows = {
    'dense': {},
    'a_shape': {'prefill': {'sink': 128, 'recent': 512}},
    'vertical_slash': {'prefill': {'columns': 128, 'diagonals': 256} | SELECT},
    'spargeattn': {'prefill': {'threshold': 0.9, 'similarity': 0.2} | SELECT},
    'snapkv': {'decode': {'budget': 512, 'crossover': 0}},
    'xattention': {'prefill': SELECT},
  }
  tail = {'tail': 64}  # the question's tokens see everything
  rows |= {
    f'{name} tail': {'method': name, 'prefill': rows[name]['prefill'] | tail}
    for name in ('spargeattn', 'xattention')
  }
  if not (arg.method or arg.few or arg.smoke):
    rows |= sweep()
  if arg.smoke and not arg.method:
    # Attention of random weights is flat: a threshold would leave out nothing.
    few = {'prefill': {'threshold': None, 'density': 0.25} | SELECT}
    rows = {'dense': {}, 'snapkv': rows['snapkv'], 'xattention': few}
  config.methods = common.methods(arg.method, rows)
  tasks = (arg.task,) if arg.task else ('niah_single_2', 'niah_multikey_1')
  config.tasks = common.table({task: {} for task in tasks})
  config.lengths = (arg.length,) if arg.length else (2048, 4096, 8192)
  config.samples = arg.samples
  both = ('context_first', 'whole')
  config.protocols = (arg.protocol,) if arg.protocol else both
  config.max_new_tokens = 24
  config.batch = 1
  config.capacity = 0
  config.seed = 0
  config.haystack = ''
  config.transfer_guard = 'allow'
  if arg.smoke:
    config.model = 'preset:tiny'
    config.lengths = (512,)
    config.samples = 1
    config.max_new_tokens = 2
    config.protocols = ('whole',)
    config.tasks = common.table({'niah_single_2': {}})
  return config


def sweep():
  """Labels hold no dots: they are names of fields."""
  rows: dict[str, Any] = {}
  for stride in (8, 16):
    for percent in (70, 80, 95):
      rows[f'xattention s{stride} t{percent}'] = {
        'method': 'xattention',
        'prefill': {'stride': stride, 'threshold': percent / 100} | SELECT,
      }
  for share in (2, 4, 8):
    rows[f'xattention s16 d{share}'] = {
      'method': 'xattention',
      'prefill': {'threshold': None, 'density': 1 / share} | SELECT,
    }
  for percent in (50, 98):
    rows[f'spargeattn t{percent}'] = {
      'method': 'spargeattn',
      'prefill': {'threshold': percent / 100, 'similarity': -0.1} | SELECT,
    }
  return rows
