"""Recall and share of keys scanned per head, on a model's own keys.

python -m experiments.run --config=configs/retrieval_recall.py \
    --config.model=MODEL --config.length=32768

Arguments: `layers=N` (every N-th layer), `smoke`. A row is a kv head of a layer
under one kind of index; queries of the tokens after the indexed ones ask.
`graph/query_head` is one graph a query head: as many times the links. Of
`fastscan` the share scanned is of the keys that are ranked by exact products;
codes of all keys are read beside them (a quarter of the bytes of 16-bit keys;
`fastscan/2bit` an eighth, `fastscan/3bit` between).
"""

from configs import common


def get_config(arg=''):
  arg = common.parse_arg(arg, layers=0)
  config = common.base('measure_retrieval', 'Retrieval: recall by scan')
  config.model = '.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf'
  config.length = 8192
  config.ops = ('recall',)
  config.kinds = ('graph', 'graph/query_head', 'fastscan', 'hnsw', 'ivf')
  config.efforts = {
    'graph': (100, 200, 400, 800, 1600),
    'graph/query_head': (100, 200, 400, 800, 1600),
    'hnsw': (100, 200, 400, 800, 1600),
    'ivf': (4, 8, 16, 32, 64, 128),
    'fastscan': (100, 150, 200, 300, 500),
    'fastscan/2bit': (100, 150, 200, 300, 500),
    'fastscan/3bit': (100, 150, 200, 300, 500),
  }
  config.layers = tuple(range(0, 96, arg.layers)) if arg.layers else ()
  config.text = ''
  config.top = 100
  config.asked = 32
  config.queries = 8192
  config.neighbours = 32
  config.degree = 32
  config.dtype = 'bfloat16'
  config.output = ''
  if arg.smoke:
    config.model = 'preset:tiny'
    config.dtype = 'float32'
    config.length = 1024
    config.kinds = ('exact',)
    config.efforts = {'exact': (0,)}
    config.layers = (0,)
    config.top = 20
    config.asked = 8
    config.queries = 128
    config.neighbours = 16
    config.degree = 8
  return config
