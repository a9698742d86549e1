"""Trains APB's compressor: retaining heads of one model (Locret).

python -m experiments.run --config=configs/train_retaining_head.py \
    --config.model=MODEL --workdir=runs/heads_NAME

Give the same command until all steps are done; heads.safetensors is written
after each piece, and `apb` takes it: compressor=retaining_head,
heads=runs/heads_NAME/heads.safetensors. Arguments: `smoke`.
"""

from configs import common


def get_config(arg=''):
  arg = common.parse_arg(arg)
  config = common.base('train_retaining_head', 'Retaining heads')
  config.model = '.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf'
  config.recipe = {
    'steps': 3000,
    'rate': 5e-4,
    'warmup': 300,
    'width': 1024,
    'smooth': 0.0025,
    'clip': 0.5,
    'decay': 0.0,
  }
  # Documents of at most 10,240 tokens, as Locret's.
  config.documents = {
    'lengths': (2048, 4096, 6144, 8192, 10240),
    'passkeys': 10,
    'words': 8,
    'depth': 0.05,
  }
  config.text = ''
  config.dtype = 'bfloat16'
  config.seed = 0
  config.steps = 0
  config.minutes = 0.0
  config.save_minutes = 2.0
  if arg.smoke:
    config.model = 'preset:tiny'
    config.dtype = 'float32'
    config.recipe.update(steps=3, warmup=1, width=32)
    config.documents = {
      'lengths': (512,),
      'passkeys': 2,
      'words': 3,
      'depth': 0.05,
    }
  return config
