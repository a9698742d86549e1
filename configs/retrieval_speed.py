"""Retrieval from host memory: build and decode times on Llama 3 8B's shape.

python -m experiments.run --config=configs/retrieval_speed.py

Every kind decodes at the smallest effort whose recall is 0.95. Arguments:
`recall=R` (another; 0: the efforts stand here), `length=N`, `layers=N` (of the
model; times of fewer layers are no times of the model), `op=build|decode`,
`smoke`. A small machine: `length=8192,layers=1`. `device` is dense attention
over the whole cache on the device.

Keys and queries are drawn, so each decode time is printed with its recall by
share of keys scanned, over efforts: the curve that configs/retrieval_recall.py
prints of real heads. Rows carry bytes of both tiers and the device's peak.
`fastscan`, `fastscan/3bit` and `fastscan/2bit` read codes of all keys, of 4, 3
or 2 bits an element; their share scanned is of the keys that are ranked by
exact products. Threads that share a layer's queries: --config.jobs (0: as many
as cores; heads at least), and others over the same index: --config.more_jobs.
Tokens join the indexes by 512: --config.repeats=600 sees a step that waits for
that (`longest_ms`). A device of less memory: JAX takes no more than a share of
it where XLA_CLIENT_MEM_FRACTION says so; rows say how many bytes that
are (`limit_bytes`).
Caches are filled once; kinds: --config.kinds="('graph', 'flat')". A head of
100K keys took a core 47 to 66 s to build with HNSW and up to 14 s with IVF, and
32 layers have 256: give `layers=2`, or the kinds that there is time for.
"""

from configs import common


def get_config(arg=''):
  arg = common.parse_arg(arg, length=131072, layers=32, op='', recall=0.95)
  config = common.base('measure_retrieval', 'Retrieval: build and decode')
  config.model = 'preset:llama3_8b'
  config.length = arg.length
  config.layers = tuple(range(arg.layers))
  config.ops = (arg.op,) if arg.op else ('build', 'decode')
  config.kinds = (
    'fastscan/2bit', 'fastscan', 'graph', 'ivf', 'hnsw', 'flat', 'device',
  )  # fmt: skip
  config.efforts = {
    'graph': (100, 150, 200, 400, 800),
    'hnsw': (100, 200, 400, 800, 1600),
    'ivf': (32, 64, 128, 256),
    'flat': (0,),
    'fastscan': (100, 150, 200, 300),
    'fastscan/2bit': (150, 200, 300, 400),
    'fastscan/3bit': (100, 150, 200, 300),
  }
  config.recall = arg.recall
  config.top = 100
  config.queries = 8192
  config.neighbours = 32
  config.degree = 32
  config.repeats = 10
  config.jobs = 0
  config.more_jobs = ()
  config.dtype = 'bfloat16'
  config.output = ''
  if arg.smoke:
    config.model = 'preset:tiny'
    config.dtype = 'float32'
    config.length = 1024
    config.layers = (0,)
    config.kinds = ('exact',)
    config.top = 20
    config.queries = 128
    config.neighbours = 16
    config.repeats = 1
  return config
