"""Trains a head profile for lserve: which kv heads may stream (DuoAttention).

python -m experiments.run --config=configs/train_head_profile.py \
    --config.model=MODEL --workdir=runs/head_profile

Give the same command until all steps are done; profile.json is written after
each piece. Arguments: `source=distant_mass` (without training), `smoke`.
"""

from configs import common


def get_config(arg=''):
  arg = common.parse_arg(arg, source='train')
  config = common.base('train_head_profile', 'Head profile')
  config.model = '.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf'
  config.source = arg.source
  config.recipe = {
    'steps': 2000,
    'rate': 0.02,
    'ramp': 0.2,
    'weight': 0.05,
    'sink': 128,
    'recent': 256,
  }
  config.documents = {
    'lengths': (2048, 3072, 4096, 5120, 6144, 7168, 8192),
    'passkeys': 10,
    'words': 32,
    'depth': 0.05,
  }
  config.text = ''
  config.looked_at = 8
  config.dtype = 'bfloat16'
  config.seed = 0
  config.devices = 1
  config.steps = 0
  config.minutes = 0.0
  config.save_minutes = 2.0
  if arg.smoke:
    config.model = 'preset:tiny'
    config.dtype = 'float32'
    config.recipe.update(steps=2, sink=16, recent=32)
    config.documents = {
      'lengths': (512,),
      'passkeys': 2,
      'words': 3,
      'depth': 0.05,
    }
    config.looked_at = 1
  return config
