"""Retrieval from host memory: build and decode times on Llama 3 8B's shape.

python -m experiments.run --config=configs/retrieval_speed.py

Arguments: `length=N`, `layers=N` (of the model; times of fewer layers are no
times of the model), `op=build|decode`, `smoke`. A small machine: `length=8192,
layers=1`. `device` is dense attention over the whole cache on the device.
"""

from configs import common


def get_config(arg=''):
  arg = common.parse_arg(arg, length=131072, layers=32, op='')
  config = common.base('measure_retrieval', 'Retrieval: build and decode')
  config.model = 'preset:llama3_8b'
  config.length = arg.length
  config.layers = tuple(range(arg.layers))
  config.ops = (arg.op,) if arg.op else ('build', 'decode')
  config.kinds = ('device', 'graph', 'ivf', 'hnsw', 'flat')
  config.efforts = {
    'graph': (200,),
    'hnsw': (400,),
    'ivf': (128,),
    'flat': (0,),
  }
  config.top = 100
  config.queries = 2048
  config.neighbours = 64
  config.degree = 32
  config.repeats = 10
  config.dtype = 'bfloat16'
  config.output = ''
  if arg.smoke:
    config.model = 'preset:tiny'
    config.dtype = 'float32'
    config.length = 1024
    config.layers = (0,)
    config.kinds = ('exact',)
    config.ops = ('decode',)
    config.top = 20
    config.queries = 128
    config.neighbours = 16
    config.repeats = 1
  return config
