"""Trains the bundled needle model from scratch, in pieces that resume.

python -m experiments.run --config=configs/train_needle.py \
    --config.minutes=9 --workdir=runs/needle

Give the same command until it says that all steps are done. Argument: `smoke`
(seconds on a CPU).

The bundled weights were made by this recipe in one piece, 7 minutes on one H200
(lcx/models/needle/training.json has config and scores; the log stands in
experiments/results/train_needle). To keep new ones, put the files of
runs/needle/model into lcx/models/needle.
"""

from configs import common

# Weights of: records, repeated, copying, key_value, lines, variables, passkey,
# common_words, frequent_words, text.
_FIRST = (14.0, 5.0, 5.0, 40.0, 5.0, 29.0, 2.0, 0.0, 0.0, 0.0)
_THEN = (4.0, 2.0, 6.0, 42.0, 8.0, 27.0, 4.0, 2.0, 2.0, 3.0)


def get_config(arg=''):
  arg = common.parse_arg(arg)
  config = common.base('train', 'Needle model')
  config.model = {
    'vocab_size': 5120,
    'd_model': 256,
    'n_layers': 6,
    'n_heads': 8,
    'n_kv_heads': 2,
    'head_dim': 64,
    'd_ff': 512,
    'tie_embeddings': True,
    'max_position': 65536,
    'dtype': 'bfloat16',
    # A step function in the notation of Llama 3.1: waves up to 512 tokens
    # rotate, longer ones stand still (p-RoPE, arXiv:2410.06205). What stands
    # still knows no distance, so no length is unseen.
    'rope': {
      'theta': 10000.0,
      'kind': 'llama3',
      'factor': 1e9,
      'original_max': 512,
      'low_freq_factor': 1.0,
      'high_freq_factor': 1.000001,
    },
  }
  # Seconds a step on one H100 with 15 workers (measured): 0.069, 0.087, 0.10,
  # 0.12, 0.165; 7 minutes in all.
  config.stages = (
    _stage(256, 512, 1000, 64, _FIRST, packed=0.0, backward=0.35),
    _stage(1024, 128, 1000, 128, _THEN),
    _stage(4096, 32, 700, 192, _THEN),
    _stage(8192, 16, 400, 256, _THEN),
    _stage(16384, 8, 750, 320, _THEN),
  )
  config.optimizer = {
    'name': 'muon',
    'rate': 8e-3,
    'other_rate': 2e-3,
    'warmup': 100,
    'decay': 0.6,
    'weight_decay': 0.01,
    'clip': 1.0,
  }
  config.text = ('numpy', 'scipy', 'jax')
  config.tokenizer = 'lcx/models/needle/tokenizer.json'
  config.words = 800
  config.start = ''
  config.seed = 0
  config.lm_weight = 0.25
  config.remat = False
  config.workers = 15
  config.mesh = (1, 1, 1)
  config.steps = 0
  config.minutes = 0.0
  config.save_minutes = 2.0
  config.evaluate = _cells()
  config.samples = 50
  if arg.smoke:
    config.model.update(vocab_size=4096, d_model=64, n_layers=2, d_ff=64)
    config.model.dtype = 'float32'
    config.stages = (
      _stage(256, 4, 4, 32, _FIRST),
      _stage(512, 2, 2, 32, _THEN),
    )
    config.optimizer.warmup = 2
    config.text = ('numpy',)
    config.tokenizer = ''
    config.words = 50
    config.workers = 0
    config.evaluate = ({'task': 'niah_single_2', 'length': 512, 'fields': {}},)
    config.samples = 2
  return config


def _stage(length, batch, steps, targets, mix, packed=0.3, backward=0.2):
  return {
    'length': length,
    'batch': batch,
    'steps': steps,
    'targets': targets,
    'mix': mix,
    'packed': packed,
    'backward': backward,
  }


def _cells():
  single = [('niah_single_2', {}, n) for n in (4096, 16384, 32768, 65536)]
  four = [('niah_multikey_1', {}, n) for n in (4096, 16384, 32768)]
  two_hops = [('vt', {'hops': 2}, n) for n in (1024, 4096, 16384)]
  rest = [
    ('niah_single_1', {}, 4096),
    ('niah_single_3', {}, 4096),
    ('niah_multikey_2', {}, 4096),
    ('niah_multivalue', {}, 4096),
    ('niah_multiquery', {}, 4096),
    ('vt', {}, 4096),
    ('passkey', {}, 16384),
    ('kv_retrieval', {}, 4096),  # a kind that training never sees
  ]
  return tuple(
    {'task': task, 'length': length, 'fields': fields}
    for task, fields, length in [*single, *four, *two_hops, *rest]
  )
